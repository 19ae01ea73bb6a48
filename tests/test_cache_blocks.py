"""The next free block of shards: nobody gets what another has, the dead give back, what fails often is left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from store_fakes import begin, fill, spec_of, values_of

from teacher_cache.errors import BadInputError, ClaimLostError, NoSpaceError
from teacher_cache.files import claim_file
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.layout import store_claims
from teacher_cache.sharing.blocks import MOST_SHARDS, TRIES, Blocks, Look
from teacher_cache.store import failures
from teacher_cache.store.failures import Failure
from teacher_cache.store.store import Store

FAILURE = Failure(0, "x", "h", 1, "t")


def look(n_shards: int, *held: range, failed: dict[int, int] | None = None) -> Look:
    return Look(tuple(range(n_shards)), held, {shard: [FAILURE] * n for shard, n in (failed or {}).items()})


@pytest.fixture
def store(tmp_path) -> Store:
    """Ten shards of three rows, none of them made."""
    begin(tmp_path / "s.zarr", spec_of(n_rows=30))
    return Store.open(tmp_path / "s.zarr")


def make(store: Store, shards) -> None:
    fill(store.path, store.spec, values_of(store.spec), shards)


# --- which block is next -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stands", "expected"),
    [
        (look(10), range(0, 5)),
        (look(10, range(0, 5)), range(5, 7)),  # five are free, two work
        (look(10, range(0, 5), range(5, 7)), range(7, 8)),
        (look(10, range(2, 4)), range(0, 2)),  # up to what another has
        (look(1000), range(0, MOST_SHARDS)),
        (look(10, range(0, 1 << 62)), None),  # a claim that does not say of what
        (look(0), None),
        (look(10, failed={0: 1}), range(0, 1)),  # what has failed is tried alone
        (look(10, failed={2: 1}), range(0, 2)),
        (look(10, failed={0: TRIES}), range(1, 6)),
        (look(1, failed={0: TRIES}), None),
    ],
)
def test_the_next_block(stands, expected):
    """A block is a run of free shards, no longer than the rest shared out twice over; what failed is alone, or left."""
    assert stands.next_block() == expected


def test_blocks_shrink():
    """Three that take turns get ever smaller blocks, the last ones of one shard, and every shard once."""
    missing, taken = list(range(100)), []
    while missing:
        block = Look(tuple(missing), tuple(taken[-2:]), {}).next_block()
        taken.append(block)
        missing = [shard for shard in missing if shard not in block]
    sizes = [len(block) for block in taken]
    assert [shard for block in taken for shard in block] == list(range(100))
    assert sizes[0] == 32 and sizes[-3:] == [1, 1, 1] and sorted(sizes[1:], reverse=True) == sizes[1:]


def test_own_failures_come_last():
    """Who has failed on a shard leaves it to others while there is anything else."""
    assert look(3, failed={0: 1}).next_block(avoid={0}) == range(1, 3)
    assert look(1, failed={0: 1}).next_block(avoid={0}) == range(0, 1)


# --- taking it ---------------------------------------------------------------------------------------------------------


def test_two_share_a_store(store):
    """While one holds a block another gets the next, by its claim on disk; in the end nothing is free, and no claim left."""
    with Blocks(store) as one, Blocks(store) as other:
        with one.next() as first, other.next() as second:
            assert (first, second) == (range(0, 5), range(5, 7))
            assert other.holders == [f"process {os.getpid()} on host {socket.gethostname()}"]
            make(store, first)
        with other.next() as third:  # the second was given back
            assert third == range(5, 8)
            make(store, range(5, 10))
        with one.next() as nothing:
            assert nothing is None and one.look.missing == ()
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["s.zarr"]


def test_waiting_writes_nothing(store):
    """Who finds nothing free leaves no trace, however often it asks."""
    with claimed_range(store_claims(store.path), 0, 10, "x"), Blocks(store) as blocks:
        before = {path: path.stat().st_mtime_ns for path in [*store.path.parent.rglob("*"), store_claims(store.path)]}
        for _ in range(3):
            with blocks.next() as shards:
                assert shards is None and blocks.look.in_work == list(range(10))
        assert before == {path: path.stat().st_mtime_ns for path in [*store.path.parent.rglob("*"), store_claims(store.path)]}


def test_the_dead_give_back(store):
    """What a killed process had not finished is free at once, and its death is on record against the shard it was at."""
    code = (
        "import sys, os; from pathlib import Path; from teacher_cache.files.range_claims import claimed_range\n"
        "with claimed_range(Path(sys.argv[1]), 0, 4, 'x'): os._exit(9)"
    )
    died = subprocess.Popen([sys.executable, "-c", code, str(store_claims(store.path))])
    died.wait()
    make(store, [0])
    with Blocks(store) as blocks, blocks.next() as shards:
        (failure,) = failures.read(store.path)
        words = f"process {died.pid} on host {socket.gethostname()} died while it worked on it"
        assert (shards, failure.shard, failure.error, failure.pid) == (range(1, 2), 1, words, died.pid)


def test_who_cannot_be_seen_is_watched(store, monkeypatch):
    """The claim of another host holds its block until it has not moved for five minutes of the watcher's clock."""
    clock = [1000.0]
    monkeypatch.setattr(claim_file, "now", lambda: clock[0])
    folder = store_claims(store.path)
    folder.mkdir()
    told = {"host": "node-17", "pid": 4711, "boot": "b", "token": "0" * 16, "locked": True, "beat": "000000000007"}
    (folder / f"000000-000010.{told['token']}.claim").write_text(json.dumps(told))
    with Blocks(store) as blocks:
        for seconds, expected in ((0, None), (299, None), (1, range(0, 1))):
            clock[0] += seconds
            with blocks.next() as shards:
                assert shards == expected
                assert [failure.host for failure in failures.read(store.path)] == ["node-17"] * (expected is not None)


# --- failures ----------------------------------------------------------------------------------------------------------


def fail(blocks: Blocks, error: Exception) -> None:
    with pytest.raises(type(error)), blocks.next():
        raise error


def test_three_failures(store):
    """A shard that fails three times is left and told of; the others are made, and a block that is made forgets its failures."""
    make(store, range(0, 8))
    with Blocks(store) as blocks:
        fail(blocks, BadInputError("row 24 is bad"))
        fail(blocks, ValueError("row 27 too"))  # its own failure comes last
        fail(blocks, BadInputError("row 24 is bad"))
        assert [(f.shard, f.error) for f in failures.read(store.path)] == [
            (8, "row 24 is bad"), (8, "row 24 is bad"), (9, "ValueError: row 27 too"),
        ]  # fmt: skip
        fail(blocks, BadInputError("row 24 is bad"))
        with blocks.next() as shards:
            assert (blocks.look.left, shards) == ([8], range(9, 10))
            make(store, shards)
        with blocks.next() as shards:
            assert (blocks.look.left, blocks.look.in_work, shards) == ([8], [], None)
    assert {f.shard for f in failures.read(store.path)} == {8}
    failures.forget(store.path)
    with Blocks(store) as blocks, blocks.next() as shards:
        assert shards == range(8, 9)


@pytest.mark.parametrize(
    "error", [NoSpaceError("full"), OSError(28, "No space left on device"), ClaimLostError("gone"), MemoryError()], ids=repr
)
def test_what_no_shard_is_to_blame_for(store, error):
    """A full disk, or work that another has taken over, is on record, and is not counted against a shard."""
    with Blocks(store) as blocks:
        for _ in range(TRIES + 1):
            fail(blocks, error)
        with blocks.next() as shards:
            assert shards == range(0, 5)
            assert [f.counts for f in failures.read(store.path)] == [False] * (TRIES + 1)


def test_an_interrupt_is_no_failure(store):
    """Stopped, a process gives its block back, and nothing is on record."""
    with Blocks(store) as blocks:
        with pytest.raises(KeyboardInterrupt), blocks.next():
            raise KeyboardInterrupt
        assert failures.read(store.path) == [] and list(store_claims(store.path).glob("*.claim")) == []


def test_damaged_records_are_no_obstacle(store):
    """What is no record of a failure is left out, and goes when all are forgotten if it has the name of one."""
    store_claims(store.path).mkdir()
    for name, text in (("000001.0123456789abcdef.failed", "{"), ("000002.0123456789abcdef.failed", "[]"), ("x.failed", "{}")):
        (store_claims(store.path) / name).write_text(text)
    assert failures.read(store.path) == []
    failures.forget(store.path)
    assert [path.name for path in store_claims(store.path).iterdir()] == ["x.failed"]


def test_the_rate_is_in_the_claim(store):
    """A worker's rate stands in its claim at once when it takes the next block, and after the next beat in the one it holds."""
    with Blocks(store) as blocks:
        blocks.report(12.5)
        with blocks.next() as shards:
            (path,) = store_claims(store.path).glob("*.claim")
            assert claim_file.find(path).holder["rate"] == "00000012.500"
            before = path.stat().st_size
            blocks.report(1e12)
            blocks._own.move()
            assert claim_file.find(path).holder["rate"] == "99999999.000" and path.stat().st_size == before
            assert claim_file.find(path).holder["since"].endswith("Z") and shards == range(0, 5)
