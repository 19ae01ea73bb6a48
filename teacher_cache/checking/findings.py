"""What a check of a cache comes to: what is wrong with which file, and how much was looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..words import human


@dataclass(frozen=True)
class Finding:
    """What was found out about one file or folder."""

    kind: str
    """`damaged`; `unfinished`: not all there yet; `unknown`: nothing that this program wrote; `foreign`: sound, but this machine
    decodes it to other pixels than the teacher saw; `unchecked`: a comparison that was asked for and cannot be made (remake.py),
    or a file that this user may not read;
    `sound` while a check is at work."""
    path: str
    message: str
    holder: str | None = None
    """Who is, or was, writing there while it was checked; such a thing is `unfinished` and needs no mending."""


@dataclass
class Checked:
    """How much was checked."""

    n_files: int = 0
    n_bytes: int | None = None
    """Bytes of these files; None where of the large ones only a sample was read."""
    rows: dict[str, int] = field(default_factory=dict)
    """`view-000/crops.beton`, `view-000/clip-b16.zarr` -> rows whose bytes were compared with their checksums."""
    again: dict[str, int] = field(default_factory=dict)
    """The same -> rows that were made again from the originals, or by the teacher (remake.py)."""
    not_made: dict[str, str] = field(default_factory=dict)
    """The same -> a check that was left out here, and what installs what it needs."""

    def in_words(self) -> list[str]:
        """The files, a line; then the rows, a line for each view's crops and for each of its stores."""
        size = "" if self.n_bytes is None else f", {human(self.n_bytes)}"
        lines = [f"{self.n_files:,} file{'s' * (self.n_files != 1)}{size}"]
        width = max(map(len, self.rows), default=0)
        for what in dict.fromkeys([*self.rows, *self.again]):
            made = "cut" if what.endswith(".beton") else "taught"
            again = f", {self.again[what]:,} {made} again" if what in self.again else ""
            lines.append(f"{what:<{width}}  {self.rows.get(what, 0):,} rows{again}")
        return [*lines, *(f"{what:<{width}}  not made: {why}" for what, why in self.not_made.items())]


def judge(path: Path, wrong: str | None) -> Finding:
    """`damaged` if there is something wrong with a file, else `sound`."""
    return Finding("damaged" if wrong else "sound", str(path), wrong or "")


def without(path: Path, error: Exception) -> str:
    """An error's text without the path in front, which the finding names."""
    return str(error).removeprefix(f"{path}: ")
