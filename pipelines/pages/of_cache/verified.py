"""What verify found, found out on the spot or read from the output of `teacher-cache verify --json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.errors import BadInputError, MismatchError, UsageError
from teacher_cache.words import quoted

MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Verified:
    """The verdict on a cache at one moment."""

    when: str
    """ISO 8601, UTC."""
    n_files: int
    sample: int | None
    """Rows that were checked of each store and view; None: all."""
    findings: tuple[tuple[str, str, str], ...]
    """(kind, path in the cache, message)."""
    not_made: tuple[tuple[str, str], ...]
    """(path in the cache, why): checks that were left out where it was checked."""


def verify_now(cache: Cache, sample: int | None, now: str) -> Verified:
    """Run verify on a cache."""
    findings, checked = verify(cache, sample)
    found = tuple(_finding(cache, f.kind, f.path, f.message) for f in findings)
    return Verified(now, checked.n_files, sample, found, tuple(checked.not_made.items()))


def read_verified(path: Path, cache: Cache) -> Verified:
    """The output of `verify --json` of this cache. Errors say what the file is instead."""
    wanted = f"Make it with: teacher-cache verify --json {quoted(cache.path)} > {quoted(path)}"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BadInputError(f"--verified {path}: is larger than any output of verify. {wanted}")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"--verified {path}: there is no such file. {wanted}") from None
    except (IsADirectoryError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInputError(f"--verified {path}: is not the output of verify --json. {wanted}") from error
    try:
        if value["crops_id"] is not None and value["crops_id"] != cache.crops_id:
            raise MismatchError(
                f"--verified {path}: is about other crops ({str(value['crops_id'])[:12]}) than those of {cache.path} "
                f"({cache.crops_id[:12]}). {wanted}"
            )
        findings = tuple(_finding(cache, *(str(item[key]) for key in ("kind", "path", "message"))) for item in value["findings"])
        sample = None if value["sample"] is None else int(value["sample"])
        not_made = tuple((str(path), str(why)) for path, why in value.get("not_made", {}).items())
        return Verified(str(value["when"]), int(value["n_files"]), sample, findings, not_made)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, MismatchError):
            raise
        raise BadInputError(f"--verified {path}: is not the output of verify --json: {error!r}. {wanted}") from error


def _finding(cache: Cache, kind: str, path: str, message: str) -> tuple[str, str, str]:
    """With the path as it is below the cache, so that the page names no folder of the machine."""
    parts = Path(path).parts
    below = Path(*parts[len(cache.path.parts) :]) if parts[: len(cache.path.parts)] == cache.path.parts else Path(path)
    return kind, str(below), message
