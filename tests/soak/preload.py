"""What the fork server loads once, before any child is forked (forks.py): all that takes time, nothing that starts threads.

FFCV makes numba start its own when it is imported; those of TBB survive a fork.

A child may be killed anywhere and forked again a thousand times, so two things differ from the installed program: crops and rows
are read by the same loops compiled for one thread, because parallel loops would be compiled anew in every child, and parts of the
crop stage have 8 rows, so that a few images make several. Both give the same bytes. `--teacher fake` is the fake teacher of the
tests. Only the server may import this: it changes the process.
"""

# ruff: noqa: F401 - most of this is imported in order to be there

from __future__ import annotations

import numcodecs
import pytest  # the functions that children run stand in test files
import torch
import warm
from fakes import FakeTeacher
from PIL import Image
from serial_loops import compile_now

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
from teacher_cache.kernels import sigbus_handler  # noqa: F401 - compiled when it is imported

Image.init()
torch.set_num_threads(1)
torch.set_num_interop_threads(1)


compile_now()
parts.PART_ROWS = 8

FAKE = FakeTeacher()
_load = teachers.load_teacher
teachers.load_teacher = lambda name, *rest: FAKE if name == "fake" else _load(name, *rest)
