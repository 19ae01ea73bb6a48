"""What the fork server loads once, before any child is forked (forks.py): all that takes time, nothing that starts threads.

FFCV makes numba start its own when it is imported; those of TBB survive a fork.

A child may be killed anywhere and forked again a thousand times, so two things differ from the installed program: crops and rows
are read by the same loops compiled for one thread, because parallel loops would be compiled anew in every child, and parts of the
crop stage have 8 rows, so that a few images make several. Both give the same bytes. `--teacher fake` is the fake teacher of the
tests. Only the server may import this: it changes the process.
"""

# ruff: noqa: F401 - most of this is imported in order to be there

from __future__ import annotations

import numba
import numcodecs
import numpy as np
import pytest  # the functions that children run stand in test files
import torch
import warm
from fakes import FakeTeacher
from PIL import Image

import pipelines.feed.cached_source
import pipelines.feed.labelled
import pipelines.presets
import student.evals
import student.run.trainer
import teacher_cache.checking.remake
import teacher_cache.checking.repair
import teacher_cache.device
import teacher_cache.extraction.extract
import teacher_cache.inspecting.inspect
from teacher_cache import teachers
from teacher_cache.extraction import parts
from teacher_cache.kernels import loops, sigbus_handler  # noqa: F401 - compiled when it is imported

Image.init()
torch.set_num_threads(1)
torch.set_num_interop_threads(1)


def compile_now() -> None:
    """Compile what every child would compile: the loops as serial ones."""
    addresses, rows, word = np.zeros(0, "uint64"), np.zeros(0, "int64"), np.uint64(0)
    loops.decode_rows = numba.njit(nogil=True)(loops.decode_rows.py_func)
    loops.decode_rows(rows, np.zeros((0, 32, 32, 3), "uint8"), word, addresses, addresses, np.zeros(0, "uint32"), True, rows)
    loops.copy_rows = numba.njit(nogil=True)(loops.copy_rows.py_func)
    loops.copy_rows(rows, word, 1, addresses, addresses, False, 1, word, np.zeros(0, "uint8"), 1, rows)


compile_now()
parts.PART_ROWS = 8

FAKE = FakeTeacher()
_load = teachers.load_teacher
teachers.load_teacher = lambda name, *rest: FAKE if name == "fake" else _load(name, *rest)
