"""Claims: one writer at a time, among real processes; the dead are no obstacle, and nobody is locked out or let in by a race."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from teacher_cache.errors import MismatchError
from teacher_cache.files import claim_file, claims
from teacher_cache.files.claims import claimed, extent_of
from teacher_cache.files.range_claims import claimed_range

HOST = socket.gethostname()
ELSEWHERE = {"host": "node-17", "pid": 4711}


@contextmanager
def holder(hold: str, *arguments):
    """A process that holds a claim while the block runs, unless it is killed before."""
    script = f"""
import sys
from pathlib import Path
from teacher_cache.files.claims import claimed
from teacher_cache.files.range_claims import claimed_range
arguments = [Path(sys.argv[1]), *map(int, sys.argv[2:]), "x"]
with {hold}(*arguments):
    print("held", flush=True)
    input()
"""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            process.communicate("\n")
            assert process.returncode == 0


def text_of(claim: Path) -> dict:
    """What the one holder of a claim has written."""
    (file,) = claim.iterdir()
    assert json.loads(file.read_text())["token"] == file.name
    return json.loads(file.read_text())


def kill(process) -> None:
    process.kill()
    process.wait()


# --- one holder ------------------------------------------------------------------------------------------------------


def test_a_living_process_keeps_its_claim(tmp_path):
    """While one process writes, another is refused with its process number and host; afterwards it may."""
    with holder("claimed", tmp_path / "claim") as process:
        words = f"The store is being written by process {process.pid} on host {HOST}. Wait for it, or stop it and try again"
        with pytest.raises(MismatchError, match=words), claimed(tmp_path / "claim", "The store"):
            pass
        kill(process)
    assert (tmp_path / "claim").exists()  # killed, it could not remove its claim
    with claimed(tmp_path / "claim", "The store"):
        said = text_of(tmp_path / "claim")
        assert (said["host"], said["pid"], said["boot"]) == (HOST, os.getpid(), claim_file.boot_id())
    assert not (tmp_path / "claim").exists()


def test_a_process_refuses_itself(tmp_path):
    """Two threads of one process cannot hold the same claim, and the refused one leaves it in place."""
    with claimed(tmp_path / "claim", "x"):
        with pytest.raises(MismatchError, match=f"by process {os.getpid()} "), claimed(tmp_path / "claim", "x"):
            pass
        assert (tmp_path / "claim").exists()


@pytest.mark.parametrize("text", ["", "garbage", "[]", '{"host": "here"}', json.dumps({"host": HOST, "pid": 1})])
def test_dead_claims_are_taken_over(tmp_path, text):
    """A claim that nobody holds is taken over, whatever stands in it, even if another process has its number now."""
    (tmp_path / "claim").write_text(text)
    with claimed(tmp_path / "claim", "x"):
        pass
    assert not (tmp_path / "claim").exists()


def test_claims_end_with_errors(tmp_path):
    """An error inside the block releases the claim."""
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), claimed(tmp_path / "claim", "x"):
            raise ZeroDivisionError


def test_waiting(tmp_path, monkeypatch):
    """With `wait` a claim is waited for, and the caller is told for whom; it has it as soon as the holder is gone."""
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    told = []
    with holder("claimed", tmp_path / "claim") as process:

        def wait(who):
            told.append(who)
            if len(told) == 3:
                kill(process)

        with claimed(tmp_path / "claim", "x", wait):
            assert text_of(tmp_path / "claim")["pid"] == os.getpid()
    assert told == [f"process {process.pid} on host {HOST}"] * 3


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_disjoint_ranges(tmp_path):
    """Processes share a store on disjoint ranges; any that overlaps is refused with host, process and the range held."""
    folder = tmp_path / "s.zarr.claims"
    with holder("claimed_range", folder, 0, 4) as first, holder("claimed_range", folder, 8, 12):
        with claimed_range(folder, 4, 8, "The store"):
            texts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.claim"))]
            assert [(text["first"], text["last"]) for text in texts] == [(0, 4), (4, 8), (8, 12)]
            assert (texts[0]["host"], texts[0]["pid"]) == (HOST, first.pid)
        for begin, end in ((0, 4), (3, 5), (0, 100), (1, 2), (-1, 1)):
            words = f"The store: shards 0:4 are being written by process {first.pid} on host {HOST}, and {begin}:{end} overlaps"
            with pytest.raises(MismatchError, match=words), claimed_range(folder, begin, end, "The store"):
                pass
        words = "shards 8:12 are .* Give --shards that nobody works on, wait for it, or stop it and try again"
        with pytest.raises(MismatchError, match=words), claimed_range(folder, 11, 12, "x"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_ranges_of_the_dead(tmp_path):
    """The claim of a killed process is no obstacle and goes away, whether its range is asked for or another."""
    folder = tmp_path / "claims"
    with holder("claimed_range", folder, 0, 4) as first, holder("claimed_range", folder, 4, 8) as second:
        kill(first)
        kill(second)
    (folder / "000008-000012.claim").write_text("cut sho")
    with claimed_range(folder, 2, 6, "x"):
        assert [extent_of(path) for path in folder.glob("*.claim")] == [(2, 6)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_ranges_end_with_errors(tmp_path, error):
    """An error inside the block releases the range and leaves nothing behind."""
    for _ in range(2):
        with pytest.raises(error), claimed_range(tmp_path / "claims", 0, 4, "x"):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_range_whose_store_goes_away(tmp_path):
    """Whoever deletes a store under its writer's hands may delete its claims too: leaving is no error."""
    (tmp_path / "view").mkdir()
    with claimed_range(tmp_path / "view" / "claims", 0, 4, "x"):
        shutil.rmtree(tmp_path / "view")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hold", [lambda path: claimed(path, "x"), lambda path: claimed_range(path, 0, 4, "x")])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_where_one_may_not_write(tmp_path, monkeypatch, hold, number):
    """A folder that cannot be written to is named, with what to do about it."""

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    words = rf"{os.strerror(number)}. Whoever writes leaves a claim there: let this user write to {tmp_path}, or work on a copy: "
    with pytest.raises(OSError, match=words) as caught, hold(tmp_path / "claim"):
        pass
    assert caught.value.errno == number


@pytest.mark.parametrize("hold", [lambda path: claimed(path, "x"), lambda path: claimed_range(path, 0, 4, "x")])
@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_a_symlink_is_no_claim(tmp_path, hold, target):
    """A symlink under the name of a claim is not followed: what it leads to keeps its bytes, and nothing is made there."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "claim").symlink_to(target)
    with pytest.raises(OSError), hold(tmp_path / "claim"):
        pass
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "nowhere").exists()


# --- races -----------------------------------------------------------------------------------------------------------

CONTENDER = """
import errno, fcntl, mmap, os, random, sys, time
from pathlib import Path
from teacher_cache.files.claims import ClaimHeldError, claimed, extent_of
from teacher_cache.files.range_claims import claimed_range

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
if sys.argv[4] == "no locks":
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock = flock
choose = random.Random(seed)
with open(folder / "board", "r+b") as file:
    board = mmap.mmap(file.fileno(), 8)
sys.stdin.readline()
n_held = 0
end = time.monotonic() + 1
while time.monotonic() < end:
    first = choose.randrange(8)
    last = choose.randrange(first, 8) + 1
    if sys.argv[3] == "claimed":
        first, last = 0, 8
        claim = claimed(folder / "claim", "x")
    else:
        claim = claimed_range(folder / "claims", first, last, "x")
    try:
        with claim:
            assert not any(board[first:last]), "two hold one shard"
            board[first:last] = bytes([seed]) * (last - first)
            if choose.random() < 0.5:
                time.sleep(0.001)
            assert set(board[first:last]) == {seed}, "two hold one shard"
            board[first:last] = bytes(last - first)
            n_held += 1
    except ClaimHeldError:
        pass
print(n_held)
"""


@pytest.mark.parametrize("locks", ["locks", "no locks"])
@pytest.mark.parametrize("hold", ["claimed", "claimed_range"])
def test_contenders(tmp_path, hold, locks):
    """Six processes that come and go as fast as they never hold the same shard, and leave nothing; without locks too."""
    (tmp_path / "board").write_bytes(bytes(8))
    contenders = [
        subprocess.Popen([sys.executable, "-c", CONTENDER, str(tmp_path), str(seed), hold, locks], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for seed in range(1, 7)
    ]  # fmt: skip
    for process in contenders:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in contenders]
    assert [process.returncode for process in contenders] == [0] * 6
    assert sum(map(int, said)) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["board"]
