"""The store that a page or a picture is about."""

from __future__ import annotations

from teacher_cache.cache import View
from teacher_cache.errors import NotInCacheError, UnknownNameError, UsageError
from teacher_cache.store.manifest import store_file_name
from teacher_cache.store.reader import StoreReader
from teacher_cache.words import quoted


def open_store(view: View, name: str | None) -> StoreReader:
    """The store of a teacher in a view; None takes the only one. Errors say which there are."""
    known = view.store_names()
    if not known:
        raise NotInCacheError(
            f"View {view.number} of {view.cache.path} has crops, but no targets yet. Make them: "
            f"teacher-cache extract --teacher NAME {quoted(view.cache.path)}"
        )
    if name is None and len(known) > 1:
        raise UsageError(f"View {view.number} of {view.cache.path} has targets of {', '.join(known)}. Choose with --teacher.")
    chosen = known[0] if name is None else store_file_name(name)
    if chosen not in known:
        raise UnknownNameError(
            f"View {view.number} of {view.cache.path} has no targets of {name}; it has those of {', '.join(known)}."
        )
    reader = StoreReader(view.store_path(chosen))
    view.require_own(reader.manifest)
    return reader
