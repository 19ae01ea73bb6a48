"""What labelled, frozen features are worth: an evaluator a file, whose `score(train, val, seed)` yields (name, value)."""
