"""What crop and extract do with --repair."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..terminal.command import say
from ..words import quoted


def refuse_beside_repair(cache: Path, dry_run: bool, shards: range | None = None) -> None:
    """Raise UsageError for options that --repair has no use for."""
    if dry_run:
        raise UsageError(f"--repair has no dry run. What there is to mend, this says: teacher-cache verify {quoted(cache)}")
    if shards is not None:
        raise UsageError("--repair looks at all shards: give it without --shards.")


def repair_and_say(cache: Path, images: Path | None, store: str | None = None) -> None:
    """Mend what can be mended without a teacher, and say what was."""
    from ..checking.repair import repair_cache

    n_mended = 0
    for line in repair_cache(cache, images, store):
        n_mended += 1
        say(f"mended   {line}")
    if not n_mended:
        say(f"{cache}: there was nothing to mend.")
