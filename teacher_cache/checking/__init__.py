"""Is every byte the one that was written, and how is it mended if not."""
