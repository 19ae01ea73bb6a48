"""A removal that dies anywhere: each folder is whole or gone, and the same command removes the rest."""

from __future__ import annotations

import shutil

import pytest
import warm
from cache_fakes import contents
from deaths import EXIT, counting, dying
from forks import fork

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.inspecting.inspect import describe

REMOVALS = {"view": ("--view", 1), "store": ("--store", "fake"), "both": ("--store", "fake", "--view", 1)}
FOLDERS = {"view": ["view-001"], "store": ["view-000/fake.zarr", "view-001/fake.zarr"], "both": ["view-001/fake.zarr"]}
"""Folders that go."""


def remove(cache, what: str) -> None:
    """`teacher-cache remove`; ends the process."""
    warm.run_program("teacher-cache", "remove", *REMOVALS[what], "--yes", cache)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shared_cache) -> dict[str, tuple[int, dict[str, bytes]]]:
    """By what is removed: the calls of a removal that nothing disturbs, and the files that it leaves."""
    found = {}
    for what in REMOVALS:
        cache = shutil.copytree(shared_cache.path, tmp_path_factory.mktemp("undisturbed") / "c")
        n_calls = len(fork(counting, remove, cache, what).ok().value)
        found[what] = n_calls, contents(cache)
    return found


@pytest.mark.soak("kill or power cut at every call of a removal that changes the disk", full=600, short=6)
def test_removal_dies(seed, undisturbed, shared_cache, tmp_path, fell):
    """Killed, or with the power cut: what stays is untouched, what goes is whole, gone or left over under a name that verify and
    inspect tell; the same command again leaves what an undisturbed one leaves."""
    what, death = list(REMOVALS)[seed % 3], ["kill", "power"][seed // 3 % 2]
    (n_calls, expected), whole = undisturbed[what], contents(shared_cache.path)
    cache = shutil.copytree(shared_cache.path, tmp_path / "c")
    ended = fork(dying, remove, cache, seed * n_calls // 600, death, what)
    shutil.rmtree(f"{cache}.stash", ignore_errors=True)
    assert ended.code == EXIT and "Traceback" not in ended.output, ended.output

    found, left = contents(cache), describe(Cache(cache))["left_over"]
    assert expected.items() <= found.items()
    for folder in FOLDERS[what]:
        names = {name for name in whole if name.startswith(f"{folder}/")}
        assert names & found.keys() in (names, set()), folder
    findings = verify(Cache(cache), sample=1)[0]
    assert {finding.kind for finding in findings} <= {"unfinished"}
    assert {f"{cache}/{name}" for name in left} <= {finding.path for finding in findings}
    fell("left over" if left else "whole" if whole.keys() <= found.keys() else "gone")

    again = fork(remove, cache, what)
    is_done = not left and not any(name.startswith(f"{folder}/") for folder in FOLDERS[what] for name in found)
    assert again.code == (1 if is_done else 0) or is_done and again.code == 2, again.output
    assert {name: data for name, data in contents(cache).items() if ".claim" not in name} == expected
    assert describe(Cache(cache))["left_over"] == []
