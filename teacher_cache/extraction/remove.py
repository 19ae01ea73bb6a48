"""Taking out of a cache what was made: a view, or a teacher's targets.

What goes is first renamed aside, to a name that nothing reads (durable.ASIDE), and then deleted. Killed anywhere, each folder is
there as a whole or left over under such a name; the same removal, or the next writer of that folder, deletes what is left.

Views are numbered, and crops are drawn by the number; epoch e of a run reads view e mod V. So only the last view can go, and only
the last view that has a store can lose it: a gap would make the views behind it useless.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..cache import Cache, View
from ..errors import MismatchError, NotInCacheError, UnknownNameError, UsageError
from ..files.claims import ClaimHeldError, claimed, holder_of, taking_over
from ..files.durable import ASIDE, clear_aside, link_fault, publish, remove_folder
from ..files.range_claims import claimed_range
from ..format.layout import (
    CLAIMS,
    CROPS_CLAIM,
    RANGE_CLAIMS,
    WORK,
    owning_store,
    store_claim,
    store_claims,
    store_file_name,
    store_name,
)
from ..words import human, quoted
from .parts import is_left_over


@dataclass(frozen=True)
class Removal:
    """What is going to be removed. Nothing is before `carry_out`."""

    cache: Cache
    what: str
    """In words."""
    view: View | None
    """The view that goes as a whole; None: stores go."""
    stores: tuple[Path, ...]
    """The stores that go, or that a view has; of several views the last in front."""
    n_bytes: int
    asked: tuple[int | None, str | None]
    """Number of the view and name of the store, as they were given."""

    def in_words(self) -> list[str]:
        """What is going to happen, a line each."""
        return [
            f"remove   {self.what}: {human(self.n_bytes)}",
            "         A run that reads it now will fail, and one that has trained from it can no longer be resumed: "
            "student-train refuses to go on with other batches.",
        ]

    def carry_out(self) -> None:
        """Remove it, holding the claims that its writers hold.

        Raises ClaimHeldError, and has removed nothing, if somebody writes there.
        """
        if self.view is not None:
            self._remove_view(self.view)
            return
        with ExitStack() as held:
            for store in self.stores:
                held.enter_context(_store_claimed(store, self.cache.n_images))
            self._require_unchanged()
            for store in self.stores:
                _remove(store)

    def _require_unchanged(self) -> None:
        """Raise MismatchError if what would go is no longer what was said. To be asked when nobody else writes."""
        if plan_removal(self.cache, *self.asked).what != self.what:
            raise MismatchError(f"{self.cache.path} has changed since it was looked at. Run the same command again.")

    def _remove_view(self, view: View) -> None:
        with claimed(self.cache.path / CROPS_CLAIM, f"The crop stage of {self.cache.path}"):
            if is_left_over(self.cache.path):
                remove_folder(self.cache.path / WORK)
            with ExitStack() as held:  # nobody writes there; the claims of the dead go
                for store in self.stores:
                    held.enter_context(_store_claimed(store, self.cache.n_images))
                self._require_unchanged()
            _remove(view.path)


def remove_view(cache: Cache | str | os.PathLike, number: int, take_over: bool = False) -> int:
    """Remove a view with all that is in it; returns the bytes that were. Runs that trained from it can no longer be resumed.

    take_over: whoever holds it is gone; do not watch its claim for minutes first.
    Raises UsageError for any but the last of several views, NotInCacheError for one that is not there, ClaimHeldError if
    somebody writes there.
    """
    with taking_over(take_over):
        removal = plan_removal(_opened(cache), view=number)
        removal.carry_out()
    return removal.n_bytes


def remove_store(cache: Cache | str | os.PathLike, name: str, view: int | None = None, take_over: bool = False) -> int:
    """Remove a teacher's targets from every view, or from view `view` alone; returns the bytes that were. As `remove_view`."""
    with taking_over(take_over):
        removal = plan_removal(_opened(cache), view=view, store=name)
        removal.carry_out()
    return removal.n_bytes


def plan_removal(cache: Cache, view: int | None = None, store: str | None = None) -> Removal:
    """Find out what a removal takes away: a view with all its stores, a store of all views, or a store of one view.

    Also what an interrupted removal left of it. Raises as `remove_view` does.
    """
    views = {view.number: view for view in cache.views_on_disk()}
    if store is not None:
        return _plan_store(cache, views, store_file_name(store), view)
    if view is None:
        raise UsageError("Say what to remove: --view N, --store NAME, or both for the store of one view.")
    return _plan_view(cache, views, view)


def _plan_view(cache: Cache, views: dict[int, View], number: int) -> Removal:
    view = views.get(number) or cache.view(number)
    if number not in views and not _left_of(view.path):
        raise NotInCacheError(f"{cache.path} has no view {number}; it has {', '.join(map(str, views))}.")
    if number in views and len(views) == 1:
        raise UsageError(
            f"View {number} is the only one of {cache.path}: without it there is no cache. To remove all of it: "
            f"rm -r {quoted(cache.path)}"
        )
    if number in views and number != max(views):
        raise UsageError(
            f"View {number} of {cache.path} is not the last one. Views are numbered, and a run takes them in turn: behind a gap "
            f"none can be used. The last one is --view {max(views)}."
        )
    if (cache.path / WORK).exists() and not is_left_over(cache.path):
        raise UsageError(
            f"{cache.path / WORK} is a crop stage that was begun and not finished. Finish it by the same teacher-cache crop "
            "command, or delete that folder, before a view is removed."
        )
    folders = sorted({folder for entry in _entries(view.path) if (folder := owning_store(entry.name))})
    stores = [store_name(folder) for folder in folders if (view.path / folder).exists()]
    n_bytes = _bytes(view.path, *_left_of(view.path))
    with_targets = f" and its targets of {', '.join(stores)}" if stores else ""
    what = f"view {number} of {cache.path}: its crops{with_targets}" if number in views else f"what was left of view {number}"
    return Removal(cache, what, view, tuple(view.path / folder for folder in folders), n_bytes, (number, None))


def _plan_store(cache: Cache, views: dict[int, View], name: str, number: int | None) -> Removal:
    if number is not None and number not in views:
        raise NotInCacheError(f"{cache.path} has no view {number}; it has {', '.join(map(str, views))}.")
    asked = {n: view.store_path(name) for n, view in views.items() if number in (None, n)}
    there = {n: store for n, store in asked.items() if os.path.lexists(store)}
    for store in there.values():
        if wrong := link_fault(store):
            raise UsageError(f"{store} {wrong.partition('.')[0]}. Nothing is removed through it; remove the link by hand.")
    if not there and not any(map(_left_of, asked.values())):
        known = sorted({known for n, view in views.items() if number in (None, n) for known in view.store_names()})
        where = cache.path if number is None else f"View {number} of {cache.path}"
        raise UnknownNameError(f"{where} has no store {name}; it has {', '.join(known) or 'none'}.")
    having = [n for n, view in views.items() if view.store_path(name).exists()]
    if number in having and number != max(having):
        raise UsageError(
            f"View {max(having)} of {cache.path} has targets of {name} too, and a run takes the views in turn: without those of "
            f"view {number} these could not be used. Give --view {max(having)}, or leave --view out to remove all of {name}."
        )
    n_bytes = sum(_bytes(store, *_left_of(store)) for store in asked.values())
    numbers = ", ".join(map(str, sorted(there)))
    what = f"the targets of {name} in view{'s' * (len(there) > 1)} {numbers} of {cache.path}"
    return Removal(cache, what if there else f"what was left of the targets of {name}", None,
                   tuple(asked[n] for n in sorted(asked, reverse=True)), n_bytes, (number, name))  # fmt: skip


def _opened(cache: Cache | str | os.PathLike) -> Cache:
    return cache if isinstance(cache, Cache) else Cache(Path(cache))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _left_of(path: Path) -> list[Path]:
    """What an interrupted removal, or another writer, has left of a folder under names that nothing reads."""
    left = re.compile(rf"{re.escape(path.name)}(\.[0-9a-f]{{16}})?{re.escape(ASIDE)}")
    return [entry for entry in _entries(path.parent) if left.fullmatch(entry.name)]


def _bytes(*folders: Path) -> int:
    """Of all files below these folders; links are not followed."""
    n_bytes = 0
    for file in (Path(folder, name) for top in folders for folder, _, names in os.walk(top) for name in names):
        with suppress(FileNotFoundError):  # a writer's, which the claims tell of
            n_bytes += file.lstat().st_size
    return n_bytes


@contextmanager
def _store_claimed(store: Path, n_rows: int) -> Iterator[None]:
    """Hold all that a writer of a store can hold. n_rows: no store has more shards. Nothing, where there is no such view."""
    if not store.parent.is_dir():
        yield
        return
    what = f"The store {store}"
    with claimed(store_claim(store), what), claimed_range(store_claims(store), 0, n_rows, what):
        yield


def _remove(folder: Path) -> None:
    """Rename a folder aside, if it is there, and delete it, with all that was left aside before."""
    aside = clear_aside(folder)
    if not folder.exists():
        return
    publish(folder, aside)
    if holder := _holder_in(aside):
        publish(aside, folder)
        raise ClaimHeldError(f"{folder} is being written by {holder}. Wait for it, or stop it and try again.", holder)
    remove_folder(aside)


def _holder_in(folder: Path) -> str | None:
    """Who began to write in a folder before it was renamed, in words; None if nobody did."""
    claims = [claim for pattern in (CLAIMS, f"{RANGE_CLAIMS}/{CLAIMS}") for claim in folder.glob(pattern)]
    return next(filter(None, map(holder_of, claims)), None)
