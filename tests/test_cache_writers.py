"""verify beside a writer: what somebody works on is unfinished, by whom is said, and nothing of it is called damaged."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading

import pytest
from cache_fakes import CHANGES, crop_folder, flip_bit
from click.testing import CliRunner
from store_fakes import compress

from teacher_cache.cache import Cache
from teacher_cache.checking import verify as verify_module
from teacher_cache.checking.advice import mending_commands
from teacher_cache.checking.repair import repair_lists, repair_store, repair_view
from teacher_cache.checking.verify import verify, verify_folder
from teacher_cache.checking.writers import Snapshot
from teacher_cache.cli.main import main
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.files.claims import claimed, holder_of
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.layout import CROPS_CLAIM, store_claim, store_claims

ME = f"process {os.getpid()} on host {socket.gethostname()}"
PLAN = ExtractPlan("last", shard_rows=8)


@pytest.fixture(scope="module")
def small(image_folder, teacher, tmp_path_factory) -> Cache:
    """One view, one compressed int8 store of one layer."""
    cache = crop_folder(tmp_path_factory.mktemp("small") / "c", image_folder)
    extract_view(cache.view(0), "fake", teacher, PLAN)
    compress(cache.view(0).store_path("fake"))
    return cache


@pytest.fixture
def copy(small, tmp_path) -> Cache:
    return Cache(shutil.copytree(small.path, tmp_path / "c"))


def at_every_step(act, look) -> int:
    """Run `act`, and `look` at the disk before each of its changes and after the last; returns how often that was."""
    n_looks, is_looking = 0, False

    def looking(change):
        def wrapper(*arguments, **options):
            nonlocal n_looks, is_looking
            if not is_looking:
                is_looking, n_looks = True, n_looks + 1
                look()
                is_looking = False
            return change(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, looking(getattr(os, name)))
        act()
    look()
    return n_looks


def require_unfinished(findings) -> None:
    """Nothing that a writer is at is called anything but unfinished, and every claim that is held is named."""
    assert {finding.kind for finding in findings} <= {"unfinished"}, findings


def damaged_shard(cache: Cache) -> None:
    flip_bit(cache.view(0).store_path("fake") / "tokens/06/c.1.0.0", 900)


def test_beside_an_extraction(small, tmp_path, image_folder, teacher):
    """At each step of crops and extraction, from an empty folder to a complete store, a cache is unfinished or sound."""
    cache_dir, told = tmp_path / "c", []

    def look():
        if any(holder_of(claim) for claim in cache_dir.glob("**/*.claim")) or (cache_dir / "cache.json").exists():
            findings, _ = verify_folder(cache_dir)
            require_unfinished(findings)
            told.append({finding.holder for finding in findings})

    n_looks = at_every_step(lambda: extract_view(crop_folder(cache_dir, image_folder).view(0), "fake", teacher, PLAN), look)
    assert n_looks > 60 and sum(ME in holders for holders in told) > 60 and told[-1] == set()


def test_beside_a_repair(copy, image_folder):
    """At each step of a repair, what is being mended is unfinished, and the damage is not told as long as it is at work."""
    for name in ("images.txt", "view-000/crops.npy", "view-000/fake.zarr/zarr.json"):
        (copy.path / name).unlink()
    flip_bit(copy.path / "view-000/crops.beton", 9)
    damaged_shard(copy)
    view, told = copy.view(0), []

    def repair():
        for _ in (*repair_lists(copy.path), *repair_view(view, image_folder), *repair_store(view, "fake")):
            pass

    def look():
        findings, _ = verify(copy)
        crops, store = holder_of(copy.path / CROPS_CLAIM), holder_of(store_claim(view.store_path("fake")))
        for finding in findings:
            assert finding.kind == "unfinished" or not (store if ".zarr" in finding.path else crops), finding
        told.append({finding.holder for finding in findings})

    assert at_every_step(repair, look) > 20 and ME in set().union(*told)


@pytest.mark.parametrize("moment", range(1, 5))
def test_changes_while_it_is_checked(copy, teacher, image_folder, moment, monkeypatch):
    """A writer that comes, or comes and goes, between two of its steps makes verify say that it looked at something else."""
    store = copy.view(0).store_path("fake")
    shutil.rmtree(store)

    checks, n = verify_module._checks, 0

    def interrupted(*arguments):
        nonlocal n
        for folder, check in checks(*arguments):
            n += 1
            if n == moment:
                extract_view(copy.view(0), "fake", teacher, PLAN)
            yield folder, check

    monkeypatch.setattr(verify_module, "_checks", interrupted)
    (finding,) = verify(copy)[0]
    assert (finding.kind, finding.path, finding.holder) == ("unfinished", str(store), "a writer")
    assert finding.message == "somebody wrote to it while it was checked. Run verify again."


def test_finished_shards_are_judged_beside_a_writer(copy):
    """Who makes other shards of a store hides no damage in the finished ones; who repairs or completes it does."""
    damaged_shard(copy)
    store = copy.view(0).store_path("fake")
    with claimed_range(store_claims(store), 0, 1, "x"):
        found, _ = verify(copy)
    assert [finding.kind for finding in found] == ["unfinished", "damaged"] and found[1].path.endswith("c.1.0.0")
    assert found[0].path == str(store) and found[0].holder == ME
    with claimed(store_claim(store), "x"):
        (finding,) = verify(copy)[0]
    assert finding.kind == "unfinished" and finding.message == f"{ME} is at work on it. Run verify again when that is done."
    assert mending_commands(copy.path, [finding]) == []


def test_a_store_is_not_hidden_by_another(copy, teacher):
    """A writer of one store does not keep verify from judging the lists, the crops and the other stores."""
    damaged_shard(copy)
    flip_bit(copy.path / "labels.npy", 999)
    with claimed(store_claim(copy.view(0).store_path("new")), "x"):
        kinds = [(finding.kind, finding.path.removeprefix(f"{copy.path}/")) for finding in verify(copy)[0]]
    assert kinds == [
        ("unfinished", "view-000/new.zarr"), ("damaged", "labels.npy"), ("damaged", "view-000/fake.zarr/tokens/06/c.1.0.0"),
    ]  # fmt: skip


def test_a_writer_elsewhere(copy):
    """A claim of another host, which cannot be seen, is respected; verify says that it may be gone, unless it moves meanwhile."""
    (copy.path / CROPS_CLAIM).write_text(json.dumps({"host": "node-17", "pid": 4711}))
    flip_bit(copy.path / "labels.npy", 999)
    (finding,) = verify(copy)[0]
    who = "process 4711 on host node-17"
    assert finding.kind == "unfinished" and finding.holder.startswith(f"{who} (if it is still there: ")
    before = Snapshot(copy.path)
    (copy.path / CROPS_CLAIM).write_text(json.dumps({"host": "node-17", "pid": 4711, "beat": "000000000001"}))
    (finding,) = before.without_busy([])
    assert finding.message == f"{who} is at work on its lists and crops. Run verify again when that is done."


def test_command_beside_the_crop_stage(tmp_path):
    """A cache whose first crops are being cut is unfinished, code 1, with who cuts them; it is not `no cache`."""
    with claimed(tmp_path / CROPS_CLAIM, "x"):
        result = CliRunner().invoke(main, ["verify", "--json", str(tmp_path)])
    (finding,) = json.loads(result.stdout)["findings"]
    assert result.exit_code == 1 and finding["kind"] == "unfinished" and finding["holder"] == ME
    assert CliRunner().invoke(main, ["verify", str(tmp_path)]).exit_code == 2


def test_looking_refuses_no_writer(tmp_path):
    """However often somebody looks who holds a claim, whoever wants it gets it."""
    over = threading.Event()

    def look():
        while not over.is_set():
            for claim in (tmp_path / "claim", tmp_path / "claims" / "000000-000001.claim"):
                holder_of(claim)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(100):
            with claimed(tmp_path / "claim", "x"), claimed_range(tmp_path / "claims", 0, 1, "x"):
                assert holder_of(tmp_path / "claim") == ME
    finally:
        over.set()
        for looker in lookers:
            looker.join()
