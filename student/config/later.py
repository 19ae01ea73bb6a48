"""Fields that configurations have got since the first runs were recorded, and what a record without one means by that.

A run may be older than the program that reads it or goes on with it. A new field of a config class gets its line here, in the
commit that brings the field, whatever its default is.
"""

ADDED_LATER: dict[str, object] = {
    "TrainConfig.drops": "micro-batches",
    "OptimConfig.schedule": "mae",
    "OptimConfig.warmup_start": 0.0,
}
"""`Class.field` -> the JSON value that says what was done before there was the field."""
