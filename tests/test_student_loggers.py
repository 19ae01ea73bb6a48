"""student-train --log: every logger has every step once, whatever happens to the run, and costs it nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import write_images
from forks import fork
from rich.console import Console
from student_fakes import TEACHER, FakeSource, tiny_config

from student import ConfigError, Student
from student.cli.train import train
from student.files.checkpoint import checkpoints
from student.files.logs import read_line
from student.loggers import LOGGERS, follow, loggers_of
from student.loggers.follow import Followers, RunToLog
from student.loggers.rows import Rows, values_of
from student.loggers.to_csv import ToCsv
from student.run.probing import Probe
from student.run.progress import StepDisplay
from student.run.trainer import Trainer

CONFIG = tiny_config()
"""2 epochs of 5 steps."""
FOUND = {"name": "knn", "protocol": "any", "main": "cls/20", "values": {"cls/20": 0.5, "mean/20": 0.25}}


@pytest.fixture(params=LOGGERS)
def name(request, monkeypatch, tmp_path):
    """Each logger that is installed, keeping everything in the folder of the test."""
    if request.param not in ("csv", "tensorboard"):
        pytest.importorskip(request.param)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(follow, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(follow, "RETRY_S", 0.1 if request.param in ("csv", "mlflow") else 1.1)
    return request.param


def make_trainer(out, *names, before=lambda step, index: None, said=None, probe=None, kinds=None, **options) -> Trainer:
    if (out / "tensorboard").exists() or (out / "wandb").exists():
        time.sleep(1.1)  # both name what they write by the second
    student = Student(CONFIG, (TEACHER,))
    said = [] if said is None else said
    followers = Followers(kinds or loggers_of(names), said.append)
    probe = Probe(lambda encoder: dict(FOUND)) if probe is None else probe
    return Trainer(
        CONFIG, student, FakeSource(CONFIG, student.needs, before=before), out, followers=followers, probe=probe, **options
    )


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def expected(out: Path) -> dict[tuple[int, str], float]:
    return {(line["step"], name): value for line in lines(out) for name, value in values_of(line).items()}


# --- what each logger holds, read by its own means -----------------------------------------------------------------------


def of_csv(out):
    with open(out / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            yield from ((int(row["step"]), key, float(value)) for key, value in row.items() if key != "step" and value)


def of_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        yield from ((event.step, tag, event.value) for event in events.Scalars(tag))


def of_wandb(out):
    from student.loggers.to_wandb import offline_history

    run_id = json.loads((out / "loggers" / "wandb.json").read_text())["id"]
    for record in offline_history(out, run_id):
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            if not key.startswith("_"):
                yield record.history.step.num, key, json.loads(item.value_json)


def of_mlflow(out):
    from mlflow import MlflowClient

    state = json.loads((out / "loggers" / "mlflow.json").read_text())
    client = MlflowClient(state["tracking_uri"])
    for key in client.get_run(state["run_id"]).data.metrics:
        yield from ((one.step, key, one.value) for one in client.get_metric_history(state["run_id"], key))


READERS = {"csv": of_csv, "tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}


def require_all_once(name: str, out: Path, exact: bool = True) -> None:
    """The logger has every value of metrics.jsonl, none twice, and nothing else. exact: not only by name and step."""
    held = list(READERS[name](out))
    twice = {key: n for key, n in Counter((step, key) for step, key, _ in held).items() if n > 1}
    assert twice == {}
    held = {(step, key): value for step, key, value in held if key != "epoch"}
    told = expected(out)
    assert held.keys() == told.keys()
    if exact:
        assert held == pytest.approx(told, rel=1e-6)


# --- every step once -------------------------------------------------------------------------------------------------------


def test_every_value_of_a_run(name, tmp_path):
    """All that metrics.jsonl says, by the names of the ecosystem; the run says where to look."""
    said = []
    make_trainer(tmp_path / "run", name, said=said).fit()
    require_all_once(name, tmp_path / "run")
    names = {key for _, key in expected(tmp_path / "run")}
    assert {"train/loss", "train/lr", "train/mimic", "val/knn", "val/knn_cls_20", "val/knn_mean_20"} <= names
    assert len(said) == 1 and said[0].startswith(f"log      {name}: ")


def test_steps_taken_again(name, tmp_path):
    """A run that goes on from an older checkpoint, behind which the logger has steps, ends with none of them twice."""
    make_trainer(tmp_path / "run", name, keep_checkpoints=9).fit(max_steps=8)
    checkpoints(tmp_path / "run")[-1].unlink()
    again = make_trainer(tmp_path / "run", name)
    assert again.step == 5 and again.fit() == 10
    require_all_once(name, tmp_path / "run", exact=name in ("csv", "tensorboard"))  # others keep the speeds of the first time


def test_added_later_it_catches_up(name, tmp_path):
    """A logger of a finished run gets all of it by the same command; given once more, nothing is sent."""
    make_trainer(tmp_path / "run").fit()
    assert not (tmp_path / "run" / "loggers").exists()
    for _ in range(2):
        assert make_trainer(tmp_path / "run", name).fit() == 10
        require_all_once(name, tmp_path / "run")


def test_a_logger_that_fails_for_a_while(name, tmp_path):
    """A logger that raises is told once, training goes on, and when it works again it gets what it lacked, none twice."""
    (kind,) = loggers_of([name])
    calls, said = [], []

    class Failing(kind):
        def add(self, rows):
            calls.append(1)
            if len(calls) == 2:
                raise OSError("no route to host\nand more")
            super().add(rows)

    trainer = make_trainer(tmp_path / "run", kinds=[Failing], said=said, before=lambda step, index: time.sleep(0.1))
    assert trainer.fit() == 10 and len(calls) >= 3
    assert [line for line in said if "no route" in line] == [
        f"{name}: no route to host. Training goes on; it is tried again every {follow.RETRY_S:.0f} s."
    ]
    assert trainer.followers.unsent == []
    require_all_once(name, tmp_path / "run")


@pytest.fixture
def soon(monkeypatch):
    """Loggers look and try again at once."""
    monkeypatch.setattr(follow, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(follow, "RETRY_S", 0.04)


def test_a_log_that_cannot_be_read_for_a_while(soon, tmp_path, monkeypatch):
    """Steps that were read before reading failed are sent when it works again."""
    make_trainer(tmp_path / "run").fit(max_steps=5)
    failed = []

    def stale(line):
        if b'"step": 3,' in line and not failed:
            failed.append(line)
            raise OSError("stale file handle")
        return read_line(line)

    monkeypatch.setattr("student.loggers.rows.read_line", stale)
    trainer = make_trainer(tmp_path / "run", "csv", before=lambda step, index: time.sleep(0.05))
    assert trainer.fit() == 10 and failed and trainer.followers.unsent == []
    require_all_once("csv", tmp_path / "run")


def test_a_line_that_says_nothing(tmp_path):
    """A line of metrics.jsonl that has a step and nothing else keeps no logger from the others."""
    make_trainer(tmp_path / "run").fit()
    told = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    for damaged in ('{"step": 3}\n', '{"step": 3, "epoch": 0.6, "probe": 7}\n'):
        assert '"step": 3,' in told[3]
        (tmp_path / "run" / "metrics.jsonl").write_text("".join([*told[:3], damaged, *told[4:]]))
        trainer = make_trainer(tmp_path / "run", "csv")
        trainer.fit()
        assert trainer.followers.unsent == []
        held = {step for step, _, _ in of_csv(tmp_path / "run")}
        assert held == set(range(11)) - {3}


def be_killed(out: str, name: str, at: int, environment: dict[str, str]) -> None:
    """In a process of its own: train, and die of kill -9 in the data of a step."""
    os.environ.pop("WANDB_SERVICE", None)  # of another process
    os.environ |= environment
    follow.LOOK_EVERY_S = 0.05

    def before(step, index):
        time.sleep(0.05)
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    make_trainer(Path(out), name, before=before).fit()


@pytest.mark.slow
def test_killed(name, tmp_path):
    """kill -9 in the middle of an epoch, twice; the same command ends with every step once."""
    environment = {key: os.environ[key] for key in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE")}
    for step in (4, 8):
        ended = fork(be_killed, str(tmp_path / "run"), name, step, environment)
        assert ended.code == -signal.SIGKILL, ended.output
    assert make_trainer(tmp_path / "run", name).fit() == 10
    require_all_once(name, tmp_path / "run", exact=name in ("csv", "tensorboard"))


def test_an_interrupted_probe(name, tmp_path):
    """Interrupted in a probe, the run sends its step with what the probe says when it goes on."""

    def interrupted(encoder):
        if latest := [line["step"] for line in lines(tmp_path / "run") if "loss" in line]:
            assert latest[-1] == 5
            raise KeyboardInterrupt
        return dict(FOUND)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "run", name, probe=Probe(interrupted)).fit()
    make_trainer(tmp_path / "run", name).fit()
    require_all_once(name, tmp_path / "run")
    assert (5, "val/knn") in expected(tmp_path / "run")


# --- the run loses nothing -------------------------------------------------------------------------------------------------


class Broken:
    """A logger that never works again behind its first rows."""

    name = "broken"
    hangs = False

    def __init__(self, run: RunToLog): ...

    @staticmethod
    def require(): ...

    def open(self):
        return -1

    def add(self, rows):
        if self.hangs:
            threading.Event().wait(30)
        raise ConnectionError("the server is gone")

    def close(self, ended): ...

    def where(self):
        return "nowhere"


@pytest.mark.parametrize("hangs", [False, True])
def test_a_logger_that_stays_broken(tmp_path, monkeypatch, hangs):
    """The run ends whole, in time, with a sentence that says what the logger lacks; its claim is let go."""
    monkeypatch.setattr(follow, "CLOSE_S", 0.5)
    monkeypatch.setattr(Broken, "hangs", hangs)
    said = []
    trainer = make_trainer(tmp_path / "run", kinds=[Broken], said=said)
    assert trainer.fit() == 10
    (sentence,) = trainer.followers.unsent
    why = "it is not done after 0 s" if hangs else "the server is gone"
    assert sentence == f"broken: {why}; it has no step. The run is whole; the same command sends the rest."
    assert (
        len([line for line in said if "gone" in line]) == (0 if hangs else 1) and not (tmp_path / "run" / "trainer.lock").exists()
    )
    plain = make_trainer(tmp_path / "plain")
    plain.fit()
    assert [line.get("loss") for line in lines(tmp_path / "run")] == [line.get("loss") for line in lines(tmp_path / "plain")]


def test_an_error_without_words(tmp_path, monkeypatch):
    """A logger whose error is white space is told by the kind of its error, and not taken to have all."""

    def add(logger, rows):
        raise ConnectionError(" \n ")

    monkeypatch.setattr(Broken, "add", add)
    trainer = make_trainer(tmp_path / "run", kinds=[Broken])
    assert trainer.fit() == 10
    (sentence,) = trainer.followers.unsent
    assert sentence.startswith("broken: ConnectionError; it has no step.")


def test_one_that_fails_when_training_has_ended(tmp_path):
    """What is said then is no promise that it is tried again."""
    said = []
    make_trainer(tmp_path / "run", kinds=[Broken], said=said).fit()
    assert said == ["log      broken: nowhere", "broken: the server is gone."]


def test_one_that_cannot_be_opened(tmp_path, monkeypatch):
    """A logger that cannot be opened is refused before the first step; those opened before are closed, and the run is let go."""
    closed = []

    class Sound(Broken):
        def close(self, ended):
            closed.append(ended)

    class Shut(Broken):
        def open(self):
            raise ConfigError("the server is not there")

    with pytest.raises(ConfigError, match="is not there"):
        make_trainer(tmp_path / "run", kinds=[Sound, Shut]).fit()
    assert closed == ["failed"] and lines(tmp_path / "run") == [] and not (tmp_path / "run" / "trainer.lock").exists()
    assert make_trainer(tmp_path / "run").fit() == 10


def test_tensorboard_lets_go_of_a_file_that_failed(tmp_path):
    """Opened again behind an error, it writes one file in one thread, not one more each time."""
    pytest.importorskip("tensorboard")
    (kind,) = loggers_of(["tensorboard"])
    before = set(threading.enumerate())
    logger = kind(RunToLog(tmp_path, CONFIG, {}, 0))
    for _ in range(3):
        logger.open()
    assert len(set(threading.enumerate()) - before) == 1
    logger.close("finished")
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("uri", ["", "sqlite:////nowhere/at/all.db"])
def test_mlflow_without_its_database(tmp_path, monkeypatch, uri):
    """A file that is no database, or one that is nowhere, is one sentence before training."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (kind,) = loggers_of(["mlflow"])
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="MLflow cannot be logged to at sqlite://.*Mend that"):
        kind(RunToLog(tmp_path, CONFIG, {}, 0)).open()


def test_rows_of_a_file_that_grows(tmp_path):
    """A torn line waits for its end, what is said of one step is one row, and the newest is held back but for the whole."""
    step = lambda n: json.dumps({"step": n, "epoch": n / 2, "loss": 1.0, "parts": {"a/b": 2.0}, "lr": 0.1,  # noqa: E731
                                 "images_per_s": 5.0, "wait_share": 0.0})  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text(step(1) + "\n" + step(2)[:20])
    rows = Rows(path)
    assert rows.read(9, False) == []
    path.write_text(step(1) + "\n" + step(2) + "\nrubbish\n" + json.dumps({"step": 2, "epoch": 1.0, "probe": FOUND}) + "\n")
    assert [row.step for row in rows.read(9, False)] == [1]
    (second,) = rows.read(9, True)
    assert (second.step, second.values["val/knn"], second.values["train/a_b"]) == (2, 0.5, 2.0)
    assert rows.read(9, True) == []
    with open(path, "a") as file:
        file.writelines(step(n) + "\n" for n in range(3, 23))
    sizes = []
    while some := rows.read(8, True):
        sizes.append(len(some))
    assert sum(sizes) == 20 and max(sizes) <= 8


def test_columns_that_come_later(tmp_path):
    """A value that is new in the middle of a run has its column, empty in the rows before."""
    make_trainer(tmp_path / "run", "csv", probe=Probe(lambda encoder: dict(FOUND), every=2)).fit()
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(11)]
    assert [row["val/knn"] for row in rows] == ["0.5", *[""] * 9, "0.5"] and rows[0]["train/loss"] == ""


# --- the command -----------------------------------------------------------------------------------------------------------


def command(cache, out, *more, code=0):
    words = ["--cache", cache.path, "--preset", "mae-s16", "--tiny", "--set", "backbone.image_size=32", "--set", "batch_size=8",
             "--set", "backbone.patch_size=8", "--out", out, *more]  # fmt: skip
    result = CliRunner().invoke(train, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def test_from_the_command(shared_cache, tmp_path, monkeypatch):
    """--log tensorboard,csv with a probe; a logger that lacks something at the end is exit code 1 and a sentence."""
    images = tmp_path / "images"
    write_images(images / "train", per_class=3)
    write_images(images / "val", per_class=1)
    result = command(shared_cache, tmp_path / "run", "--log", "tensorboard, csv", "--probe", f"knn:{images}")
    assert f"log      csv: {tmp_path / 'run' / 'metrics.csv'}" in result.stderr
    for name in ("tensorboard", "csv"):
        require_all_once(name, tmp_path / "run")
    monkeypatch.setattr(ToCsv, "add", lambda logger, rows: Broken.add(Broken(None), rows))
    result = command(shared_cache, tmp_path / "run2", "--log", "csv", code=1)
    assert f"{tmp_path / 'run2'}: finished." in result.stderr and len(lines(tmp_path / "run2")) == 6
    assert "Error: csv: the server is gone; it has no step. The run is whole; the same command sends the rest." in result.stderr


def test_interrupted_with_a_logger_that_lacks_something(shared_cache, tmp_path, monkeypatch):
    """Behind Ctrl-C, too, what a logger lacks is said."""
    monkeypatch.setattr(ToCsv, "add", lambda logger, rows: Broken.add(Broken(None), rows))
    take_step = Trainer._take_step

    def interrupted(trainer, *given):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return take_step(trainer, *given)

    monkeypatch.setattr(Trainer, "_take_step", interrupted)
    result = command(shared_cache, tmp_path / "run", "--log", "csv", code=130)
    assert (
        "Interrupted. Step 2 is saved; the same command goes on from there.\n"
        "csv: the server is gone; it has no step. The run is whole; the same command sends the rest." in result.stderr
    )


def test_the_terminal_behind_a_run_that_was_done(tmp_path, monkeypatch):
    """A finished run that only sends what a logger lacks takes its bar from the terminal again, and shows the cursor."""
    make_trainer(tmp_path / "run").fit()
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("student.run.trainer.StepDisplay", partial(StepDisplay, console=console))
    make_trainer(tmp_path / "run", "csv").fit()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    told = console.file.getvalue()
    assert told.count(hidden) == told.count(shown) == 1 and told.index(hidden) < told.index(shown)


def test_a_logger_is_known_before_images_are_read(shared_cache, tmp_path, monkeypatch):
    """A name that is wrong is said before a probe's images are read, which takes its time."""
    monkeypatch.setattr("student.cli.train.probe_of", lambda *given: pytest.fail("images are read"))
    result = command(shared_cache, tmp_path / "run", "--probe", "knn:small", "--log", "cvs", code=2)
    assert "There is no logger 'cvs'" in result.stderr


def test_what_is_wrong_is_said_before_training(shared_cache, tmp_path, monkeypatch):
    """An unknown logger, none, and one that is not installed are one sentence each; nothing is written."""
    for words, message in (
        ("tensorbord", "--log tensorbord: There is no logger 'tensorbord'; there are tensorboard, wandb, mlflow, csv."),
        (",", "--log ',': give one or more of tensorboard, wandb, mlflow, csv"),
        ("csv,mlflow", "train needs mlflow, which is not installed: pip install 'teacher-cache[mlflow]'"),
        ("wandb", "train needs wandb, which is not installed: pip install 'teacher-cache[wandb]'"),
    ):
        for module in ("mlflow", "wandb"):
            monkeypatch.setitem(sys.modules, module, None)
            monkeypatch.delitem(sys.modules, f"student.loggers.to_{module}", raising=False)
        result = command(shared_cache, tmp_path / "run", "--log", words, code=2)
        assert message in result.stderr and not (tmp_path / "run").exists()


def test_wandb_without_a_login(shared_cache, tmp_path, monkeypatch):
    """W&B without a login is one sentence before training."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    result = command(shared_cache, tmp_path / "run", "--log", "wandb", code=2)
    assert "--log wandb: W&B knows no login on this machine. Log in" in result.stderr and not (tmp_path / "run").exists()
