"""Is a view what was written: its small files, and crops.beton with every crop in it?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..cache import View
from ..crops.beton import CropReader, read_checksums, tables_sha256
from ..errors import CacheCorruptError, MismatchError
from ..files.durable import crc32c
from ..format import layout
from ..terminal.extras import extras_for, install_command
from .findings import Checked, Finding, judge, without
from .policy import check_small_files, check_spare, draw_rows, in_threads
from .small_files import SmallFiles

BLOCK = 4 << 20  # bytes of crops that a thread reads at a time


def check_view(view: View, labels: np.ndarray | None, sample: int | None, draws: np.random.Generator, checked: Checked
               ) -> Iterator[Finding]:  # fmt: skip
    """The small files of a view, and crops.beton: its length, tables, labels, every crop, and how this machine decodes it."""
    files, beton = SmallFiles(view.path, "view"), view.path / layout.CROPS_BETON
    yield from check_small_files(files)
    yield check_spare(files)
    if files.wrong:
        yield judge(beton, "its crops were not checked: they need a sound crops.npy and checksums.json.")
        return
    sums = read_checksums(view.path)
    if sums["crops_id"] != view.cache.crops_id:
        names = f"names crops {sums['crops_id'][:12]}, the cache is {view.cache.crops_id[:12]}."
        yield judge(view.path / layout.CHECKSUMS_JSON, names)
    if not beton.is_file():
        yield judge(beton, "is missing.")
    elif beton.stat().st_size != sums[layout.CROPS_BETON]["bytes"]:
        yield judge(beton, f"has {beton.stat().st_size} bytes, {sums[layout.CROPS_BETON]['bytes']} were written.")
    elif not has_tables(beton, sums[layout.CROPS_BETON]["tables_sha256"]):
        yield judge(beton, "its tables or padding are not those that were written.")
    else:
        yield _crops(view, labels, sample, draws, checked)


def _crops(view: View, labels: np.ndarray | None, sample: int | None, draws: np.random.Generator, checked: Checked) -> Finding:
    """The verdict on a crops.beton whose tables are sound. labels: of the cache, None if they are damaged."""
    reader = CropReader(view.path)
    if len(reader) != view.cache.n_images:
        return judge(reader.path, f"has {len(reader)} rows, the cache {view.cache.n_images}.")
    if labels is not None and not np.array_equal(reader.labels, labels):
        return judge(reader.path, "its labels are not those of labels.npy.")
    rows = np.arange(len(reader)) if sample is None else draw_rows(len(reader), sample, draws)
    checked.rows[f"{view.path.name}/{reader.path.name}"] = len(rows)
    bad = damaged_crops(reader.path, reader.pointers, reader.sizes, reader.crcs, rows)
    if bad:
        return judge(reader.path, f"{len(bad)} damaged crops, rows {bad[:5]}{' ...' if len(bad) > 5 else ''}.")
    try:
        reader.require_same_decoder()
    except ModuleNotFoundError as error:
        if not (extras := extras_for(error.name or "")):
            raise
        checked.not_made[f"{view.path.name}/{reader.path.name}"] = (
            "whether this machine decodes crops to the pixels on record, which needs FFCV: " + install_command(extras)
        )
    except MismatchError as error:
        return Finding("foreign", str(reader.path), without(reader.path, error))
    except CacheCorruptError as error:  # one that is not in the sample
        return judge(reader.path, without(reader.path, error))
    return judge(reader.path, None)


def has_tables(beton: Path, sha256: str) -> bool:
    """Whether all of a crops.beton that is no crop is as recorded."""
    try:
        return tables_sha256(beton) == sha256
    except CacheCorruptError:
        return False


def damaged_crops(path: Path, pointers: np.ndarray, sizes: np.ndarray, crcs: np.ndarray, rows: np.ndarray) -> list[int]:
    """Those of `rows` whose encoded crop in `path` does not have its CRC-32C, also because the file ends before it.

    pointers, sizes, crcs: of all rows. rows: ascending; neighbours are read together.
    """
    blocks, ends = [], pointers + sizes
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1 or ends[rows[i]] - pointers[rows[begin]] > BLOCK:
            blocks.append(rows[begin:i].tolist())
            begin = i

    def damaged(block: list[int]) -> list[int]:
        start, end = int(pointers[block[0]]), int(ends[block[-1]])
        data = np.frombuffer(os.pread(file.fileno(), end - start, start), "u1")
        places = [(row, int(pointers[row]) - start, int(sizes[row])) for row in block]
        return [row for row, place, size in places if crc32c(data[place : place + size]) != crcs[row]]

    with open(path, "rb") as file:
        return [row for bad in in_threads(damaged, blocks) for row in bad]
