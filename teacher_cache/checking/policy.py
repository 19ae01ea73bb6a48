"""What the checks of a view and of a store share: small files, rows drawn at random, threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..format.layout import SPARE
from .advice import when_lost
from .findings import Finding, judge
from .small_files import SmallFiles


def check_small_files(files: SmallFiles) -> Iterator[Finding]:
    """A verdict on each small file of a folder; one whose copy is lost too comes with what helps then."""
    for name in files.names:
        wrong = files.wrong.get(name)
        if wrong and files.sound(name) is None:
            wrong = f"{wrong} Its copy in {SPARE} is lost too. {when_lost(files.folder, files.kind)}"
        yield judge(files.folder / name, wrong)


def check_spare(files: SmallFiles) -> Finding:
    return judge(files.folder / SPARE, files.spare_fault())


def draw_rows(n_rows: int, sample: int, draws: np.random.Generator) -> np.ndarray:
    """`sample` different rows of n_rows, ascending; all if there are no more. A small sample takes no memory for the others."""
    return np.sort(draws.choice(n_rows, min(sample, n_rows), replace=False, shuffle=False))


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """`map` on as many threads as there are processors; reading, CRC-32 and decompression work without the GIL."""
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="verify")
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
