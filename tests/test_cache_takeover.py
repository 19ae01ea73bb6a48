"""Claims of the dead: who lives is not succeeded, who is gone is, by one; who was taken for dead and wakes writes nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from teacher_cache.cli.main import main
from teacher_cache.errors import ClaimLostError
from teacher_cache.files import claim_file, claims, durable, guard
from teacher_cache.files.claims import ClaimHeldError, Observer, claimed, holder_of, taking_over
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.layout import store_claim, store_claims

HOST = socket.gethostname()
BEFORE = {"host": "node-17", "pid": 4711}
"""What versions without a counter wrote."""
ELSEWHERE = {**BEFORE, "boot": "b", "token": "0123456789abcdef", "locked": True, "beat": "000000000007"}
HOLDS = {
    "claimed": lambda path: claimed(path / "claim", "The store"),
    "claimed_range": lambda path: claimed_range(path / "claims", 2, 6, "The store"),
}


class Clock:
    """A clock that goes on only when somebody sleeps. meanwhile: called at each sleep, with the seconds so far."""

    def __init__(self):
        self.time, self.meanwhile = 1000.0, lambda seconds: None

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.meanwhile(self.time - 1000)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The time that watchers go by; they look every 5 seconds of it."""
    clock = Clock()
    monkeypatch.setattr(claim_file, "now", lambda: clock.time)
    monkeypatch.setattr(claims, "sleep", clock.sleep)
    monkeypatch.setattr(claims, "POLL_S", 5.0)
    return clock


@pytest.fixture(params=["before", "of today"])
def left(request, tmp_path):
    """left("claimed"): leave a claim of another host, as versions before wrote it or as today's do; returns its file."""

    def leave(hold: str) -> Path:
        is_old, extent = request.param == "before", {} if hold == "claimed" else {"first": 0, "last": 4}
        told = {**(BEFORE if is_old else ELSEWHERE), **extent}
        path = tmp_path / ("claim" if hold == "claimed" else f"claims/000000-000004{'' if is_old else '.' + told['token']}.claim")
        if hold == "claimed" and not is_old:
            path /= told["token"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(told))
        return path

    return leave


def move(path: Path) -> None:
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "beat": f"{int(told['beat']) + 1:012d}"}))


# --- who lives, and who does not -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
def test_a_claim_that_does_not_move(tmp_path, hold, left, clock, capsys):
    """A claim of another host is watched for five minutes of one's own clock, which one sentence says; then it is taken over."""
    path = left(hold)
    clock.meanwhile = lambda seconds: path.touch() or os.utime(path, (seconds * 1e6, 0))  # what clocks of files say is nothing
    with HOLDS[hold](tmp_path):
        assert 300 <= clock.time - 1000 <= 310 and not path.is_file()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"The store: (shards 0:4 are|is) claimed by process 4711 on host node-17, and whether that lives cannot be seen from "
        r"here. Watching its claim until [\d:]{8}: if it does not move, it counts as gone then, and this process goes on in its "
        r"place. Who knows that it is gone can say so: --take-over.",
        line,
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("left", ["of today"], indirect=True)
def test_a_claim_that_moves(tmp_path, hold, left, clock):
    """A claim of another host that moves within the five minutes, be it at the very end, is of a living process: refused."""
    path = left(hold)
    clock.meanwhile = lambda seconds: move(path) if seconds == 295 else None
    with pytest.raises(ClaimHeldError, match="process 4711 on host node-17"), HOLDS[hold](tmp_path):
        pass
    assert clock.time == 1295 and path.exists()


@pytest.mark.parametrize("left", ["of today"], indirect=True)
def test_waiting_for_another_host(tmp_path, left, clock):
    """Who waits waits on while a claim moves, and is told until when if it does not; five minutes after a last move it has it."""
    path, told = left("claimed"), []
    clock.meanwhile = lambda seconds: move(path) if seconds in (200, 400) else None
    with claimed(tmp_path / "claim", "x", told.append):
        assert 700 <= clock.time - 1000 <= 710
    who = "process 4711 on host node-17"
    assert re.fullmatch(
        rf"{who}; if its claim does not move until \d\d:\d\d:\d\d, it counts as gone \(.*: --take-over\)", told[0]
    )
    assert list(dict.fromkeys(told))[1:] == [f"{who}, which cannot be seen from here, but moves its claim"]


@pytest.mark.parametrize("hold", HOLDS)
def test_a_person_knows_better(tmp_path, hold, left, clock):
    """Told that the holder is gone, nobody waits."""
    path = left(hold)
    with taking_over(), HOLDS[hold](tmp_path):
        assert not path.is_file() and clock.time == 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hold", HOLDS)
def test_a_lock_is_life(tmp_path, hold, clock):
    """What is locked is not taken over, whatever a person says and however long its counter rests."""
    with HOLDS[hold](tmp_path), taking_over():
        clock.time += 1e6
        with pytest.raises(ClaimHeldError, match=f"process {os.getpid()} "), HOLDS[hold](tmp_path):
            pass
        assert Observer().holder_of(next(tmp_path.rglob("claim" if hold == "claimed" else "*.claim"))) is not None


def test_a_locked_file_of_before(tmp_path, clock):
    """The same of a claim that a version before has locked."""
    with open(tmp_path / "claim", "w+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(BEFORE, file)
        file.flush()
        with taking_over(), pytest.raises(ClaimHeldError, match="4711"), claimed(tmp_path / "claim", "x"):
            pass
    assert (tmp_path / "claim").is_file()


def test_a_host_that_was_started_again(tmp_path, monkeypatch, clock):
    """A claim of this host's name and another boot may be of another machine of that name: it is watched."""
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / ELSEWHERE["token"]).write_text(json.dumps({**ELSEWHERE, "host": HOST}))
    with claimed(tmp_path / "claim", "x"):
        assert clock.time >= 1300
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / ELSEWHERE["token"]).write_text(json.dumps({**ELSEWHERE, "host": HOST, "boot": claim_file.boot_id()}))
    before = clock.time
    with claimed(tmp_path / "claim", "x"):
        assert clock.time == before


def test_what_an_observer_says(tmp_path, left, clock):
    """At one look one cannot tell whether a claim elsewhere lives, and says so; who looks on sees it move, or dead."""
    path = left("claimed")
    claim, observer = tmp_path / "claim", Observer()
    who = "process 4711 on host node-17"
    for holder in (observer.holder_of(claim), holder_of(claim)):
        assert holder.startswith(f"{who} (if it is still there: ") and "--take-over" in holder
    if path != claim:
        move(path)
        assert observer.holder_of(claim) == who
    clock.time += 300
    assert observer.holder_of(claim) is None and path.exists()


def test_foreign_files_are_no_claims(tmp_path):
    """A folder under the name of a claim that holds something else is left alone and named."""
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "thesis.tex").write_text("mine")
    with pytest.raises(claims.MismatchError, match="holds thesis.tex, which is no claim"), claimed(tmp_path / "claim", "x"):
        pass
    assert (tmp_path / "claim" / "thesis.tex").read_text() == "mine"


def test_the_command_takes_over(tmp_path, image_folder, left):
    """--take-over goes on at once where a node has died, and is refused where a lock is held."""
    path = left("claimed")
    (tmp_path / "c").mkdir()
    claim = (tmp_path / "claim").rename(tmp_path / "c" / "crops.claim")
    command = ["crop", "--take-over", "--images", str(image_folder), "--crop-size", "32", str(tmp_path / "c")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert not claim.exists() and (tmp_path / "c" / "cache.json").exists() and not path.exists()
    with claimed(claim, "x"):
        refused = CliRunner().invoke(main, [*command, "--views", "2"])
    assert refused.exit_code == 2 and f"is being written by process {os.getpid()} on host {HOST}" in refused.stderr


# --- without locks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", claim_file.NO_LOCKS)
@pytest.mark.parametrize("hold", HOLDS)
def test_without_locks(tmp_path, hold, number, monkeypatch, clock, capsys):
    """Where there are no locks one holder is kept by exclusive creation, which is said once; the dead are watched, here too."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(claim_file, "_has_told", False)
    here = tmp_path / "here"
    here.mkdir()
    with HOLDS[hold](here):
        with pytest.raises(ClaimHeldError, match=f"process {os.getpid()} "), HOLDS[hold](here):
            pass
        kept = shutil.copytree(here, tmp_path / "kept")
    (line,) = capsys.readouterr().err.splitlines()
    assert list(here.iterdir()) == [] and f": this file system has no locks ({os.strerror(number)})" in line
    with HOLDS[hold](kept):  # as a killed process of this very host leaves it
        assert clock.time >= 1300
    said = capsys.readouterr().err
    assert "Watching its claim" in said and list(kept.iterdir()) == []


# --- the counter -----------------------------------------------------------------------------------------------------

BUSY = """
import sys, threading
from pathlib import Path
from teacher_cache.files import claim_file
from teacher_cache.files.claims import claimed
claim_file.BEAT_S = 0.01
def beat():
    (file,) = Path(sys.argv[1]).iterdir()
    return int(claim_file.find(file).holder["beat"])
import numba, numpy as np, torch
@numba.njit(nogil=True)
def compiled(n):
    total = 0
    for i in range(n):
        total += i % 7
    return total
compiled(10)
with claimed(Path(sys.argv[1]), "x"):
    works = {"Python": lambda: sum(range(200_000)), "compiled code": lambda: compiled(20_000_000),
             "a teacher": lambda: torch.ones(700, 700) @ torch.ones(700, 700)}
    for name, work in works.items():
        before = beat()
        while beat() < before + 3:
            work()
        print(name)
    (heart,) = [thread for thread in threading.enumerate() if thread.name == "claims"]
    assert heart.daemon
"""


def test_it_moves_under_load(tmp_path):
    """The counter moves while Python, compiled code and torch keep the main thread; the thread keeps no process alive."""
    done = subprocess.run([sys.executable, "-c", BUSY, str(tmp_path / "claim")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["Python", "compiled code", "a teacher", ""]


def until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def test_its_thread_does_not_die_in_silence(tmp_path, monkeypatch):
    """A counter that could not be written is tried again; if that fails for minutes, its owner stops before others take over."""
    monkeypatch.setattr(claim_file, "BEAT_S", 0.01)
    with claimed(tmp_path / "claim", "x"):
        (file,) = (tmp_path / "claim").iterdir()
        until(lambda: claim_file.find(file).holder["beat"] > "000000000002")
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
            claim = guard.claims_on(tmp_path / "y")[0]
            until(lambda: claim._trouble)
            durable.write_whole(tmp_path / "y", b"1")  # for a moment that is no harm
            later = time.monotonic() + 200
            broken.setattr(claim_file, "now", lambda: later)
            with pytest.raises(ClaimLostError, match=r"x can no longer be held: .* cannot be written \(Input/output error\)"):
                durable.write_whole(tmp_path / "y", b"2")
        until(lambda: not claim._trouble)
        durable.write_whole(tmp_path / "y", b"3")
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "claims"])
    assert (tmp_path / "y").read_bytes() == b"3"


# --- taken over ------------------------------------------------------------------------------------------------------


def take(path: Path) -> None:
    """What a successor does first: remove the claim that it takes for dead."""
    for file in claims._files_of(path):
        file.unlink()


SLEEPER = """
import fcntl, sys, time
from pathlib import Path
from teacher_cache.files import claim_file, durable
from teacher_cache.files.claims import claimed
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.cli.main import main
from teacher_cache.errors import ClaimLostError
fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available"))
claim_file.BEAT_S = 0.02
root = Path(sys.argv[1])
hold = claimed(root / "s.zarr.claim", "The store s") if sys.argv[2] == "claimed" else claimed_range(
    root / "s.zarr.claims", 0, 4, "The store s")
with hold:
    for n in range(10**6):
        try:
            durable.write_whole(root / "s.zarr" / "file", b"old %d" % n)
        except ClaimLostError as error:
            sys.exit(f"{error}")
        print(n, flush=True)
"""


@pytest.mark.parametrize("hold", ["claimed", "claimed_range"])
def test_who_wakes_writes_nothing_more(tmp_path, hold, monkeypatch, capsys):
    """A process that is stopped while another takes over, and then goes on, stops with a sentence and has written nothing."""
    (tmp_path / "s.zarr").mkdir()
    monkeypatch.setattr(claim_file, "DEAD_S", 1.0)
    monkeypatch.setattr(claims, "POLL_S", 0.02)
    command = [sys.executable, "-c", SLEEPER, str(tmp_path), hold]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as old:
        assert old.stdout.readline() == "0\n"
        mine = (
            (lambda: claimed(tmp_path / "s.zarr.claim", "x")) if hold == "claimed"
            else lambda: claimed_range(tmp_path / "s.zarr.claims", 2, 6, "x")
        )  # fmt: skip
        with pytest.raises(ClaimHeldError), mine():  # it moves
            pass
        old.send_signal(signal.SIGSTOP)
        with mine():
            durable.write_whole(tmp_path / "s.zarr" / "file", b"new")
            old.send_signal(signal.SIGCONT)
            said = old.communicate()[1]
            assert (tmp_path / "s.zarr" / "file").read_bytes() == b"new"
    me = f"process {os.getpid()} on host {HOST}"
    assert old.returncode == 1 and said.splitlines()[-1] == f"The store s was taken over by {me}; nothing more is written.", said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "s.zarr"]


TAKER = """
import sys, time
from pathlib import Path
from teacher_cache.files import claims
from teacher_cache.files.claims import ClaimHeldError, claimed, taking_over
from teacher_cache.files.range_claims import claimed_range
root, hold = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
try:
    with taking_over(), claimed(root / "claim", "x") if hold == "claimed" else claimed_range(root / "claims", 2, 6, "x"):
        print("won", flush=True)
        sys.stdin.readline()
except ClaimHeldError as error:
    print("lost", error.holder, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("hold", HOLDS)
def test_many_take_over_at_once(tmp_path, hold, left):
    """Of several processes that take over at the same moment one wins; the others are told that it did."""
    left(hold)
    takers = [
        subprocess.Popen([sys.executable, "-c", TAKER, str(tmp_path), hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
        for _ in range(5)
    ]  # fmt: skip
    for taker in takers:
        taker.stdin.write("\n")
        taker.stdin.flush()
    said = [taker.stdout.readline() for taker in takers]
    for taker in takers:
        taker.communicate("\n")
    (winner,) = [taker for taker, line in zip(takers, said, strict=True) if line == "won\n"]
    assert sorted(said)[:-1] == [f"lost process {winner.pid} on host {HOST}\n"] * 4
    assert [taker.returncode for taker in takers] == [0] * 5 and list(tmp_path.iterdir()) == []


@contextmanager
def all_held(root: Path):
    """Several claims at once, as extraction and repair hold them."""
    one, two = root / "view-000/one.zarr", root / "view-000/two.zarr"
    for store in (one, two):
        store.mkdir(parents=True)
    with (
        claimed(root / "crops.claim", "The crops"),
        claimed_range(store_claims(one), 0, 4, "Shards of one"),
        claimed(store_claim(one), "One"),
        claimed(store_claim(two), "Two"),
    ):
        yield one, two


@pytest.mark.parametrize("lost", ["The crops", "Shards of one", "One", "Two"])
def test_the_right_claim_is_named(tmp_path, lost):
    """Who holds several claims is stopped where the lost one counts, by its name, in any thread, and elsewhere not."""
    with all_held(tmp_path) as (one, two):
        path = {
            "The crops": tmp_path / "crops.claim", "Shards of one": store_claims(one), "One": store_claim(one),
            "Two": store_claim(two),
        }[lost]  # fmt: skip
        take(path)
        refused = []

        def write():
            for place in (tmp_path / "cache.json", one / "x", two / "x"):
                try:
                    durable.write_whole(place, b"")
                except ClaimLostError as error:
                    assert str(error).startswith(f"{lost} is no longer claimed by this process"), error
                    refused.append(place)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    everywhere = [tmp_path / "cache.json", one / "x", two / "x"]
    assert refused == {"The crops": everywhere, "Two": [two / "x"]}.get(lost, [one / "x"])


@pytest.mark.parametrize("change", ["publish", "publish a folder", "remove", "remove a folder"])
def test_every_change_asks(tmp_path, change):
    """What gives or takes a name in a folder that was taken over raises, and changes nothing."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("theirs")
    with claimed(tmp_path / "claim", "x"):
        aside, folder = durable.create_aside(tmp_path / "file"), durable.clear_aside(tmp_path / "new")
        aside.close()
        folder.mkdir()
        take(tmp_path / "claim")
        act = {
            "publish": lambda: durable.publish(Path(aside.name), tmp_path / "file"),
            "publish a folder": lambda: durable.publish(folder, tmp_path / "new"),
            "remove": lambda: durable.remove(tmp_path / "file"),
            "remove a folder": lambda: durable.remove_folder(tmp_path / "folder"),
        }[change]
        with pytest.raises(ClaimLostError):
            act()
    assert (tmp_path / "file").read_text() == "theirs" and (tmp_path / "folder").exists() and not (tmp_path / "new").exists()


def test_nothing_goes_past_it():
    """Only durable.py and claims.py rename or replace anything, so that nothing is published without asking."""
    root = Path(claims.__file__).parents[2]
    renames = re.compile(r"\b(?:os|shutil)\.(?:rename|renames|replace|move|link)\(|(?<!dataclasses)\.rename\(")
    found = {
        path.relative_to(root).as_posix()
        for room in ("teacher_cache", "student")
        for path in (root / room).rglob("*.py")
        if renames.search(path.read_text())
    }
    assert found == {"teacher_cache/files/durable.py", "teacher_cache/files/claims.py"}


def test_what_the_dead_left_aside(tmp_path):
    """Under a claim each writer has names of its own, which end in .partial; those of the dead go when one writes there."""
    for name in ("file.0123456789abcdef.partial", "file.partial", "other.0123456789abcdef.partial"):
        (tmp_path / name).write_text("theirs")
    (tmp_path / "folder.0123456789abcdef.partial").mkdir()
    with claimed(tmp_path / "claim", "x"):
        with durable.create_aside(tmp_path / "file") as file:
            token = next((tmp_path / "claim").iterdir()).name
            assert Path(file.name) == tmp_path / f"file.{token}.partial" == durable.aside_path(tmp_path / "file")
        assert durable.clear_aside(tmp_path / "folder") == tmp_path / f"folder.{token}.partial"
        assert sorted(path.name for path in tmp_path.glob("*.partial")) == [
            f"file.{token}.partial",
            "other.0123456789abcdef.partial",
        ]
