"""The loop, and what may happen to it."""
