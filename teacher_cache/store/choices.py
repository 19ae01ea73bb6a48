"""How rows of a store may be read: words for options, known without what reads."""

from __future__ import annotations

READERS = ("mmap", "pread")
CHECKS = {"never": 0, "first": 1, "always": 2}
"""When the CRC-32C of a row is compared: never, the first time this process reads the row, at every read."""
