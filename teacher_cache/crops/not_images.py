"""What somebody gave in the place of a folder of images: archives, data sets packed into files. In words, with what to do.

Nothing is unpacked, and nothing opened but the first names in one tar.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..words import quoted

ARCHIVES = {
    (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"): "mkdir DIR && tar -xf {} -C DIR",
    (".zip",): "unzip {} -d DIR",
    (".7z",): "7z x {} -oDIR",
    (".rar",): "unrar x {} DIR/",
}
PACKED = {
    (".parquet", ".arrow", ".feather"): "tables",
    (".tfrecord", ".tfrecords", ".tfrec"): "TFRecords",
    (".beton",): "data of FFCV",
    (".mdb", ".lmdb"): "data of LMDB",
    (".h5", ".hdf5"): "data of HDF5",
    (".npz", ".npy"): "arrays of numpy",
    (".rec",): "data of MXNet",
    (".mds", ".mds.zstd"): "shards of MosaicML Streaming",
    (".pkl", ".pickle"): "pickles",
}
AS_FILES = "write the images that are in it to a folder, a file each, in class folders if they have labels, and give that"
LOOKED_AT = 8
"""Members of a tar whose names are looked at."""


def what_it_is(path: Path, files: Sequence[str] = ()) -> str | None:
    """What stands at `path`, a file or a folder without images, and what to do; None if that is not known.

    files: names of the files in the folder, relative to it.
    """
    if not path.is_dir():
        return _of_file(path)
    for endings, unpack in ARCHIVES.items():
        found = sorted(name for name in files if name.lower().endswith(endings))
        if found:
            return _of_archives(path, found, unpack)
    for endings, kind in PACKED.items():
        found = sorted(name for name in files if name.lower().endswith(endings))
        if found:
            return f"It holds {kind} ({len(found):,} files, e.g. {found[0]!r}), which are not read: {AS_FILES}."
    if any(".tfrecord-" in name or re.search(r"-\d+-of-\d+$", name) for name in files):
        return f"It holds TFRecords, which are not read: {AS_FILES}."
    return None


def _of_file(path: Path) -> str:
    name = path.name.lower()
    for endings, unpack in ARCHIVES.items():
        if name.endswith(endings):
            return f"is an archive, not a folder. Unpack it and give that: {unpack.format(quoted(path))}"
    for endings, kind in PACKED.items():
        if name.endswith(endings):
            return f"is a file, not a folder: {kind}, which are not read. It takes a folder: {AS_FILES}."
    return "is a file, not a folder. Give a folder of class folders with images, or of images."


def _of_archives(folder: Path, found: list[str], unpack: str) -> str:
    first = found[0]
    if _is_webdataset(folder / first):
        return (
            f"It holds shards of a webdataset ({len(found):,} files, e.g. {first!r}), images and labels side by side, which are "
            f"not read: {AS_FILES}."
        )
    path = quoted(folder / first)
    if len(found) == 1:
        return f"It holds an archive. Unpack it and give the folder: {unpack.format(path)}"
    one = unpack.replace("mkdir", "mkdir -p").replace("DIR", f"DIR/{quoted(PurePosixPath(first).name.partition('.')[0])}")
    return (
        f"It holds {len(found):,} archives. Unpack each into a folder of its own, which becomes a class, and give the folder "
        f"around them. The first: {one.format(path)}"
    )


def _is_webdataset(path: Path) -> bool:
    """Whether a tar begins as webdataset's do: several files of one name with different endings."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with tarfile.open(path) as tar:
            members = [PurePosixPath(member.name) for member, _ in zip(tar, range(LOOKED_AT), strict=False) if member.isfile()]
    except (OSError, EOFError, tarfile.TarError):
        return False
    stems = [str(member.parent / member.name.split(".")[0]) for member in members]
    return len(set(stems)) < len(stems)
