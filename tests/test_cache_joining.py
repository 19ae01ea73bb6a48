"""Processes that join fill one cache: any number, started, stopped and killed at any time, make what one alone makes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cache_fakes import contents
from click.testing import CliRunner
from fakes import FakeTeacher

from teacher_cache import make_cache
from teacher_cache.cache import Cache
from teacher_cache.cli.main import main
from teacher_cache.errors import NoSpaceError
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.layout import store_claims
from teacher_cache.sharing.joining import join_views
from teacher_cache.store import failures

HERE = Path(__file__).parent
SHARDS = 12
"""Of each of two views: 24 images, two a shard."""
SECONDS = 0.05
"""That the teacher takes for a shard at least."""


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory) -> Path:
    """The cache that one process makes alone."""
    path = tmp_path_factory.mktemp("alone") / "c"
    make_cache(path, images=image_folder, teacher=FakeTeacher(), views=2, layers="last", shard_rows=2, batch_size=2, say=None)
    return path


@pytest.fixture
def cropped(undisturbed, tmp_path) -> Path:
    """A cache of one view that has its crops alone."""
    cache = shutil.copytree(undisturbed, tmp_path / "c")
    shutil.rmtree(cache / "view-001")
    shutil.rmtree(cache / "view-000/fake.zarr")
    return cache


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    """joiners.py, which has loaded all that workers need."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "joiners.py"), str(SECONDS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield server
        server.communicate(timeout=60)


class Workers:
    """Processes at work on one cache, by name."""

    def __init__(self, server: subprocess.Popen, cache: Path):
        self._server, self.cache, self.pids = server, cache, dict[str, int]()

    def ask(self, *words) -> str:
        print(*words, file=self._server.stdin, flush=True)
        return self._server.stdout.readline().strip()

    def start(self, name: str, *options) -> None:
        self.pids[name] = int(self.ask("start", name, self.cache, *options))

    def wait(self, name: str) -> tuple[int, str]:
        """Exit code, and all that it said."""
        return int(self.ask("wait", name)), self.cache.with_name(f"{name}.said").read_text()


@pytest.fixture
def workers(server, tmp_path) -> Workers:
    return Workers(server, tmp_path / "c")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def n_made(cache: Path, view: int = 0) -> int:
    store = cache / f"view-00{view}/fake.zarr"
    return SHARDS if (store / "complete.json").exists() else len(list(store.glob("commits/*.json")))


def held_by(cache: Path) -> set[int]:
    """The processes that hold blocks."""
    texts = []
    for path in cache.glob("view-*/*.claims/*.claim"):
        try:
            texts.append(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):  # it has gone meanwhile, or is just being made
            continue
    return {text["pid"] for text in texts}


@pytest.mark.slow
def test_processes_come_and_go(workers, image_folder, undisturbed):
    """Two begin together with the originals, a third comes, one is killed at its work: the rest make the bytes that one makes.

    The crops are cut by one; no claim, no record of the death and nothing aside is left.
    """
    cache, images = workers.cache, ("--images", image_folder, "--views", 2)
    for name in ("one", "two"):
        workers.start(name, *images)
    until(lambda: n_made(cache) >= 1 and workers.pids["two"] in held_by(cache))
    workers.ask("kill", "two")
    workers.start("three", *images)
    until(lambda: workers.pids["three"] in held_by(cache) or n_made(cache, 1) == SHARDS)
    ended = {name: workers.wait(name) for name in ("one", "two", "three")}
    assert [code for code, _ in ended.values()] == [0, -9, 0], ended
    assert contents(cache) == contents(undisturbed)
    said = "".join(text for _, text in ended.values())
    assert said.count("fitting the quantiser: 16 crops\n") == 1 and said.count("cropping: 24 images\n") == 1
    assert "Done. Next:" in ended["one"][1]


@pytest.mark.slow
def test_stopped_and_failing(workers, cropped, undisturbed):
    """SIGTERM ends a worker with 75, its block is free; a shard that fails three times is left, told of, and mended."""
    bad = ("bad=17",)  # behind the rows that the quantiser is fitted on
    workers.start("one", *bad)
    until(lambda: n_made(cropped) >= 1)
    began = time.monotonic()
    workers.ask("stop", "one")
    code, said = workers.wait("one")
    assert code == 75 and "Stopped by SIGTERM. Finished work is kept" in said and time.monotonic() - began < 30
    assert held_by(cropped) == set()
    for name in ("two", "three"):
        workers.start(name, *bad)
    ended = [workers.wait(name) for name in ("two", "three")]
    store = cropped / "view-000/fake.zarr"
    assert [code for code, _ in ended] == [1, 1] and n_made(cropped) == SHARDS - 1, ended
    for _, said in ended:
        assert (
            f"Error: These shards were left behind 3 failures each; all others are made:\n  {store}, shards 8:9: a crop" in said
        )
        assert "run the same command with --shards FIRST:LAST in the place of --join" in said
    assert "".join(said for _, said in ended).count(f"{store}: shard 8 failed (") == 3
    records = sorted(path.name[:6] for path in store_claims(store).iterdir())
    assert records == ["000008"] * 3
    result = CliRunner().invoke(main, ["verify", str(cropped)])
    assert "shards 8:9 failed: a crop that nobody can bear" in result.output and "was killed" not in result.output
    make_cache(cropped, teacher=FakeTeacher(), shards=range(8, 9), say=None)
    assert contents(cropped / "view-000") == contents(undisturbed / "view-000")


class Failing(FakeTeacher):
    """Raises `error` from its `first` call on, counted from 1."""

    def __init__(self, first: int, error: Exception):
        super().__init__()
        self.first, self.error = first, error

    def __call__(self, images, layers):
        output = super().__call__(images, layers)
        if self.n_calls >= self.first:
            raise self.error
        return output


def join(cache: Path, teacher: FakeTeacher) -> bool:
    return join_views([Cache(cache).view(0)], "fake", teacher, ExtractPlan("last", shard_rows=2, batch_size=2))


FITTED = 9
"""Calls until the quantiser is fitted: eight batches, and the probe."""


def test_a_broken_machine(cropped, undisturbed, capsys):
    """Three shards that fail one after the other, as none did before, end the process; the others' failures do not; all can be
    made by another machine then, which finds nothing to do when it is asked again."""
    with pytest.raises(RuntimeError, match="illegal memory access"):
        join(cropped, Failing(FITTED + 3, RuntimeError("illegal memory access")))
    found = failures.read(cropped / "view-000/fake.zarr")
    assert (n_made(cropped), [(f.shard, f.error) for f in found]) == (
        2, [(shard, "RuntimeError: illegal memory access") for shard in (2, 3, 4)],
    )  # fmt: skip
    assert (
        "3 shards in a row failed here that had not failed before: it is this machine, or all are bad." in capsys.readouterr().err
    )
    assert join(cropped, FakeTeacher()) is True
    assert contents(cropped / "view-000") == contents(undisturbed / "view-000")
    assert join(cropped, Failing(1, AssertionError())) is False


def test_a_full_disk_is_no_shards_fault(cropped):
    """What the next shard would meet too ends the process at once, and is on record without being counted."""
    with pytest.raises(NoSpaceError, match="0 of 12 shards are finished and kept"):
        join(cropped, Failing(FITTED + 1, OSError(errno.ENOSPC, "No space left on device")))
    (failure,) = failures.read(cropped / "view-000/fake.zarr")
    assert (failure.shard, failure.counts) == (0, False) and held_by(cropped) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shards", "0:1"], "--join takes what is free, and --shards makes a range of its own. Give one of them."),
        (["--repair"], "--repair is for one process. First run it without --join."),
        (["--take-over"], "--take-over is a person's word, and --join is for many processes"),
    ],
)
def test_what_does_not_go_together(tmp_path, options, words):
    """--join beside options of one process is refused with 2, and says what to do."""
    result = CliRunner().invoke(main, ["extract", "--join", *options, "--teacher", "demo", str(tmp_path / "c")])
    assert result.exit_code == 2 and words in result.output and not (tmp_path / "c").exists()
