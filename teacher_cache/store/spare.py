"""spare.tar: a second copy of the small files of a folder, so that a few damaged kilobytes do not cost terabytes.

A cache, each of its views and each store has one: of the lists and cache.json; of crops.npy and checksums.json; of everything in
a store that is no shard. It is an uncompressed tar with nothing in it that depends on when or by whom it was written, so that
"it holds what lies beside it" is a comparison of bytes. Readers do not need it. It does not help against a lost disk.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

from ..errors import CacheCorruptError
from ..files.durable import inside, is_safe_name, listed_files, read_plain, read_sealed, write_whole
from ..format import layout

DECLARING = (layout.CACHE_JSON, layout.CHECKSUMS_JSON, layout.STORE_JSON)
"""Of a cache, a view, a store: the sealed file that lists the small files beside it."""
_MEND = "Run the same teacher-cache command with --repair."
BOTH_LOST = {
    "cache": "Restore it from a backup. Without one, move the views out of the way, run teacher-cache crop with the same images "
    "and options, and move the stores (*.zarr) into the new views: equal originals give equal crops.",
    "view": "Restore it from a backup. Without one, move the stores (*.zarr) out of this folder, delete it, run teacher-cache "
    "crop with the same images, and move the stores back: equal originals give equal crops.",
    "store": "Restore it from a backup. Without one, delete the store and extract it again:",
}
"""Kind of folder -> what to do when a small file of it and its second copy are damaged."""
MAX_SPARE = 8 << 30
"""Bytes. The largest small file is crops.npy: 77 MB for 1.28 M images."""


def spare_names(folder: Path) -> list[str]:
    """Names of the small files of a cache, view or store that belong in its spare, sorted.

    Raises CacheCorruptError if the sealed files that list them are missing or damaged.
    """
    return sorted(_recorded(folder))


def _recorded(folder: Path) -> dict[str, str | None]:
    """Name -> recorded SHA-256 of the small files of a folder; None for sealed ones, which have just been checked."""
    declaring = next((folder / name for name in DECLARING if (folder / name).exists()), None)
    if declaring is None:
        raise CacheCorruptError(f"{folder}: has none of {', '.join(DECLARING)}. {_MEND}")
    recorded = {declaring.name: None, **listed_files(read_sealed(declaring), declaring)}
    if declaring.name == layout.STORE_JSON and (folder / layout.COMPLETE_JSON).exists():
        complete = read_sealed(folder / layout.COMPLETE_JSON)
        recorded |= {layout.COMPLETE_JSON: None, layout.SHARDS_NPY: str(complete.get("shards_sha256"))}
    return recorded


def _read(folder: Path, name: str) -> bytes:
    try:
        return read_plain(inside(folder, name), MAX_SPARE)
    except FileNotFoundError:
        raise CacheCorruptError(f"{folder / name}: is missing. {_MEND}") from None


def pack_members(members: dict[str, bytes]) -> bytes:
    """The spare that holds these files, by name: ustar, sorted, all that tar records of time and owner zero."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(members.items()):
            member = tarfile.TarInfo(name)  # regular file, mode 644, owner and time 0
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def pack(folder: Path, names: list[str]) -> bytes:
    """The spare of the files `names` as they lie in `folder`."""
    return pack_members({name: _read(folder, name) for name in names})


def write_spare(folder: Path, names: list[str] | None = None) -> None:
    """Write the spare of a folder, by default of all its small files.

    Raises CacheCorruptError, and leaves the old spare, if one of them is not as recorded: damage must not reach the second copy.
    """
    recorded = _recorded(folder)
    members = {name: _read(folder, name) for name in names or recorded}
    for name, data in members.items():
        if recorded[name] is not None and hashlib.sha256(data).hexdigest() != recorded[name]:
            raise CacheCorruptError(f"{folder / name}: its SHA-256 is not the recorded one. {_MEND}")
    write_whole(folder / layout.SPARE, pack_members(members))


def is_current(folder: Path) -> bool:
    """Whether spare.tar holds the small files of `folder` as they are, and nothing else.

    Raises CacheCorruptError if one of these is missing, or the file that lists them is damaged.
    """
    expected = pack(folder, spare_names(folder))
    try:
        found = read_plain(folder / layout.SPARE, len(expected))
    except (FileNotFoundError, CacheCorruptError):  # too long, or no plain file
        return False
    return found == expected


def read_spare(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file in the spare of `folder`, as far as it can be read; what they should be is for others to say.

    Raises FileNotFoundError if there is none; CacheCorruptError if it is no tar of plain files, or a name in it leads out of the
    folder.
    """
    path = folder / layout.SPARE
    data, members = read_plain(path, MAX_SPARE), {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                # sparse members may claim any size; links and devices are none of ours
                if member.type != tarfile.REGTYPE or member.sparse is not None or not is_safe_name(member.name):
                    raise CacheCorruptError(f"{path}: {member.name!r} is no small file of a cache.")
                if "/" in member.name:
                    inside(folder, member.name.rpartition("/")[0])  # the file itself may be a link; it is written over
                members[member.name] = tar.extractfile(member).read()
    except CacheCorruptError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
        raise CacheCorruptError(f"{path}: cannot be read as a tar ({error}).") from error
    if not members:
        raise CacheCorruptError(f"{path}: holds no files.")
    return members
