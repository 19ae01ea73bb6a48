"""A writer that dies anywhere: started again, it leaves the very files that an undisturbed one leaves."""

from __future__ import annotations

import random
import re
import shutil

import pytest
import warm
from cache_fakes import contents
from deaths import DIED, EXIT, counting, dying
from forks import fork

ARGUMENTS = ("--teacher", "fake", "--views", 2, "--layers", "last2", "--shard-rows", 8, "--batch-size", 5, "--workers", 1)
"""24 images make 3 parts of the crop stage, 2 views, and in each a store of 3 shards of 4 arrays."""

PHASES = (
    ("claiming", r"\.claim"),
    ("crop stage, clearing up", r"(unlink|rmdir) crops\.partial"),
    ("crop stage, parts", r" crops\.partial/view-"),
    ("crop stage, beginning", r" crops\.partial"),
    ("crop stage, a view aside", r" view-\d+\.\w+\.partial/"),
    ("crop stage, publishing", r" (view-\d+(\.\w+\.partial)?|\.\.?|\w+\.(json|txt|npy|tar)(\.\w+\.partial)?)$"),
    ("store, fitting", r" view-\d+/#\d+"),
    ("store, beginning", r"\.zarr\.[0-9a-f]{16}\.partial| view-\d+/\w+\.zarr$"),
    ("store, clearing up", r"(unlink|rmdir) .*\.zarr/commits"),
    ("store, commit records", r"\.zarr/commits"),
    ("store, shards", r"\.zarr/(tokens/\d+|scale|attention)(/c\.[\d.]+(\.\w+\.partial)?)?$"),
    ("store, folding", r"\.zarr(/(shards\.npy|complete\.json|spare\.tar)(\.\w+\.partial)?)?$"),
)  # fmt: skip
"""Which part of the work a call belongs to, as deaths.Mortal spells it: the first pattern that is found in it."""


def phase_of(call: str) -> str:
    found = [phase for phase, pattern in PHASES if re.search(pattern, call)]
    assert found, f"a call that belongs to no phase: {call}"
    return found[0]


def extract(cache, images) -> None:
    """`teacher-cache extract`, both stages; ends the process."""
    warm.run_program("teacher-cache", "extract", "--images", images, *ARGUMENTS, cache)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, image_folder):
    """The calls and the files of an extraction that nothing disturbs."""
    cache = tmp_path_factory.mktemp("undisturbed") / "c"
    calls = fork(counting, extract, cache, image_folder).ok().value
    assert {phase_of(call) for call in calls} == {phase for phase, _ in PHASES}
    return calls, contents(cache)


def die_and_resume(deaths: list[str], seed: int, n: int, undisturbed, image_folder, tmp_path, fell) -> None:
    """Die at the seed-th of `n` points spread over all calls, in two cases of three again when resumed, then resume."""
    calls, expected = undisturbed
    cache, draw = tmp_path / "c", random.Random(f"{deaths} {seed}")
    points = [seed * len(calls) // n, *(draw.randrange(len(calls)) for _ in range(draw.randrange(3)))]
    for number, point in enumerate(points):
        ended = fork(dying, extract, cache, point, draw.choice(deaths), image_folder)
        shutil.rmtree(f"{cache}.stash", ignore_errors=True)
        if number and not ended.code:
            break  # there was less left to do than that
        assert ended.code == EXIT and "Traceback" not in ended.output, ended.output
        call = ended.output.splitlines()[-1].removeprefix(f"{DIED} ")
        assert number or phase_of(call) == phase_of(calls[point])  # a folder is not listed in the same order everywhere
        fell("again, resuming" if number else phase_of(call))
    fork(extract, cache, image_folder).says(code=0)
    found = contents(cache)
    assert found.keys() == expected.keys(), ended.output
    assert [name for name in expected if found[name] != expected[name]] == [], ended.output


N = 1000


@pytest.mark.soak("kill at every write, fsync, rename, mkdir, unlink of crop stage and extraction", full=N, short=8)
def test_killed(seed, undisturbed, image_folder, tmp_path, fell):
    """Killed at any call that changes the disk, half of a write written: resumed, all files are those of an undisturbed run."""
    die_and_resume(["kill"], seed, N, undisturbed, image_folder, tmp_path, fell)


@pytest.mark.soak("power cut at every such call: all that was not fsynced is lost", full=N, short=8)
def test_power_cut(seed, undisturbed, image_folder, tmp_path, fell):
    """The same when the power is cut: unsynced data, names, renames and removals are lost."""
    die_and_resume(["power", "power", "power", "harsh"], seed, N, undisturbed, image_folder, tmp_path, fell)
