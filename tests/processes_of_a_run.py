"""1, 2 and 4 processes train on one real cache, forked from one interpreter: python processes_of_a_run.py CACHE FOLDER PORT ...

FOLDER/N is the run of N processes, FOLDER/moved one that 4 begin, 2 go on with and 1 ends; each process has one thread.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from serial_loops import compile_now

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.teacher_values import stored_shape
from pipelines.presets import recipe
from student.devices.distributed import processes, rank, world_size
from student.modules.model import Student
from student.run.trainer import Trainer
from teacher_cache.cache import Cache

STEPS = 6
"""Of a run: two epochs of 24 rows."""
MOVED = ((4, 2), (2, 4), (1, STEPS))
"""Processes, and the step they go on to."""


def train(cache: Cache, out: Path, max_steps: int | None = None) -> None:
    """A run of maskalign's miniature, whose masks are drawn before its targets are read."""
    shapes = (stored_shape(cache, "fake"),)
    config = replace(recipe("maskalign-b16").tiny(shapes).config, batch_size=8, epochs=2)
    student = Student(config, shapes)
    source = CachedSource(cache, ["fake"], student.needs, batch_size=8, rank=rank(), world=world_size(),
                          masks=student.masks_ahead(config))  # fmt: skip
    assert source.masks is not None
    Trainer(config, student, source, out).fit(max_steps)


def be(place: int, cache: Path, folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    phases = [(n, folder / str(n), None) for n in (1, 2, 4)] + [(n, folder / "moved", to) for n, to in MOVED]
    for port, (n_processes, out, to) in zip(ports, phases, strict=True):
        if place < n_processes:
            os.environ |= {"RANK": str(place), "WORLD_SIZE": str(n_processes), "LOCAL_RANK": str(place),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            with processes("cpu"):
                train(Cache(cache), out, to)


if __name__ == "__main__":
    compile_now()
    pids = []
    for place in range(4):
        if not (pid := os.fork()):
            code = 1
            try:
                be(place, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids))
