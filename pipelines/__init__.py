"""Joins a cache and a student: batches, presets, pages and the demo."""
