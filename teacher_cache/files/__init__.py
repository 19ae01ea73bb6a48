"""Files that are whole or absent, have one writer, and fit on their disk."""
