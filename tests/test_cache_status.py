"""status: what is made, in work, free and failed, and who works; from the disk alone, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import socket

import pytest
from cache_fakes import contents
from click.testing import CliRunner

from teacher_cache.cli import status as command
from teacher_cache.cli.main import main
from teacher_cache.extraction.cropping import plan_job
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.files import claim_file
from teacher_cache.files.claims import claimed
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.layout import CROPS_CLAIM, store_claim, store_claims
from teacher_cache.inspecting.status import Watcher
from teacher_cache.sharing.blocks import Blocks
from teacher_cache.store import failures
from teacher_cache.store.failures import Failure
from teacher_cache.store.store import Store

HOST = socket.gethostname()
ELSEWHERE = {"host": "node-17\x1b[31m", "pid": 4711, "boot": "b", "token": "0" * 16, "locked": True,
             "since": "2026-11-28T13:25:09Z", "rate": "00000024.000", "beat": "000000000007"}  # fmt: skip


@pytest.fixture
def begun(cache, teacher):
    """A cache with a store `half` in view 0: shards 0 to 2 of 12 are made."""
    extract_view(cache.view(0), "half", teacher, ExtractPlan("last", shard_rows=2, batch_size=2), range(0, 3))
    return cache


def half(found: dict) -> dict:
    return next(store for store in found["views"][0]["stores"] if store["name"] == "half")


def claim_elsewhere(store, beat: int = 7) -> None:
    path = store_claims(store) / f"000009-000012.{ELSEWHERE['token']}.claim"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**ELSEWHERE, "beat": f"{beat:012d}"}))


def test_a_store_at_work(begun):
    """Shards made, in work and free add up; workers have host, rate and time, failures their last error. Nothing is written."""
    path = begun.view(0).store_path("half")
    claim_elsewhere(path)
    with Blocks(Store.open(path)) as blocks:
        blocks.report(12.0)
        with blocks.next() as shards:
            assert shards == range(3, 5)
            for n, error in enumerate(["first", "then\nthis"]):
                failures.record(path, Failure(6, error, "node-3", 7, f"2026-11-28T13:0{n}:00Z"))
            before = contents(begun.path)
            result = CliRunner().invoke(main, ["status", str(begun.path), "--json"])
            found = json.loads(result.stdout)
            said = CliRunner().invoke(main, ["status", str(begun.path)]).stdout.splitlines()
            assert contents(begun.path) == before
    store = half(found)
    assert (store["shards"], store["made"], store["in_work"], store["free"]) == (12, 3, 5, 4) and not found["is_done"]
    assert (store["rows"], store["rows_made"], store["rate"], store["left_s"]) == (24, 6, 36.0, 0.5)
    here, there = store["workers"]
    assert (here["host"], here["pid"], here["shards"], here["rate"], here["is_seen"]) == (HOST, os.getpid(), [3, 5], 12.0, True)
    assert (there["host"], there["shards"], there["since"], there["is_seen"]) == (
        "node-17?[31m", [9, 12], "2026-11-28T13:25:09Z", False,
    )  # fmt: skip
    (failed,) = store["failed"]
    assert (failed["shards"], failed["times"], failed["error"], failed["is_left"]) == ([6, 7], 2, "then this", False)
    at = said.index("view 0  half  3 of 12 shards made, 5 in work, 4 free, 36 crops/s, 0:00:00 left")
    assert re.fullmatch(rf"  shards 3:5  process {os.getpid()} on host {HOST} since [\dT:-]+Z, 12 crops/s", said[at + 1])
    assert said[at + 2].endswith("since 2026-11-28T13:25:09Z, 24 crops/s, if it still lives: --watch sees")
    assert said[at + 3] == "  shards 6:7  failed 2 of 3 times: then this (process 7 on host node-3, 2026-11-28T13:01:00Z)"


def test_who_moves_is_seen(begun, monkeypatch):
    """A worker of another host is seen to live when it moves between two looks, and gone when it has not for five minutes."""
    clock = [1000.0]
    monkeypatch.setattr(claim_file, "now", lambda: clock[0])
    path, watcher = begun.view(0).store_path("half"), Watcher(begun.path)
    seen = []
    for seconds, beat in ((0, 7), (20, 8), (20, 9), (300, 9)):
        clock[0] += seconds
        claim_elsewhere(path, beat)
        store = half(watcher.look())
        seen.append(([worker["is_seen"] for worker in store["workers"]], store["in_work"], store["free"]))
    assert seen == [([False], 3, 6), ([True], 3, 6), ([True], 3, 6), ([], 0, 9)]


def test_left_shards(begun):
    """What failed three times is not free, and is called left; a failure that no shard is to blame for does not count."""
    path = begun.view(0).store_path("half")
    store_claims(path).mkdir()
    for shard, counts in ((5, True), (5, True), (5, True), (7, False)):
        failures.record(path, Failure(shard, "x", "h", 1, "t", counts))
    store = half(Watcher(begun.path).look())
    assert (store["free"], store["left"], [failed["times"] for failed in store["failed"]]) == (8, [[5, 6]], [3, 0])
    assert "  shards 5:6  left: x (process 1 on host h, t)" in CliRunner().invoke(main, ["status", str(begun.path)]).stdout


def test_a_store_being_begun(begun):
    """While its quantiser is being fitted a store is told of by its claim alone."""
    path = begun.view(1).store_path("new")
    with claimed(store_claim(path), "x"):
        store = next(s for s in Watcher(begun.path).look()["views"][1]["stores"] if s["name"] == "new")
        assert (store["is_begun"], store["free"], store["claimed_by"][0]["pid"]) == (False, None, os.getpid())
        assert "view 1  new  being begun" in CliRunner().invoke(main, ["status", str(begun.path)]).stdout


def test_the_crop_stage(image_folder, tmp_path):
    """Before there is a cache: how many parts are cut, and who is at it, or that nobody is."""
    job = plan_job(tmp_path / "c", image_folder, CropPlan(size=32), "jpeg95", 2)
    (tmp_path / "c").mkdir()
    with claimed(tmp_path / "c" / CROPS_CLAIM, "x"):
        job.work.begin(job.identity)
        (tmp_path / "c/crops.partial/view-000/000000.json").touch()
        crops = Watcher(tmp_path / "c").look()["crops"]
        assert (crops["images"], crops["views"], crops["workers"][0]["pid"]) == (24, {"0": [1, 1], "1": [0, 1]}, os.getpid())
    said = CliRunner().invoke(main, ["status", str(tmp_path / "c")]).stdout
    assert "24 images, crops are being made\nview 0  1 of 1 parts cut\nview 1  0 of 1 parts cut\n  nobody is at it" in said
    none = CliRunner().invoke(main, ["status", str(tmp_path), "--json"])
    assert none.exit_code == 2 and "is no cache" in json.loads(none.stdout)["error"]


def test_watching(begun, teacher, monkeypatch):
    """--watch looks again until all is made; with --json a line a look."""

    def sleep(seconds: float) -> None:
        assert seconds == 0.25
        extract_view(begun.view(0), "half", teacher, ExtractPlan("last", shard_rows=2, batch_size=2))

    monkeypatch.setattr(command.time, "sleep", sleep)
    result = CliRunner().invoke(main, ["status", str(begun.path), "--watch", "--every", "0.25", "--json"])
    assert result.exit_code == 0
    looks = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(look["is_done"], half(look)["made"]) for look in looks] == [(False, 3), (True, 12)]
