"""A check of a whole cache: every byte against its checksum and, if they are given, what is stored against originals and teacher.

What the command verify does; verify.py is its first part, remake.py the second.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..crops.images import require_folder
from ..errors import UsageError
from ..extraction.make import tell_new
from .advice import mending_commands
from .findings import Checked, Finding
from .remake import DEFAULT_ROWS, cut_views_again, load_teacher_of, new_in_folder, teach_views_again
from .verify import open_cache, verify


@dataclass(frozen=True)
class Check:
    """What came of it."""

    findings: list[Finding]
    """None: the cache is sound and complete."""
    checked: Checked
    crops_id: str | None
    """Of the cache; None where it cannot be opened."""
    mending: list[str]
    """The commands that mend what was found, in that order."""


def check(path: str | os.PathLike, *, sample: int | None = None, images: str | os.PathLike | None = None,
          weights: str | None = None, teacher: str | None = None) -> Check:  # fmt: skip
    """Check the cache at `path`.

    sample: of each store and of the crops of each view only so many rows, drawn at random. [default: all, and 64 of what follows]
    images: the originals, of which that many crops are cut again.  weights: of the teacher, which is run on that many rows: a
    file, `random:SEED` or `built-in`.  teacher: the store that they belong to, if there are several.
    Raises UsageError where there is no cache or these do not belong to it, BadInputError for one of another format version.
    """
    path = Path(path)
    if images is not None:
        require_folder(images := Path(images))
    if teacher is not None and weights is None:
        raise UsageError("--teacher chooses a store for --weights: give both.")
    opened, findings = open_cache(path)
    checked = Checked(len(findings))
    if opened is not None:
        store, loaded = load_teacher_of(opened, weights, teacher) if weights else (None, None)
        findings, checked = verify(opened, sample)
        if images is not None:
            tell_new(images, new_in_folder(opened, images))
            findings += cut_views_again(opened, images, sample or DEFAULT_ROWS, checked)
        if loaded is not None:
            findings += teach_views_again(opened, loaded, store, sample or DEFAULT_ROWS, checked)
    mending = mending_commands(path, findings, str(images or "DIR"))
    return Check(findings, checked, opened.crops_id if opened else None, mending)
