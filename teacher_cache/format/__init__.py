"""The format as values: what docs/format.md says, without a file being opened."""
