"""What to do about what verify found: the commands that mend it, or a sentence where none does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import CacheCorruptError, TeacherCacheError
from ..files.durable import ASIDE
from ..format import layout
from ..format.layout import store_folder, store_name, view_number
from ..store.manifest import extract_command, manifest_of
from ..store.spare import BOTH_LOST
from ..store.store import is_complete
from ..words import quoted
from .findings import Finding
from .small_files import SmallFiles


def when_lost(folder: Path, kind: str) -> str:
    """BOTH_LOST, for a store with the commands."""
    if kind != "store":
        return BOTH_LOST[kind]
    command = _extract_command(folder.parent.parent, store_name(folder.name))
    return f"{BOTH_LOST[kind]} rm -r {quoted(folder)} && {command}"


def mending_commands(cache_dir: Path, findings: Sequence[Finding], images: str = "DIR") -> list[str]:
    """What to type to mend what was found, in that order; nothing for what no command mends, or a writer is at work on.

    images: where the originals are.
    """
    at_work = {Path(f.path).relative_to(cache_dir).parts[1:] for f in findings if f.holder is not None}
    found = [(Path(f.path).relative_to(cache_dir).parts, f.kind) for f in findings if f.holder is None]
    damaged, unfinished = ([parts for parts, kind in found if kind == wanted] for wanted in ("damaged", "unfinished"))
    views = sorted(path for path in cache_dir.glob(layout.VIEWS) if path.is_dir() and path.suffix != ASIDE)
    if _is_lost(cache_dir, "cache") or any(_is_lost(view, "view") for view in views):
        return []  # every repair begins with these, and refuses
    cache, originals = quoted(cache_dir), quoted(images)

    commands = []
    of_crops = [parts for parts in damaged if not _is_of_store(parts)]
    if of_crops:
        with_images = f" --images {originals}" if any(parts[-1:] == (layout.CROPS_BETON,) for parts in of_crops) else ""
        commands.append(f"teacher-cache crop --repair{with_images} {cache}")
    new_views = [parts[0] for parts in unfinished if len(parts) == 1 and view_number(parts[0]) is not None]
    if new_views and () not in at_work:
        numbers = map(view_number, (*new_views, *(path.name for path in views)))
        n_views = 1 + max(number for number in numbers if number is not None)
        commands.append(f"teacher-cache crop --images {originals} --views {n_views} {cache}")
    for name in dict.fromkeys(store_name(parts[1]) for parts in (*damaged, *unfinished) if _is_of_store(parts)):
        if (store_folder(name),) in at_work or any(_is_lost(view / store_folder(name), "store") for view in views):
            continue
        command = _extract_command(cache_dir, name)
        repair = any(_is_of_store(parts) and parts[1] == store_folder(name) for parts in damaged)
        words = command.split(" ", 2)
        commands.append(" ".join([*words[:2], "--repair", *words[2:]]) if repair else command)
    return commands


def _is_of_store(parts: tuple[str, ...]) -> bool:
    return len(parts) > 1 and parts[1].endswith(layout.STORE_SUFFIX)


def _is_lost(folder: Path, kind: str) -> bool:
    """Whether a small file of a folder that is there is lost in both copies, so that repair refuses."""
    if not folder.is_dir():
        return False
    try:
        has_list = kind != "store" or is_complete(folder) or (folder / layout.COMMITS).exists()
        files = SmallFiles(folder, kind)
        return bool(files.lost) or not (has_list or layout.COMPLETE_JSON in files.wrong)
    except CacheCorruptError:  # a link that leads out; repair refuses it too
        return True


def _extract_command(cache_dir: Path, name: str) -> str:
    """The command that extracts a store, from the first view whose manifest of it is sound in either copy."""
    for store in layout.stores_named(cache_dir, name):
        try:
            root = SmallFiles(store, "store").sound(layout.ZARR_JSON)
            if root is not None:
                return extract_command(cache_dir, name, manifest_of(root, store / layout.ZARR_JSON))
        except (TeacherCacheError, OSError):
            continue
    return f"teacher-cache extract --teacher TEACHER --weights WEIGHTS --name {name} {quoted(cache_dir)}"
