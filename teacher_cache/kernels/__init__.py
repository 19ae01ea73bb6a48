"""Compiled loops that run without the GIL, and what guards the memory they read."""
