"""Processes that may die: forked in milliseconds from an interpreter in which everything is loaded and nothing runs.

A killed process must not take the test run with it, and a fresh interpreter takes ten seconds to load torch, timm and FFCV. So
one server (multiprocessing's fork server) loads them once (preload.py) and forks a child for each case. `Command` starts the
installed program in an interpreter of its own, for what only that can show.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import warm

HERE = Path(__file__).parent
PATIENCE = 300
"""Seconds after which a child counts as hung."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
"""Environment in which torch and numba work without further threads."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preload"])


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    output: str
    """stdout and stderr together."""
    value: object = None
    """What the function returned, if it did."""

    def ok(self) -> Ended:
        """Itself, if it ended well; else AssertionError with all it said."""
        assert self.code == 0, f"exit code {self.code}:\n{self.output}"
        return self

    def says(self, *words: str, code: int) -> Ended:
        """Itself, if it ended with `code`, without a traceback, and said all `words`."""
        assert self.code == code and "Traceback" not in self.output, f"exit code {self.code}, expected {code}:\n{self.output}"
        missing = [word for word in words if word not in self.output]
        assert not missing, f"{missing} not in:\n{self.output}"
        return self


def start_server() -> None:
    """Begin to load what children need, in the background."""
    paths = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
    changed = {"PYTHONPATH": os.pathsep.join(paths), **ONE_THREAD}  # the server takes no sys.path from its starter
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Child:
    """A function running in a child; it must stand in a module."""

    def __init__(self, function, *arguments):
        self.folder = tempfile.TemporaryDirectory(prefix="soak-child-")
        self.said, self.returned = (Path(self.folder.name) / name for name in ("said", "returned"))
        self.process = _context.Process(target=_be, args=(function, arguments, self.said, self.returned))
        start_server()
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.exitcode is None

    def kill(self) -> None:
        self.process.kill()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, patience: float = PATIENCE) -> Ended:
        self.process.join(patience)
        hung = self.is_running
        if hung:
            self.process.kill()
            self.process.join()
        output = self.said.read_text(errors="replace") if self.said.exists() else ""
        value = pickle.loads(self.returned.read_bytes()) if self.returned.exists() else None
        self.folder.cleanup()
        assert not hung, f"still running after {patience} s; it said:\n{output}"
        return Ended(self.process.exitcode, output, value)


def _be(function, arguments, said: Path, returned: Path) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["PYTHONUNBUFFERED"] = "1"
    try:
        returned.write_bytes(pickle.dumps(function(*arguments)))
    except Exception:
        traceback.print_exc()
        sys.exit(70)  # no exit code of ours


def fork(function, *arguments) -> Ended:
    """Call `function` in a child and wait for it."""
    return Child(function, *arguments).wait()


def start_forked(program: str, *arguments) -> Child:
    """Start a command in a child."""
    return Child(warm.run_program, program, *arguments)


def run_forked(program: str, *arguments) -> Ended:
    """Run a command in a child."""
    return start_forked(program, *arguments).wait()


class Command:
    """The installed program in an interpreter of its own; the same interface as Child."""

    def __init__(self, program: str, *arguments, **environment: str):
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by wait
        command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=self.said, stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD, **environment}
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, patience: float = PATIENCE) -> Ended:
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self.said.seek(0)
        with self.said:
            return Ended(code, self.said.read())


def run_command(program: str, *arguments, **environment: str) -> Ended:
    return Command(program, *arguments, **environment).wait()


def kill_when(process: Child | Command, is_time, patience: float = PATIENCE) -> bool:
    """SIGKILL `process` as soon as `is_time()`; False if it ended by itself before."""
    deadline = time.monotonic() + patience
    while not is_time():
        if not process.is_running:
            return False
        assert time.monotonic() < deadline, f"nothing to kill at after {patience} s"
        time.sleep(0.0005)
    process.signal(signal.SIGKILL)
    return True
