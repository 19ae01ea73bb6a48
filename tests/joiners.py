"""Processes that fill a cache together, for tests: forked from one interpreter, each with a teacher of its own.

    python joiners.py SECONDS

A line `start NAME CACHE OPTIONS` on stdin forks a worker of that name, `kill NAME` or `stop NAME` sends it SIGKILL or SIGTERM,
`wait NAME` waits for it; each is answered by a line. A worker runs `teacher-cache extract --join` with OPTIONS; its teacher takes
SECONDS a batch longer, and fails on row ROW with `bad=ROW`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from click.testing import CliRunner  # noqa: F401 - click is loaded once, before the forks
from fakes import FakeTeacher

from teacher_cache.cli.main import main
from teacher_cache.errors import BadInputError
from teacher_cache.files import claims

STOP = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}


class SlowTeacher(FakeTeacher):
    """Takes `seconds` longer for each batch; fails on crops that are like `bad`."""

    def __init__(self, seconds: float, bad):
        super().__init__()
        self.seconds, self.bad = seconds, bad

    def __call__(self, images, layers):
        time.sleep(self.seconds)
        if self.bad is not None and any(torch.equal(image, self.bad) for image in images):
            raise BadInputError("a crop that nobody can bear")
        return super().__call__(images, layers)


def work(cache: Path, seconds: float, options: list[str], said: Path) -> None:
    """Be the command, in a forked process, to its exit code."""
    from teacher_cache import teachers
    from teacher_cache.cache import Cache

    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    claims.POLL_S = 0.05
    rows = [int(option.removeprefix("bad=")) for option in options if option.startswith("bad=")]
    bad = torch.from_numpy(Cache(cache).view(0).pixels(rows)[0]) if rows else None
    teachers.load_teacher = lambda *arguments, **options: SlowTeacher(seconds, bad)
    arguments = ["extract", "--join", "--teacher", "fake", "--layers", "last", "--shard-rows", "2", "--batch-size", "2"]
    main(args=[*arguments, *(o for o in options if not o.startswith("bad=")), str(cache)], prog_name="teacher-cache")


def serve(seconds: float) -> None:
    pids: dict[str, int] = {}
    for line in sys.stdin:
        what, name, *options = line.split()
        if what == "start":
            if not (pid := os.fork()):
                cache = Path(options[0])
                work(cache, seconds, options[1:], cache.with_name(f"{name}.said"))
            pids[name] = pid
            print(pid, flush=True)
        elif what == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(pids[name], 0)[1]), flush=True)
        else:
            os.kill(pids[name], STOP[what])
            print(what, flush=True)


if __name__ == "__main__":
    from serial_loops import compile_now

    import teacher_cache.extraction.extract  # noqa: F401 - loaded once, before the forks
    from teacher_cache.kernels import sigbus_handler  # noqa: F401 - compiled when it is imported

    compile_now()

    serve(float(sys.argv[1]))
