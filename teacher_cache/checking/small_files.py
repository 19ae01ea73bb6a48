"""The small files of a folder of a cache, of which there are two copies: the file itself and its member in spare.tar. Which are
sound?

Sealed JSON vouches for itself and, by their SHA-256, for the other small files beside it. verify.py tells what is found here;
repair.py writes the sound copy over the other one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ..errors import CacheCorruptError
from ..files.durable import inside, is_sha256, link_fault, listed_files, read_sealed, sha256_file, unseal
from ..format import layout
from ..format.layout import SPARE
from ..store.spare import is_current, pack_members, read_spare

SEALED = {
    "cache": (layout.CACHE_JSON,),
    "view": (layout.CHECKSUMS_JSON,),
    "store": (layout.STORE_JSON, layout.COMPLETE_JSON),
}
"""Kind of folder -> its sealed files. complete.json is there once all shards are."""


class SmallFiles:
    """What is recorded of the small files of one folder, and which of them are not as recorded."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.names: list[str] = []
        """All that should be there, as far as a sound sealed file says so."""
        self.wrong: dict[str, str] = {}
        """Of files that are damaged or missing: what is wrong, without the name."""
        self._is_sound: dict[str, Callable[[bytes], bool]] = {}
        for name in SEALED[kind]:
            if name != layout.COMPLETE_JSON or self._is_complete():
                self._judge_sealed(name)

    def _is_complete(self) -> bool:
        """Whether a store was declared complete. A spare that has complete.json means that the store has lost its own."""
        return (self.folder / layout.COMPLETE_JSON).exists() or layout.COMPLETE_JSON in self._spare

    def _judge_sealed(self, name: str) -> None:
        self.names.append(name)
        self._is_sound[name] = lambda data: _is_sealed(data, self.folder / name)
        if wrong := link_fault(self.folder / name):
            self.wrong[name] = wrong
        try:
            listed = {} if wrong else _listed(read_sealed(self.folder / name), self.folder / name)
        except FileNotFoundError:
            self.wrong[name] = "is missing."
        except CacheCorruptError as error:
            self.wrong[name] = str(error).removeprefix(f"{self.folder / name}: ")
        if name in self.wrong:
            data = self.sound(name)
            if data is None:
                return  # what it vouches for is not known
            listed = _listed(unseal(data, SPARE), self.folder / name)
        for other, sha256 in listed.items():
            self._judge_listed(other, sha256)

    def _judge_listed(self, name: str, sha256: str) -> None:
        self.names.append(name)
        self._is_sound[name] = lambda data: hashlib.sha256(data).hexdigest() == sha256
        path = self.folder / name
        if wrong := link_fault(path):
            self.wrong[name] = wrong
        elif not inside(self.folder, name).is_file():
            self.wrong[name] = "is missing."
        elif sha256_file(path) != sha256:
            self.wrong[name] = "its SHA-256 is not the recorded one."

    @cached_property
    def _spare(self) -> dict[str, bytes]:
        """Members of spare.tar, sound or not; none if it cannot be read."""
        try:
            return read_spare(self.folder)
        except (CacheCorruptError, FileNotFoundError):
            return {}

    def sound(self, name: str) -> bytes | None:
        """The bytes of a small file as they were written, from whichever copy is sound; None if neither is."""
        if name not in self.wrong:
            return (self.folder / name).read_bytes()
        data = self._spare.get(name)
        return data if data is not None and self._is_sound[name](data) else None

    @property
    def lost(self) -> list[str]:
        """Names of which neither copy is sound."""
        return [name for name in self.wrong if self.sound(name) is None]

    def spare_fault(self) -> str | None:
        """What is wrong with spare.tar, a sentence without its name; None if nothing is."""
        path = self.folder / SPARE
        if wrong := link_fault(path):
            return wrong
        if not path.is_file():
            return "is missing."
        if self.lost:
            return "does not hold a sound copy of every small file beside it."
        if self.wrong:
            is_right = path.read_bytes() == pack_members({name: self.sound(name) for name in self.names})
        else:
            is_right = is_current(self.folder)
        return None if is_right else "does not hold the small files beside it as they are."


def _is_sealed(data: bytes, path: Path) -> bool:
    try:
        _listed(unseal(data, path), path)
    except CacheCorruptError:
        return False
    return True


def _listed(value: dict, path: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that a sealed file vouches for; CacheCorruptError if it is none that does."""
    if path.name != layout.COMPLETE_JSON:
        return listed_files(value, path)
    if not is_sha256(value.get("shards_sha256")):
        raise CacheCorruptError(f"{path}: does not give the SHA-256 of shards.npy.")
    return {layout.SHARDS_NPY: value["shards_sha256"]}
