"""Two writers of one thing: one of them wins, or both finish their own shares; the loser is told who, and nothing is damaged.

Real processes race. Because a race rarely meets the moment that matters, in every other case the first process is stopped
(SIGSTOP) at what it has on disk, the second one is started and ends beside it, and the first goes on.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_fakes import contents
from fakes import write_images
from forks import PATIENCE, Child, Command, kill_when, run_forked, start_forked
from test_soak_sigkill import last_checkpoint, losses, n_steps

SHARDS = 12
EXTRACT = ("--teacher", "demo", "--preset", "maskalign-demo", "--views", 2, "--shard-rows", 4, "--batch-size", 4)
"""48 images make 12 shards in each of two views."""
TRAIN = ("--preset", "maskalign-demo", "--tiny", "--set", "epochs=4", "--checkpoint-every", 2)
STEPS = 24

UNSIGNED = ("a process that has just started", "another trainer")
"""A holder that has its lock and has not yet written who it is: an instant, but a race may meet it."""
Process = Child | Command
MEANWHILE = 60
"""Seconds for which a stopped process lets another one work; then both go on, and it is a race."""


@pytest.fixture
def start(full, seed):
    """How commands are started: in the first cases of the full form the installed program, else from a warm interpreter."""
    return Command if full and seed < 2 else start_forked


def is_by(condition: Callable[[], bool], patience: float) -> bool:
    """Wait until `condition()` holds, but at most `patience` seconds; whether it does."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def contend(begin: Callable[[], Process], is_time: Callable[[], bool] | None) -> str:
    """Run two processes against each other and demand that one wins, and that the other, if it loses, says to whom.

    is_time: when to stop the first one until the second has ended; None: let them race. Returns how it ended.
    """
    first = begin()
    assert is_time is None or is_by(lambda: is_time() or not first.is_running, PATIENCE)
    is_stopped = is_time is not None and first.is_running
    if is_stopped:
        first.signal(signal.SIGSTOP)
    try:
        second = begin()
        if is_stopped:
            is_by(lambda: not second.is_running, MEANWHILE)
    finally:
        if is_stopped:
            first.signal(signal.SIGCONT)
    ended = {process: process.wait() for process in (first, second)}
    for process, other in ((first, second), (second, first)):
        if ended[process].code != 0:
            ended[process].says("Error: ", code=2)
            assert ended[other].code == 0, ended
            names = f"process {other.pid} on host {socket.gethostname()}"
            assert any(words in ended[process].output for words in (names, *UNSIGNED)), (other.pid, ended[process].output)
    codes = ended[first].code, ended[second].code
    return {(0, 2): "the second refused", (2, 0): "the first refused", (0, 0): "one after the other"}[codes]


# --- extraction ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 3, 16)


@pytest.fixture(scope="module")
def cropped(images, tmp_path_factory) -> Path:
    """A cache that has its crops."""
    cache = tmp_path_factory.mktemp("cropped") / "c"
    run_forked("teacher-cache", "crop", "--preset", "maskalign-demo", "--views", 2, "--images", images, cache).says(code=0)
    return cache


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory) -> Path:
    """A cache that one process made alone."""
    cache = tmp_path_factory.mktemp("undisturbed") / "c"
    run_forked("teacher-cache", "extract", *EXTRACT, "--images", images, cache).says(code=0)
    return cache


def n_finished(cache: Path) -> int:
    """Shards committed so far, in both views."""
    stores = [cache / f"view-00{number}" / "demo.zarr" for number in (0, 1)]
    return sum(SHARDS if (s / "complete.json").exists() else len(list(s.glob("commits/*.json"))) for s in stores)


MOMENTS = {
    "cutting crops": lambda cache: (cache / "crops.partial").exists(),
    "beginning the store": lambda cache: (cache / "view-000/demo.zarr.claim").exists(),
    "in view 0": lambda cache: n_finished(cache) >= 3,
    "in view 1": lambda cache: n_finished(cache) >= SHARDS + 3,
}
"""What an extraction is doing, and how one sees that from outside."""


@pytest.mark.soak("two extractions of one cache", full=10, short=1)
def test_one_range(seed, start, images, undisturbed, tmp_path, fell):
    """One makes the cache, as if it were alone; the other is refused with 2 and told host and process, or comes after it."""
    cache = tmp_path / "c"
    moment = [*MOMENTS][seed // 2 % 4] if seed % 2 == 0 else None
    is_time = moment and (lambda: MOMENTS[moment](cache))
    how = contend(lambda: start("teacher-cache", "extract", *EXTRACT, "--images", images, cache), is_time)
    fell(f"{'the first stopped ' + moment if moment else 'in a race'}: {how}")
    assert contents(cache) == contents(undisturbed)


@pytest.mark.soak("extractions with --shards on disjoint ranges of a store that is not begun", full=10, short=1)
def test_disjoint_ranges(seed, start, cropped, undisturbed, tmp_path, fell):
    """All end with 0, also when one of them is killed and started again, and have made the cache that one alone makes."""
    cache, draw = shutil.copytree(cropped, tmp_path / "c"), random.Random(seed)
    cuts = [0, *sorted(draw.sample(range(1, SHARDS), draw.choice((1, 2)))), SHARDS]

    def begin(part: int) -> Process:
        return start("teacher-cache", "extract", *EXTRACT, "--shards", f"{cuts[part]}:{cuts[part + 1]}", cache)

    processes = [begin(part) for part in range(len(cuts) - 1)]
    victim = draw.randrange(len(processes)) if seed % 2 == 0 else None
    if victim is not None:
        aim = draw.randrange(SHARDS)
        is_killed = kill_when(processes[victim], lambda: n_finished(cache) >= aim)
        fell("one of them killed" if is_killed else "one of them ended before it could be killed")
        assert processes.pop(victim).wait().code in (-signal.SIGKILL, 0)
    for process in processes:
        process.wait().says(code=0)
    if victim is not None:
        begin(victim).wait().says(code=0)
    fell(f"{len(cuts) - 1} processes")
    assert contents(cache) == contents(undisturbed)


@pytest.mark.soak("extractions with --join, begun together with the originals", full=10, short=1)
def test_joining(seed, start, images, undisturbed, tmp_path, fell):
    """Those that are not killed end with 0 and have made the cache that one alone makes, with nothing left beside it."""
    cache, draw = tmp_path / "c", random.Random(seed)

    def begin() -> Process:
        return start("teacher-cache", "extract", "--join", *EXTRACT, "--images", images, cache)

    processes = [begin() for _ in range(draw.choice((2, 3)))]
    if seed % 2 == 0:
        aim = draw.randrange(2 * SHARDS)
        victim = processes.pop(draw.randrange(len(processes)))
        fell("one of them killed" if kill_when(victim, lambda: n_finished(cache) >= aim) else "one of them ended before")
        assert victim.wait().code in (-signal.SIGKILL, 0)
        processes.append(begin())
    for process in processes:
        process.wait().says(code=0)
    fell(f"{len(processes)} processes")
    assert contents(cache) == contents(undisturbed)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed_run(undisturbed, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "r"
    run_forked("student-train", *TRAIN, "--cache", undisturbed, "--out", run).says(code=0)
    return run


@pytest.mark.soak("two trainers on one run folder", full=10, short=1)
def test_one_run(seed, start, undisturbed, undisturbed_run, tmp_path, fell):
    """One trains, to the bit as if it were alone; the other is refused with 2 and told host and process, or comes after it."""
    run, step = tmp_path / "r", random.Random(seed).randrange(1, STEPS - 1)
    is_time = (lambda: n_steps(run) >= step) if seed % 2 == 0 else None
    how = contend(lambda: start("student-train", *TRAIN, "--cache", undisturbed, "--out", run), is_time)
    fell(f"{'in a race' if is_time is None else 'the first stopped at a step'}: {how}")
    expected, found = last_checkpoint(undisturbed_run), last_checkpoint(run)
    assert expected.keys() == found.keys() and all((expected[name] == found[name]).all() for name in expected)
    assert losses(run) == losses(undisturbed_run) and len(losses(run)) == STEPS
    assert {path.name for path in run.iterdir()} == {path.name for path in undisturbed_run.iterdir()}
