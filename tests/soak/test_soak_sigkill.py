"""SIGKILL of the real programs at moments chosen by what they have left on disk; then the same command goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from cache_fakes import contents
from fakes import write_images
from forks import Command, kill_when, start_forked
from safetensors import safe_open

SHARDS = 30
EXTRACT = ("--teacher", "demo", "--preset", "maskalign-demo", "--views", 2, "--shard-rows", 4, "--batch-size", 4)
"""120 images make 30 shards in each of two views."""


@pytest.fixture(scope="module")
def start(full):
    """How commands are started: the installed program; in the short form from an interpreter in which all is loaded."""
    return Command if full else start_forked


# --- extraction ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 3, 40)


@pytest.fixture(scope="module")
def undisturbed(start, images, tmp_path_factory) -> Path:
    """A cache made in one go."""
    cache = tmp_path_factory.mktemp("undisturbed") / "c"
    start("teacher-cache", "extract", *EXTRACT, "--images", images, cache).wait().says(code=0)
    return cache


def n_finished(cache: Path) -> int:
    """Shards committed so far, in both views."""
    stores = [cache / f"view-00{number}" / "demo.zarr" for number in (0, 1)]
    return sum(SHARDS if (s / "complete.json").exists() else len(list(s.glob("commits/*.json"))) for s in stores)


def phase_on_disk(cache: Path) -> str:
    """What an extraction was doing when it died, from what it left."""
    if not (cache / "cache.json").exists():
        return "crop stage"
    for number in (0, 1):
        store = cache / f"view-00{number}" / "demo.zarr"
        if not store.exists():
            return f"beginning the store of view {number}"
        if not (store / "complete.json").exists():
            return f"folding view {number}" if (store / "shards.npy").exists() else f"shards of view {number}"
        if (store / "commits").exists():
            return f"clearing up view {number}"
    return "behind the last shard"


AIMS = (
    *(lambda cache, n=n: n_finished(cache) >= n for n in (1, 9, 17, 25, 29, 33, 41, 49, 57, 59)),
    lambda cache: (cache / "view-000/demo.zarr/shards.npy").exists(),
    lambda cache: (cache / "view-000/demo.zarr/complete.json").exists(),
    lambda cache: any(cache.glob("view-001/demo.zarr.*.partial")),
    lambda cache: (cache / "view-001/demo.zarr").exists(),
)
"""Moments, none before the first commit."""


@pytest.mark.soak("SIGKILL of `teacher-cache extract` behind its first commit, twice in a row", full=10, short=1)
def test_extract_killed(seed, start, images, undisturbed, tmp_path, fell):
    """Killed twice at different moments and run again, extraction leaves the files of an undisturbed one."""
    cache, draw = tmp_path / "c", random.Random(seed)
    first, second = sorted(draw.sample(range(len(AIMS)), 2))
    for aim in (first, second):
        process = start("teacher-cache", "extract", *EXTRACT, "--images", images, cache)
        if kill_when(process, lambda aim=aim: AIMS[aim](cache)):
            fell(phase_on_disk(cache))
            assert process.wait().code == -9
        else:
            process.wait().says(code=0)
            fell("ended before it could be killed")
    start("teacher-cache", "extract", *EXTRACT, "--images", images, cache).wait().says(code=0)
    assert contents(cache) == contents(undisturbed)


# --- training --------------------------------------------------------------------------------------------------------

TRAIN = ("--preset", "maskalign-demo", "--tiny", "--set", "epochs=4", "--checkpoint-every", 4)
STEPS = 60


@pytest.fixture(scope="module")
def undisturbed_run(start, undisturbed, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "r"
    start("student-train", *TRAIN, "--cache", undisturbed, "--out", run).wait().says(code=0)
    return run


def n_steps(run: Path) -> int:
    """Steps logged so far."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def last_checkpoint(run: Path) -> dict:
    """Tensor by name, of the newest checkpoint."""
    with safe_open(max(run.glob("checkpoint-*.safetensors")), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.mark.soak("SIGKILL of `student-train`, twice in a row", full=10, short=1)
def test_training_killed(seed, start, undisturbed, undisturbed_run, tmp_path, fell):
    """Killed twice and run again, a run has the weights, moments and losses of an undisturbed one, to the bit."""
    run, draw = tmp_path / "r", random.Random(seed)
    first, second = sorted(draw.sample(range(1, STEPS), 2))
    at_checkpoint = draw.random() < 0.5  # aim at the writing of one
    for aim in (first, second):
        process = start("student-train", *TRAIN, "--cache", undisturbed, "--out", run)

        def is_time(aim=aim) -> bool:
            return n_steps(run) >= aim and (not at_checkpoint or any(run.glob("checkpoint-*.partial*")))

        if kill_when(process, is_time):
            writing = ", writing a checkpoint" if any(run.glob("checkpoint-*.partial*")) else ""
            saved = max((int(path.stem[11:]) for path in run.glob("checkpoint-*.safetensors")), default=0)
            fell("no checkpoint yet" if not saved else f"{'on' if n_steps(run) == saved else 'between'} a checkpoint" + writing)
            assert process.wait().code == -9
        else:
            process.wait().says(code=0)
            fell("ended before it could be killed")
    start("student-train", *TRAIN, "--cache", undisturbed, "--out", run).wait().says(code=0)
    expected, found = last_checkpoint(undisturbed_run), last_checkpoint(run)
    assert expected.keys() == found.keys() and all((expected[name] == found[name]).all() for name in expected)
    assert losses(run) == losses(undisturbed_run) and len(losses(run)) == STEPS
