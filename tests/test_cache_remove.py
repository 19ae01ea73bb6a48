"""Removing a view or a store: what is asked for and nothing else, never the half of it, never under a writer's hands."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from cache_fakes import contents
from click.testing import CliRunner

import teacher_cache.cli.remove
from teacher_cache.cache import Cache
from teacher_cache.checking.advice import mending_commands
from teacher_cache.checking.findings import Finding
from teacher_cache.checking.verify import verify
from teacher_cache.cli.main import main
from teacher_cache.errors import MismatchError, NotInCacheError, UnknownNameError, UsageError
from teacher_cache.extraction import remove
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.extraction.remove import remove_store, remove_view
from teacher_cache.files.claims import claimed
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.layout import CROPS_CLAIM, store_claim, store_claims
from teacher_cache.inspecting.inspect import describe

REMOVALS = {
    "view": (["--view", "1"], lambda name: name.startswith("view-001/")),
    "store": (["--store", "fake"], lambda name: "/fake.zarr/" in name),
    "both": (["--store", "fake", "--view", "1"], lambda name: name.startswith("view-001/fake.zarr/")),
}
"""Options, and whether they take a file away."""


def run(*arguments, code=0, **options) -> str:
    """What the command says. A traceback is a failure of the test."""
    result = CliRunner().invoke(main, ["remove", *map(str, arguments)], **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("what", REMOVALS)
def test_what_goes_and_what_stays(cache, what):
    """What was asked for is gone, its bytes were said, and every other file has its bytes."""
    options, goes = REMOVALS[what]
    before = contents(cache.path)
    expected = {name: data for name, data in before.items() if not goes(name)}
    said = run(*options, "--yes", cache.path)
    assert contents(cache.path) == expected and len(expected) < len(before)
    n_bytes = sum(len(data) for name, data in before.items() if goes(name))
    assert f": {n_bytes / 1e3:.3g} kB" in said and "can no longer be resumed" in said and "Removed" in said
    if what != "both":  # then view 0 has a store that view 1 has not, which verify tells
        assert verify(cache)[0] == []


def test_a_removed_store_is_made_again(cache, teacher):
    """What was removed from all views, or from one, is extracted again to the same bytes."""
    before = contents(cache.path)
    for view in (None, 1):
        remove_store(cache.path, "fake", view)
        for number in (0, 1):
            extract_view(cache.view(number), "fake", teacher, ExtractPlan(shard_rows=8, batch_size=5))
        assert contents(cache.path) == before


REFUSED = {
    "nothing said": ((), UsageError, "Say what to remove"),
    "no such view": ((2,), NotInCacheError, "has no view 2; it has 0, 1"),
    "a view before others": ((0,), UsageError, "is not the last one"),
    "no such store": ((None, "dino"), UnknownNameError, "has no store dino; it has fake, fake-zstd, fake16"),
    "no such store in a view": ((1, "dino"), UnknownNameError, "View 1 of"),
    "a store in no such view": ((7, "fake"), NotInCacheError, "has no view 7"),
    "a store that later views have": ((0, "fake"), UsageError, "Give --view 1, or leave --view out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(cache, case):
    """What is not there, or would leave a gap, is refused with what would be right; nothing is touched."""
    asked, error, words = REFUSED[case]
    before = contents(cache.path)
    with pytest.raises(error, match=words):
        remove.plan_removal(cache, *asked)
    assert contents(cache.path) == before


def test_the_only_view(cache):
    """Without any view there is no cache: the message gives the command that removes the whole folder."""
    remove_view(cache, 1)
    with pytest.raises(UsageError, match="is the only one.* rm -r "):
        remove_view(cache, 0)
    assert [view.number for view in Cache(cache.path).views()] == [0]


def test_links_are_left_alone(cache, tmp_path):
    """A store or a view that is a link is not followed."""
    elsewhere = shutil.move(cache.path / "view-001" / "fake.zarr", cache.path / "view-000" / "kept.zarr")
    (cache.path / "view-001" / "fake.zarr").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="is a symbolic link"):
        remove_store(cache, "fake")
    shutil.move(cache.path / "view-001", tmp_path / "moved")
    (cache.path / "view-001").symlink_to(tmp_path / "moved")
    before = contents(tmp_path / "moved")
    with pytest.raises((NotInCacheError, UsageError, OSError)):
        remove_view(cache, 1)
    assert contents(tmp_path / "moved") == before


def test_damaged_views_can_go(cache):
    """The last view can be removed also when it has lost the files by which it is read."""
    (cache.path / "view-001" / "checksums.json").unlink()
    (cache.path / "view-001" / "fake.zarr" / "store.json").unlink()
    remove_view(cache, 1)
    assert verify(cache)[0] == []


# --- asking ----------------------------------------------------------------------------------------------------------


def test_without_a_terminal(cache):
    """Where nobody can be asked, and --yes is not given, nothing is removed: exit code 2."""
    before = contents(cache.path)
    said = run("--view", 1, cache.path, code=2)
    assert "Give --yes" in said and contents(cache.path) == before


@pytest.mark.parametrize(("answer", "goes"), [("n\n", False), ("\n", False), ("y\n", True)])
def test_asking(cache, monkeypatch, answer, goes):
    """At a terminal it says what goes, asks, and goes by the answer; no answer is no."""
    monkeypatch.setattr(teacher_cache.cli.remove, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    said = run("--view", 1, cache.path, input=answer)
    assert "Remove it?" in said and ("Nothing was removed" in said) is not goes
    assert (cache.path / "view-001").exists() is not goes


# --- writers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", REMOVALS)
def test_beside_a_writer(cache, what):
    """Refused, with the writer's host and process, while anybody begins a store, makes its shards, or makes crops."""
    options, _ = REMOVALS[what]
    store, before = cache.path / "view-001" / "fake.zarr", contents(cache.path)
    writers = {
        "store": lambda: claimed(store_claim(store), "x"),
        "shards": lambda: claimed_range(store_claims(store), 2, 3, "x"),
        "a new store": lambda: claimed(store_claim(store.with_name("new.zarr")), "x"),
        "crops": lambda: claimed(cache.path / CROPS_CLAIM, "x"),
    }
    expected = {"store", "shards", "a new store", "crops"} if what == "view" else {"store", "shards"}
    for writer in expected:
        with writers[writer]():
            assert "process" in run(*options, "--yes", cache.path, code=2)
        assert contents(cache.path) == before, writer


def test_a_writer_that_comes_in_between(cache, monkeypatch):
    """Who begins to write in a view just before it is renamed is found in it: the view is put back."""
    before, publish = contents(cache.path), remove.publish
    with ExitStack() as held:

        def late(folder, aside):
            if folder.name == "view-001":
                held.enter_context(claimed(folder / "new.zarr.claim", "The store new"))
            publish(folder, aside)

        monkeypatch.setattr(remove, "publish", late)
        with pytest.raises(MismatchError, match="is being written by process"):
            remove_view(cache, 1)
    monkeypatch.undo()
    assert contents(cache.path) == before
    remove_view(cache, 1)


def test_a_cache_that_changed_while_it_was_asked(cache):
    """What was agreed to is what goes: a view that came in between is noticed under the claims."""
    planned = remove.plan_removal(cache, 1), remove.plan_removal(cache, 1, "fake")
    shutil.copytree(cache.path / "view-001", cache.path / "view-002")
    before = contents(cache.path)
    for removal in planned:
        with pytest.raises((MismatchError, UsageError), match="View 1 .* not the last one|View 2 .* has targets of fake too"):
            removal.carry_out()
    assert contents(cache.path) == before


def test_beside_an_unfinished_crop_stage(cache):
    """While parts of a crop stage are waiting for the rest, no view is removed: they would not fit any more."""
    (cache.path / "crops.partial" / "view-002").mkdir(parents=True)
    with pytest.raises(UsageError, match="begun and not finished"):
        remove_view(cache, 1)


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", REMOVALS)
def test_killed_while_it_deletes(cache, monkeypatch, what):
    """What is half deleted is read by nobody, is named by verify and inspect, and is removed by the same command."""
    options, goes = REMOVALS[what]
    expected = {name: data for name, data in contents(cache.path).items() if not goes(name)}

    def half(folder):
        shutil.rmtree(next(path for path in folder.rglob("*") if path.is_dir()))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remove, "remove_folder", half)
        said = run(*options, "--yes", cache.path, code=130)
    assert "the same command removes the rest" in said
    (left,) = describe(Cache(cache.path))["left_over"]
    assert left in CliRunner().invoke(main, ["inspect", str(cache.path)]).output.replace("\n", "")
    findings, _ = verify(Cache(cache.path))
    assert {finding.kind for finding in findings} == {"unfinished"} and f"{cache.path}/{left}" in {f.path for f in findings}
    assert mending_commands(cache.path, [Finding("damaged", str(cache.path / "images.txt"), "")]) != []
    run(*options, "--yes", cache.path)
    assert contents(cache.path) == expected
    assert "has no" in run(*options, "--yes", cache.path, code=1 if what == "view" else 2)
