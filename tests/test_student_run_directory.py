"""The directory of a run: one trainer at a time, nothing half there after a kill, nothing outside it touched."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cache_fakes import contents
from student_fakes import TEACHER, FakeSource, tiny_config

import student.files.checkpoint
from student import MimicConfig, RunError, RunMismatchError, Student, ViTConfig
from student.files.checkpoint import latest_checkpoint, load_backbone
from student.files.run_directory import RunDirectory, read_description
from student.run.trainer import Trainer
from teacher_cache.files import claim_file, claims

CONFIG = tiny_config(
    epochs=1,
    batch_size=2,
    backbone=ViTConfig(image_size=16, patch_size=4, dim=8, depth=1, heads=1),
    objectives=(MimicConfig(),),
)
OTHER = dataclasses.replace(CONFIG, seed=1)


def make_trainer(out_dir, config=CONFIG, before=lambda step, index: None, **options) -> Trainer:
    """Three steps, with checkpoints of the second and the third."""
    model = Student(config, (TEACHER,))
    source = FakeSource(config, model.needs, steps_per_epoch=3, before=before)
    return Trainer(config, model, source, out_dir, checkpoint_every=2, **options)


def losses(out_dir) -> list[tuple]:
    lines = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


# --- killed at any moment -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """What kill -9 is to a test: after it nothing more happens on disk."""


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(n): the n-th call from now (from 1) that changes the disk raises Killed instead, and so do all after it."""
    left = None

    def killing(function, half=None):
        def wrapper(*arguments, **options):
            nonlocal left
            if left is not None:
                left -= 1
                if left <= 0:
                    if left == 0 and half is not None:
                        half(*arguments)
                    raise Killed
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what only a power cut would show costs time
    for name in ("fsync", "replace", "unlink", "mkdir", "ftruncate", "pwrite"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    half_a_checkpoint = lambda tensors, path: path.write_bytes(b"half")  # noqa: E731
    monkeypatch.setattr(student.files.checkpoint, "save_file", killing(student.files.checkpoint.save_file, half_a_checkpoint))
    half_a_line = lambda logs, report: logs._metrics.write(b'{"step": ')  # noqa: E731
    monkeypatch.setattr(student.files.logs.StepLogs, "write", killing(student.files.logs.StepLogs.write, half_a_line))

    def arm(n: int | None) -> None:
        nonlocal left
        left = n

    return arm


@pytest.mark.parametrize("killed_before", [False, True], ids=["new run", "resumed run"])
def test_killed_at_every_moment(tmp_path, kill_at, killed_before):
    """Killed at any call that changes the disk, the same command ends with the weights and the log of an undisturbed run."""
    undisturbed = make_trainer(tmp_path / "undisturbed", keep_checkpoints=1)
    assert undisturbed.fit() == 3

    for n in range(1, 100):
        out = tmp_path / f"run-{n}"
        if killed_before:
            with pytest.raises(Killed):  # while the third step is logged, behind the checkpoint of the second
                make_trainer(out, before=lambda step, index: kill_at(1) if step == 2 else None, keep_checkpoints=1).fit()
        kill_at(n)
        try:
            make_trainer(out, keep_checkpoints=1).fit()
            break
        except Killed:
            kill_at(None)
        resumed = make_trainer(out, keep_checkpoints=1)
        assert resumed.fit() == 3
        for name, value in undisturbed.student.state_dict().items():
            assert torch.equal(value, resumed.student.state_dict()[name]), (n, name)
        assert losses(out) == losses(undisturbed.directory.path)
        names = {path.name for path in out.iterdir()} - {"checkpoint-00000002.safetensors"}  # if killed before it was removed
        assert names == {"checkpoint-00000003.safetensors", "config.json", "metrics.jsonl"}, n
    assert n > (15 if killed_before else 25)


# --- one trainer at a time ----------------------------------------------------------------------------------------


def test_second_trainer_is_refused(tmp_path):
    """While a trainer is at work its directory is refused to others, by host and process; afterwards another goes on."""
    first = make_trainer(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunMismatchError, match=f"process {os.getpid()} on host {re.escape(socket.gethostname())} is training"):
        make_trainer(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    assert first.fit(max_steps=2) == 2
    assert not (tmp_path / "run" / "trainer.lock").exists()
    assert make_trainer(tmp_path / "run").fit() == 3
    with pytest.raises(RunError, match="Make another one"):
        first.fit()  # it does not know what the other has done


def test_lock_ends_with_its_process(tmp_path):
    """A directory whose trainer was killed is taken over; one that is locked by a living process is not."""
    code = """
import fcntl, json, os, socket, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), file=lock, flush=True)
print("locked", flush=True)
time.sleep(99)
"""
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run" / "trainer.lock")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunMismatchError, match=f"in use: process {other.pid} on host"):
            RunDirectory(tmp_path / "run", CONFIG, {})
        other.kill()
    RunDirectory(tmp_path / "run", CONFIG, {}).close()


def test_another_host_cannot_be_asked(tmp_path, monkeypatch, capsys):
    """What a trainer of another host has left is watched, which is said, and taken over when it has not moved for minutes."""
    (tmp_path / "trainer.lock").write_text('{"host": "elsewhere", "pid": 7}')
    slept = []
    monkeypatch.setattr(claim_file, "now", lambda: sum(slept))
    monkeypatch.setattr(claims, "sleep", lambda seconds: slept.append(50))
    RunDirectory(tmp_path, CONFIG, {}).close()
    assert sum(slept) == claim_file.DEAD_S and list(tmp_path.iterdir()) == []
    assert f"The run {tmp_path}: is claimed by process 7 on host elsewhere, and whether that lives" in capsys.readouterr().err


def test_a_trainer_that_was_taken_over(tmp_path):
    """A trainer that finds its run taken over logs and saves nothing more and says who has it."""
    out = tmp_path / "run"

    def take(report):
        if report.step == 2:
            (claim,) = (out / "trainer.lock").iterdir()
            claim.unlink()
            other = RunDirectory(out, CONFIG, first.directory._identity)
            others.append(other)

    others = []
    first = make_trainer(out, on_step=take)
    who = f"process {os.getpid()} on host {re.escape(socket.gethostname())}"
    with pytest.raises(RunError, match=f"The run .*run was taken over by {who}; nothing more is written"):
        first.fit()
    assert [step for step, _ in losses(out)] == [1, 2] and not list(out.glob("checkpoint-*"))
    assert not list(out.glob("*.partial")) and not list(out.glob("checkpoint-*"))
    others[0].close()
    assert make_trainer(out).fit() == 3 and [step for step, _ in losses(out)] == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "{", "[" * 2000, '{"host": "x"}', '{"host": "x", "pid": "y"}', "[1]", "\xff"])
def test_unreadable_lock_is_nobodys(tmp_path, text):
    """A lock file that nobody holds and that says nothing readable does not keep a trainer out."""
    (tmp_path / "trainer.lock").write_bytes(text.encode("latin-1"))
    RunDirectory(tmp_path, CONFIG, {}).close()


def test_a_failed_start_lets_go(tmp_path):
    """A trainer that cannot start leaves the directory to others at once."""
    make_trainer(tmp_path / "run").fit(max_steps=1)
    with pytest.raises(RunMismatchError):
        make_trainer(tmp_path / "run", OTHER)
    make_trainer(tmp_path / "run").fit()


# --- what is in it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["thesis.tex"], ["trainer.lock", "thesis.tex"], ["tensorboard"], ["checkpoint-best.safetensors"]]
)
def test_foreign_directory_is_refused(tmp_path, names):
    """A directory with other files in it is left alone."""
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(RunMismatchError, match="holds no run"):
        make_trainer(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "mine")


def test_file_instead_of_a_directory(tmp_path):
    """A file at the place of the directory, or of one above it, is an error with its path."""
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunMismatchError, match="run is a file"):
        make_trainer(tmp_path / "run")
    with pytest.raises(OSError, match="run"):
        make_trainer(tmp_path / "run" / "inner")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 5000, "null", '"config"', '{"config": {}}', '{"config": [], "identity": {}}', "\xff\xfe", "9" * 5000],
)
def test_damaged_description(tmp_path, text):
    """A config.json that cannot be read is an error that says what to do; then the run goes on from its checkpoint."""
    make_trainer(tmp_path / "run").fit(max_steps=2)
    path = tmp_path / "run" / "config.json"
    written = path.read_bytes()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"config.json cannot be read .* Delete it"):
        make_trainer(tmp_path / "run")
    path.unlink()
    trainer = make_trainer(tmp_path / "run")
    assert trainer.step == 2 and path.read_bytes() == written
    trainer.directory.close()


def test_description_is_not_written_for_another_run(tmp_path):
    """Where config.json is lost, a command that does not fit the checkpoint is refused and leaves no config.json behind."""
    make_trainer(tmp_path / "run").fit(max_steps=1)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(RunMismatchError, match="seed: 0 in the run, 1 given"):
        make_trainer(tmp_path / "run", OTHER)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "line",
    [b'{"step": 3}\n', b'{"step": ', b"[" * 5000 + b"\n", b'{"step": "2"}\n', b"\xff\n", b"x" * (1 << 21)],
    ids=["later", "torn", "deep", "text", "binary", "long"],
)
def test_lines_behind_the_checkpoint_are_cut(tmp_path, line):
    """Whatever stands in metrics.jsonl behind the last saved step is gone when the run goes on."""
    make_trainer(tmp_path / "run").fit(max_steps=2)
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(line)
    make_trainer(tmp_path / "run").fit()
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    ["config.json", "config.json.partial", "metrics.jsonl", "trainer.lock", "checkpoint-00000002.safetensors"],
)
def test_links_lead_nowhere_outside(tmp_path, name):
    """No file of a run's directory that is a link to somewhere else is read or written through."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make_trainer(run).fit(max_steps=2)
    elsewhere.mkdir()
    target = elsewhere / name
    if (run / name).exists():
        (run / name).rename(target)
    else:
        target.write_text("mine")
    (run / name).symlink_to(target)
    before = {path.name: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    if name.endswith(".partial"):
        make_trainer(run).fit()
        assert not (run / name).is_symlink()
    else:
        with pytest.raises((RunError, OSError), match=f"{name} is a link to|Too many levels of symbolic links"):
            make_trainer(run).fit()
    assert {path.name: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    """A step that cannot be logged stops the run with a sentence; the directory stays sound."""
    trainer = make_trainer(tmp_path / "run")

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(metrics, name)

    def fill(report):
        nonlocal metrics
        metrics = trainer.directory._logs._metrics
        trainer.directory._logs._metrics = Full()

    metrics = None
    trainer.on_step = fill
    with pytest.raises(RunError, match="Step 2 could not be logged in .*: No space left on device"):
        trainer.fit()
    assert make_trainer(tmp_path / "run").fit() == 3
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]


# --- shared with others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027], ids=oct)
def test_modes_of_a_run(tmp_path, umask):
    """Every file of a run, checkpoints too, has the mode that the umask gives, while it trains and after."""

    def require_modes(report=None):
        for path in (tmp_path / "run").rglob("*"):
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert oct(path.stat().st_mode & 0o7777) == oct(expected), path

    before = os.umask(umask)
    try:
        make_trainer(tmp_path / "run", on_step=require_modes).fit()
        require_modes()
    finally:
        os.umask(before)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2


@pytest.fixture
def shared():
    """A folder in which anybody may look, and in which nobody owns anything."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def as_nobody():
    """Be a user to whom permissions mean something."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["checkpoint-00000003.safetensors", "config.json", "."])
def test_a_refusal_is_no_absence(shared, name):
    """What of a run this user may not read is called that, with its owner and what to do; never `there is none`."""
    run = shared / "run"
    make_trainer(run).fit()
    (run / name).chmod(0 if name == "." else 0o200)
    with as_nobody(), pytest.raises(RunError, match="permission denied: .* belongs to .* Ask .* for chmod g"):
        if name == "config.json":
            read_description(run)
        else:
            load_backbone(latest_checkpoint(run))
    (run / name).chmod(0o700)
