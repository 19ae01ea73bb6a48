"""Who writes to a cache while it is checked, and where.

A check takes a while, and what a writer has aside, or is about to declare finished, may look broken in between. So verify looks
twice, before and after: at the claims that are held, and at every file's inode, time and size. Where somebody was at work, or
where something changed, it says so and judges nothing but finished shards, which a writer takes back before it touches them.

A cache has one *part* for its lists and crops (crops.claim), and one for each store (NAME.zarr.claim, NAME.zarr.claims/).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..files.claims import Observer, holder_of
from ..format import layout
from ..format.layout import CROPS_CLAIM, is_shard_file, owning_store
from ..store import failures
from .findings import Finding

ROW_ARRAYS = ("tokens", "scale", "attention", "index")
WHOLE = "."
"""The part of a cache that is no store."""
ONE_CLAIM, RANGES = f"{layout.VIEWS}/{layout.CLAIMS}", f"{layout.VIEWS}/{layout.RANGE_CLAIMS}"
"""Patterns of the claims of stores."""


def entries(root: Path) -> list[tuple[Path, os.stat_result]]:
    """Everything below `root`, in order; symlinks are not followed. What goes away meanwhile is left out."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_unless_gone):
        for path in (Path(folder, name) for name in (*folders, *files)):
            try:
                found.append((path, path.lstat()))
            except FileNotFoundError:
                continue
    return sorted(found, key=lambda entry: entry[0])


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def part_of(root: Path, path: str | Path) -> str:
    """`view-000/fake.zarr` for all that belongs to that store, its claims and what is aside; WHOLE for lists and crops."""
    parts = Path(path).relative_to(root).parts
    store = owning_store(parts[1]) if len(parts) > 1 else None
    return f"{parts[0]}/{store}" if store else WHOLE


class Snapshot:
    """The cache `root` as it is when this is made, to be compared by `without_busy` with what it is later."""

    def __init__(self, root: Path):
        self.root = root
        self._observer = Observer()
        self.sizes, self._before = self._look()
        self._holders = self._held()

    def _look(self) -> tuple[dict[str, int], dict[str, tuple]]:
        """Bytes of every file, and what changes when somebody writes it."""
        files = {str(path): status for path, status in entries(self.root) if not stat.S_ISDIR(status.st_mode)}
        sizes = {path: status.st_size for path, status in files.items()}
        return sizes, {path: (status.st_ino, status.st_mtime_ns, status.st_size) for path, status in files.items()}

    def _held(self) -> dict[str, dict[str, bool]]:
        """Part -> who works on it -> whether on more than the shards that are missing."""
        held: dict[str, dict[str, bool]] = {}
        for claim in [self.root / CROPS_CLAIM, *_found(self.root, ONE_CLAIM, f"{RANGES}/{layout.CLAIMS}")]:
            if holder := self._observer.holder_of(claim):
                of_part = held.setdefault(part_of(self.root, claim), {})
                of_part[holder] = of_part.get(holder, False) or not claim.parent.name.endswith(layout.CLAIMS_SUFFIX)
        return held

    def without_busy(self, findings: list[Finding]) -> Iterator[Finding]:
        """`findings`, with one in the place of all that cannot be judged because somebody wrote there."""
        held = self._held()
        _, after = self._look()
        changed = {part_of(self.root, path) for path, _ in self._before.items() ^ after.items()}
        for part in sorted(changed | held.keys() | self._holders.keys()):
            yield self._explained(part, held.get(part, {}))
        for finding in findings:
            part = part_of(self.root, finding.path)
            writers = self._holders.get(part, {}) | held.get(part, {})
            is_busy = part in changed or bool(writers)
            if not is_busy or (self._is_shard(finding) and not any(writers.values())):
                yield finding

    def _is_shard(self, finding: Finding) -> bool:
        """Whether this is about the file of a finished shard: it is so whoever works beside it (store_check.py)."""
        inner = Path(finding.path).relative_to(self.root).parts[2:]
        return finding.kind == "damaged" and len(inner) > 1 and inner[0] in ROW_ARRAYS and is_shard_file(inner[-1])

    def _explained(self, part: str, now: dict[str, bool]) -> Finding:
        where, what = self.root / part, "its lists and crops" if part == WHOLE else "it"
        if now:
            who = " and ".join(now)
            message = f"{who} {'is' if len(now) == 1 else 'are'} at work on {what}. Run verify again when that is done."
        elif part in self._holders:
            who = " and ".join(self._holders[part])
            message = f"{who} was at work on {what} while it was checked, and is done. Run verify again."
        else:
            who, message = "a writer", f"somebody wrote to {what} while it was checked. Run verify again."
        return Finding("unfinished", str(where), message, who)


def _found(folder: Path, *patterns: str) -> list[Path]:
    """What these patterns find in `folder`; again where a folder went away in the midst of it, at which glob raises."""
    while True:
        try:
            return [path for pattern in patterns for path in folder.glob(pattern)]
        except FileNotFoundError:
            if not folder.is_dir():
                return []


def left_claims(root: Path) -> Iterator[Finding]:
    """Claims that nobody holds: their processes were killed. And what failed beside them."""
    for claim in [root / CROPS_CLAIM, *_found(root, ONE_CLAIM, RANGES)]:
        is_of_shards = claim.suffix == layout.CLAIMS_SUFFIX
        claims = _found(claim, layout.CLAIMS) if is_of_shards else [claim]
        failed = failures.read(claim.with_suffix("")) if is_of_shards else []
        if claim.exists() and not any(map(holder_of, claims)) and (claims or not failed):
            yield Finding("unfinished", str(claim), "a writer was killed. Run the same command again.")
        for failure in {failure.shard: failure for failure in failed}.values():
            said = f"shards {failure.shard}:{failure.shard + 1} failed: {failure.error} ({failure.at}, on host {failure.host})"
            yield Finding("unfinished", str(claim), f"{said}. Mend that, and run the same command again.")
