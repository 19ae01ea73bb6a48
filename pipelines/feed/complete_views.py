"""Which views of a cache can be trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from teacher_cache.cache import Cache, View
from teacher_cache.errors import CacheCorruptError, NotInCacheError
from teacher_cache.store.manifest import extract_command
from teacher_cache.store.reader import StoreReader
from teacher_cache.words import quoted


def complete_views(cache: Cache, store_names: Sequence[str], n_views: int | None) -> list[View]:
    """The views to train on: the first `n_views`, by default all. Each must be whole, with its stores.

    Raises NotInCacheError that gives the numbers and the command that mends it.
    """
    present = cache.views()
    wanted = n_views or len(present)
    if not present or wanted > len(present):
        raise NotInCacheError(
            f"{cache.path} has {len(present)} finished views, {wanted} are asked for. Make them: "
            f"teacher-cache crop --images DIR --views {wanted} {quoted(cache.path)}"
        )
    views, shared = present[:wanted], {}
    for view, store_name in itertools.product(views, store_names):
        if store_name not in view.store_names():
            names = view.store_names()
            raise NotInCacheError(
                f"View {view.number} of {cache.path} has no targets of {store_name}; it has {', '.join(names) or 'none'}. "
                + _how_to_make(views, store_name)
            )
        reader = StoreReader(view.store_path(store_name))
        if not reader.is_complete:
            rows = sum(len(reader.spec.rows_of(int(shard))) for shard in np.flatnonzero(reader.finished))
            raise NotInCacheError(
                f"View {view.number} of {cache.path} is not complete: {rows:,} of {len(reader):,} rows of {store_name} are "
                f"there. Finish it: {extract_command(cache.path, store_name, reader.manifest)}"
            )
        view.require_own(reader.manifest)
        if reader.store.shared_sha256 != shared.setdefault(store_name, reader.store.shared_sha256):  # of the first view
            raise CacheCorruptError(
                f"View {view.number} of {cache.path} has targets of {store_name} that were quantised otherwise than view "
                f"{views[0].number}'s. Delete {reader.path} and extract it again."
            )
    return views


def _how_to_make(views: list[View], store_name: str) -> str:
    """What to do about a view that lacks a store, as a sentence."""
    having = [view for view in views if store_name in view.store_names()]
    if having:
        command = extract_command(views[0].cache.path, store_name, having[0].store(store_name).manifest)
        return f"Make them: {command}; or train on fewer views: --views {len(having)}."
    command = f"teacher-cache extract --teacher NAME --weights PATH --name {quoted(store_name)} {quoted(views[0].cache.path)}"
    return f"Make them: {command}; or choose one with --teacher."
