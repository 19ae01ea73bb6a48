"""student-train --probe: what the weights of a run are good for, while it goes on, without a change of the run."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import write_images
from student_fakes import TEACHER, FakeSource, tiny_config

from pipelines.feed.labelled import LabelledImages
from pipelines.pages.of_run.run_facts import read_run
from student import Student, load_backbone
from student.cli.probe import probe_of
from student.cli.report import report
from student.cli.train import train
from student.evals import KNNEvaluator
from student.evals.probe import Kept, KNNProbe
from student.files.checkpoint import checkpoints
from student.run.probing import Probe
from student.run.trainer import Trainer

CONFIG = tiny_config(epochs=3)
"""3 epochs of 2 steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """18 images that vote and 6 that are asked, of three classes."""
    root = tmp_path_factory.mktemp("probe")
    write_images(root / "train", per_class=6)
    write_images(root / "val", per_class=2)
    return root


@pytest.fixture(scope="module")
def measure(folder):
    return probe_of(f"knn:{folder}", 1, 16, "cpu").measure


def make_trainer(out, probe=None, config=CONFIG, before=lambda step, index: None, **options) -> Trainer:
    torch.manual_seed(0)
    student = Student(config, (TEACHER,))
    return Trainer(config, student, FakeSource(config, student.needs, 2, before), out, probe=probe, **options)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def probed(out) -> list[int]:
    return [line["step"] for line in lines(out) if "probe" in line]


@pytest.mark.parametrize("drops", ["rows", "micro-batches"])
def test_the_run_stays_the_same(tmp_path, measure, drops):
    """With a probe every loss and weight is what it is without, bit for bit, whichever way branches are dropped; a probe that
    draws numbers itself changes nothing either."""

    def drawing(encoder):
        torch.rand(7)
        return measure(encoder)

    config = tiny_config(epochs=3, drops=drops)
    ends = {}
    for name, probe in (("without", None), ("with", Probe(measure)), ("drawing", Probe(drawing))):
        trainer = make_trainer(tmp_path / name, probe, config)
        assert trainer.fit() == 6 and trainer.student.backbone.training
        ends[name] = losses(tmp_path / name), trainer.student.state_dict(), torch.get_rng_state()
    for name in ("with", "drawing"):
        assert ends[name][0] == ends["without"][0] and torch.equal(ends[name][2], ends["without"][2])
        assert all(torch.equal(value, ends["without"][1][key]) for key, value in ends[name][1].items())


def test_when_a_probe_is_asked(tmp_path, measure):
    """At the begin, behind every n epochs and at the end; the line stands behind that of its step."""
    for every, steps in ((1, [0, 2, 4, 6]), (2, [0, 4, 6]), (5, [0, 6])):
        make_trainer(tmp_path / str(every), Probe(measure, every)).fit()
        assert probed(tmp_path / str(every)) == steps
        written = [line["step"] for line in lines(tmp_path / str(every))]
        assert written == sorted([*range(1, 7), *steps]) and len(losses(tmp_path / str(every))) == 6


def test_it_is_the_accuracy_of_the_checkpoint(tmp_path, measure, folder):
    """What a probe says is what DINO's kNN gives of the checkpoint of its step, of the same images."""
    make_trainer(tmp_path, Probe(measure), keep_checkpoints=9).fit()
    found = {line["step"]: line["probe"] for line in lines(tmp_path) if "probe" in line}
    sides = [LabelledImages(folder / side, 16) for side in ("train", "val")]
    for checkpoint in checkpoints(tmp_path):
        expected = dict(KNNEvaluator(*sides).run(load_backbone(checkpoint)[0]))
        step = int(re.search("[0-9]+", checkpoint.name)[0])
        assert {f"knn/{name}": value for name, value in found[step]["values"].items()} == expected
        assert found[step]["main"] == "cls/18" and found[step]["train"]["fingerprint"] == sides[0].fingerprint()


class Killed(BaseException):
    """What kill -9 is to a test."""


@pytest.mark.parametrize("at, stop", [(0, Killed), (1, KeyboardInterrupt), (2, Killed), (2, MemoryError), (3, KeyboardInterrupt)])
def test_stopped_in_a_probe(tmp_path, measure, at, stop):
    """Stopped in any probe, by Ctrl-C, a kill or an error, the run has every probe once when it has gone on, of equal figures,
    even behind its last step."""
    make_trainer(tmp_path / "whole", Probe(measure)).fit()
    calls = []

    def stopping(encoder):
        calls.append(1)
        if len(calls) == at + 1:
            raise stop
        return measure(encoder)

    with pytest.raises(stop):
        make_trainer(tmp_path / "run", Probe(stopping)).fit()
    assert probed(tmp_path / "run") == [0, 2, 4, 6][:at]
    resumed = make_trainer(tmp_path / "run", Probe(measure))
    assert resumed.step == 2 * at and resumed.fit() == 6
    assert make_trainer(tmp_path / "run", Probe(measure)).fit() == 6  # a finished run asks nothing more
    values = [[line["probe"]["values"] for line in lines(tmp_path / name) if "probe" in line] for name in ("whole", "run")]
    assert probed(tmp_path / "run") == [0, 2, 4, 6] and values[0] == values[1]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_steps_taken_again(tmp_path, measure):
    """From an older checkpoint, probes of later steps are cut off with these and asked again."""
    make_trainer(tmp_path, Probe(measure), keep_checkpoints=9).fit()
    for checkpoint in checkpoints(tmp_path)[1:]:
        checkpoint.unlink()
    before = lines(tmp_path)
    make_trainer(tmp_path, Probe(measure)).fit(max_steps=3)
    assert probed(tmp_path) == [0, 2] and len(lines(tmp_path)) == 5
    make_trainer(tmp_path, Probe(measure)).fit()
    assert probed(tmp_path) == [0, 2, 4, 6] and [line["step"] for line in lines(tmp_path)] == [line["step"] for line in before]


def test_classes_that_can_be_told_apart():
    """On images that are one colour a class, an untrained encoder has all right; with shuffled labels it has not."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    pixels = np.clip(labels[:, None, None, None] * 60 + rng.integers(0, 20, (40, 16, 16, 3)), 0, 255).astype("uint8")
    about = {side: {"fingerprint": side} for side in ("train", "val")}
    encoder = Student(CONFIG, (TEACHER,)).backbone
    found = KNNProbe(Kept(pixels, labels), Kept(pixels[:12], labels[:12]), about)(encoder)
    assert found["main"] == "cls/20" and found["values"]["mean/10"] == 1.0
    wrong = KNNProbe(Kept(pixels, rng.permutation(labels)), Kept(pixels[:12], labels[:12]), about)(encoder)
    assert wrong["values"]["mean/10"] < 1


# --- the command ---------------------------------------------------------------------------------------------------------


def command(*words, code=0):
    result = CliRunner().invoke(train, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def tiny_run(cache, out, *more, code=0):
    fit = ("--set", "backbone.image_size=32", "--set", "backbone.patch_size=8", "--set", "batch_size=8")
    return command("--cache", cache.path, "--preset", "mae-s16", "--tiny", *fit, "--out", out, *more, code=code)


def test_from_the_command_to_the_report(shared_cache, folder, tmp_path):
    """--probe prints each figure, keeps it in the log, and student-report draws it; losses are those without."""
    said = tiny_run(shared_cache, tmp_path / "run", "--probe", f"knn:{folder}", "--probe-every", 2).stdout
    tiny_run(shared_cache, tmp_path / "plain")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert re.findall(r"probe    epoch ([\d.]+): knn [\d.]+% \(cls/18\)", said) == ["0", "2"]
    facts = read_run(tmp_path / "run")
    assert [probe["epoch"] for probe in facts.probes] == [0, 2] and facts.n_torn == 0 and facts.n_steps == 6
    result = CliRunner().invoke(report, [str(tmp_path / "run"), "-o", str(tmp_path / "a.html"), "--json"])
    assert result.exit_code == 0 and [line["step"] for line in json.loads(result.stdout)["probes"]] == [0, 6]
    assert "Probe: knn with 18 neighbours, % of 6 images right by the votes of 18" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        ("digits", "--probe digits: give knn:DIR, a folder with train/ and val/"),
        ("knn:", "give knn:DIR"),
        ("linear:DIR", "give knn:DIR"),
        ("knn:nowhere", "--probe knn:nowhere: there is no such folder"),
        ("knn:{folder}/train", "it has no folder train/"),
        ("knn:{tmp}/flat", "has no classes"),
        ("knn:{tmp}/other", "lacks 1 of the 3 classes .*class-9"),
        ("knn:{tmp}/one", "val has one class"),
        ("knn:{tmp}/damaged", "class-1.*image-007.png"),
    ],
)
def test_what_cannot_be_a_probe_is_said_before_training(shared_cache, folder, tmp_path, words, message):
    """One sentence, exit code 2, and no folder of a run."""
    for name in ("flat", "other", "one", "damaged"):
        write_images(tmp_path / name / "train", per_class=6)
        write_images(tmp_path / name / "val", per_class=6)
    for path in list((tmp_path / "flat" / "val").rglob("*.png")):
        path.rename(tmp_path / "flat" / "val" / path.name)
    for path in (tmp_path / "flat" / "val").glob("class-*"):
        path.rmdir()
    (tmp_path / "other" / "val" / "class-2").rename(tmp_path / "other" / "val" / "class-9")
    for number in (1, 2):
        shutil.rmtree(tmp_path / "one" / "val" / f"class-{number}")
    (tmp_path / "damaged" / "val" / "class-1" / "image-007.png").write_bytes(b"no image")
    said = tiny_run(shared_cache, tmp_path / "run", "--probe", words.format(folder=folder, tmp=tmp_path), code=2).stderr
    assert re.search(message, said, re.DOTALL) and "Traceback" not in said and not (tmp_path / "run").exists()


def test_too_many_images(shared_cache, folder, tmp_path, monkeypatch):
    """A set that is too large for memory is refused by its size, before it is read."""
    monkeypatch.setattr("student.evals.probe.MOST_BYTES", 1000)
    said = tiny_run(shared_cache, tmp_path / "run", "--probe", f"knn:{folder}", code=2).stderr
    assert "24 images of 32 px are 73.7 kB in memory" in said and not (tmp_path / "run").exists()


def test_every_needs_a_probe(shared_cache, tmp_path):
    assert "--probe-every goes with --probe" in tiny_run(shared_cache, tmp_path / "run", "--probe-every", 2, code=2).stderr
