"""One script a claim. Each prints a ratio against its rival or its ceiling, both measured in one run (see measure.py)."""
