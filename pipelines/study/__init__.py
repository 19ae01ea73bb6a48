"""The study: what students of one teacher learn, and how that depends on views and on the bits of a target (docs/study.md)."""
