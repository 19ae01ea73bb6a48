"""Several processes train on one cache as one does, and a run goes on with another number of them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(shared_cache, tmp_path_factory) -> Path:
    """Runs `1`, `2`, `4` and `moved` of as many processes (processes_of_a_run.py)."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(6)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [str(one.getsockname()[1]) for one in free]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "processes_of_a_run.py"), str(shared_cache.path), str(folder), *ports]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["2", "4", "moved"])
def test_processes_equal_one(runs, other):
    """2 and 4 processes that share each step of a real cache, masks drawn ahead, have the losses of one process, step by step; so
    has a run that 4 begin, 2 go on with and 1 ends."""
    assert len(losses(runs / "1")) == 6 == len({round(loss, 6) for loss in losses(runs / "1")})
    assert losses(runs / other) == pytest.approx(losses(runs / "1"), rel=1e-4)
