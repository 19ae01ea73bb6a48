"""student-eval from the command line: every kind of WHAT, every command, and what is said where it cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import write_images
from PIL import Image
from student_fakes import TEACHER, FakeSource, tiny_config

from pipelines.feed.labelled import LabelledImages, SegmentedImages
from student import Student, Trainer, latest_checkpoint, load_backbone
from student.cli.evaluate import evaluate
from student.cli.export import export
from student.evals import KNNEvaluator


def run(*words):
    """The result of a command; a traceback is a failed test."""
    result = CliRunner().invoke(evaluate, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def done(*words) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The folder of a run at 16 px, in patches of 4."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    config = tiny_config()
    student = Student(config, (TEACHER,))
    Trainer(config, student, FakeSource(config, student.needs), folder).fit(2)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of three classes."""
    return write_images(tmp_path_factory.mktemp("few"), per_class=4)


# --- what can be measured ------------------------------------------------------------------------------------------------


def test_one_table_of_everything(a_run, images, tmp_path):
    """A run, its newest checkpoint, its exports, a teacher, a model of timm and random weights, by one command: records on file,
    a table, and for the run the very figures that its encoder gives by itself."""
    for layout in ("timm", "hf"):
        out = tmp_path / ("x.safetensors" if layout == "timm" else "x")
        result = CliRunner().invoke(export, [str(a_run), "-o", str(out), "--format", layout])
        assert result.exit_code == 0, result.output
    checkpoint = latest_checkpoint(a_run)
    whats = [a_run, checkpoint, tmp_path / "x.safetensors", tmp_path / "x", "demo", "timm:test_vit", "random", "random:1"]
    shown = done("knn", *whats, "--weights", "timm:test_vit=random:0", "--train", images, "--val", images,
                 "--record", tmp_path / "r.jsonl")  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["what"] for record in records] == [str(what) for what in whats for _ in range(2)]
    assert shown.count("knn (DINO): 10, 20, 100, 200 neighbours") == 1 and all(f"{what} (" in shown for what in whats[4:])

    backbone, config = load_backbone(checkpoint)
    labelled = LabelledImages(images, 16)
    alone = dict(KNNEvaluator(labelled, labelled).run(backbone))
    of_run = {f"knn/{r['readout']}/{n}": v["mean"] for r in records[:2] for n, v in r["results"].items()}
    assert of_run == alone
    assert all(r["results"] == records[i % 2]["results"] for i, r in enumerate(records[:8]))  # the same encoder four times
    assert records[0]["weights"] == records[2]["weights"] != records[12]["weights"] != records[14]["weights"]
    assert {r["image_size"] for r in records} == {16, 32, 160}
    assert done("table", tmp_path / "r.jsonl") == shown
    only = json.loads(done("table", tmp_path / "r.jsonl", "--what", "demo", "--json"))
    assert [[record["what"] for record in group] for group in only] == [["demo", "demo"]]


def test_features_come_from_the_folder(a_run, images, tmp_path):
    """A second evaluation of the same weights on the same images computes none; --no-features keeps none."""
    words = ("--train", images, "--val", images, "--features", tmp_path / "features")
    first = run("knn", a_run, *words)
    assert "features" in first.stderr and len(list((tmp_path / "features").iterdir())) == 2  # both readouts, of equal images
    second = run("retrieval", a_run, *words)
    assert second.exit_code == 0 and "features" not in second.stderr
    done("knn", a_run, "--train", images, "--val", images, "--no-features")
    assert not (a_run / "features").exists()


def test_every_frozen_evaluator(a_run, images):
    """Each command gives its own records, of both tokens unless one is asked for."""
    pytest.importorskip("sklearn")
    both = ("--train", images, "--val", images)
    for command, more, main in (
        ("linear", ("--epochs", 12, "--rates", "1,10", "--seeds", 2), "best"),
        ("logreg", ("--strengths", "1,100"), "best"),
        ("retrieval", ("--share", ".5", "--seeds", 2), "map"),
    ):
        (record,) = json.loads(done(command, a_run, *both, *more, "--readout", "mean", "--json"))["records"]
        assert record["evaluator"] == command and record["readout"] == "mean" and record["main"] == main
        assert 0 <= record["results"][main]["mean"] <= 1 and record["data"]["used"] == (6 if command == "retrieval" else 12)
        assert (record["results"][main]["deviation"] is None) == (command == "logreg")


def test_attention_and_rank(a_run, images, tmp_path):
    """A run looks where it looks itself; its teacher may be another run; images need no classes."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    (own, other) = json.loads(done("attention", a_run, "random", "--teacher", a_run, "--val", flat, "--json"))["records"]
    assert own["results"]["overlap"]["mean"] == pytest.approx(1) and own["results"]["rank"]["mean"] == pytest.approx(1)
    assert other["results"]["overlap"]["mean"] < 0.999
    (record,) = json.loads(done("rank", a_run, "--val", flat, "--readout", "cls", "--json"))["records"]
    assert 1 <= record["results"]["rankme"]["mean"] <= 12 and record["results"]["width"]["mean"] == 16
    assert {f"at {n}" for n in range(1, 13)} <= record["results"].keys()


def test_semantic_probe(a_run, images):
    """Other features than those of all patches, kept apart from them; the record names the teacher."""
    words = ("--train", images, "--val", images, "--rates", "1,10", "--json")
    half, whole = (
        json.loads(done(*command, *words))["records"][0]
        for command in (("semantic-probe", a_run, "--teacher", a_run), ("linear", a_run))
    )
    assert half["evaluator"] == "semantic-probe" and "seeing 0.5 of the patches by attention of" in half["protocol"]
    assert half["protocol"].startswith(whole["protocol"])


# --- segmentation --------------------------------------------------------------------------------------------------------


def segmented(folder, n: int = 6, classes: int = 2):
    """Images whose left and right have levels that say their class; image i has the split at 4 * (i % 3 + 1) of 16."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(n):
        mask = np.zeros((16, 16), "uint8")
        mask[:, 4 * (i % 3 + 1) :] = classes - 1
        Image.fromarray(np.where(mask[..., None] > 0, 220, 30).repeat(3, 2).astype("uint8")).save(folder / "images" / f"{i}.png")
        mask[0, 0] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def test_segment(a_run, tmp_path):
    """Pixels of two levels are told apart by a linear layer on tokens of a hardly trained student."""
    pytest.importorskip("torchmetrics", reason="needs the extra evals")
    folder = segmented(tmp_path / "s")
    words = ("segment", a_run, "--train", folder, "--val", folder, "--epochs", 40, "--rate", ".05", "--batch-size", 6, "--json")
    (record,) = json.loads(done(*words))["records"]
    assert record["results"]["miou"]["mean"] > 0.8 and record["readout"] == "patches"
    assert {"pixels", "at 0", "at 1"} <= record["results"].keys()


def test_images_and_masks(tmp_path):
    """They are cut alike, a mask by its nearest pixels; masks of any value are as they were."""
    folder = tmp_path / "s"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    mask = (np.arange(32 * 48).reshape(32, 48) // 7 % 5).astype("uint8")
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    Image.fromarray((mask * 50)[..., None].repeat(3, 2)).save(folder / "images" / "a.bmp")
    data = SegmentedImages(folder, 16)
    assert data.masks().shape == (1, 16, 16) and set(data.masks().unique().tolist()) <= set(range(5))
    ((pixels, places),) = list(data)
    assert pixels.shape == (1, 3, 16, 16) and places.tolist() == [0] and len(data) == 1
    before = data.fingerprint()
    mask[5, 5] += 1
    Image.fromarray(np.pad(mask, 1)).save(folder / "masks" / "a.png")
    assert SegmentedImages(folder, 16).fingerprint() != before


# --- fine-tuning ---------------------------------------------------------------------------------------------------------


def test_finetune(a_run, images, tmp_path):
    """A run is fine-tuned by the settings of its method or another's, over seeds; the same command has nothing left to do."""
    tiny = ("--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "batch_size=4", "--workers", 0)
    words = ("finetune", a_run, "--out", tmp_path / "ft", "--train", images, "--val", images, "--recipe", "milan-b", *tiny,
             "--seeds", 2, "--share", ".5", "--json")  # fmt: skip
    first = run(*words)
    assert first.exit_code == 0, first.output
    assert "settings of milan-b (MILAN, appendix and FINETUNE.sh), cpu, fp32" in first.stderr
    (record,) = json.loads(first.stdout)["records"]
    assert record["main"] == "top1" and record["data"]["used"] == 6 and record["readout"] == "mean"
    assert len(record["results"]["top1"]["values"]) == 2 and record["results"]["top1"]["deviation"] is not None
    assert "settings of milan-b: base_rate 0.0001, layer_decay 0.65" in record["protocol"] and "epochs 1," in record["protocol"]
    assert {path.name for path in (tmp_path / "ft").iterdir()} == {"seed-0", "seed-1"}
    again = run(*words)
    assert json.loads(again.stdout)["records"][0]["results"] == record["results"] and "finetune, epoch" not in again.stderr
    shown = done("finetune", a_run, "--out", tmp_path / "x", "--train", images, "--val", images, "--show", "--set", "mixup=0")
    assert "base_rate = 0.0005\n" in shown and "mixup = 0.0\n" in shown and not (tmp_path / "x").exists()


def test_finetuning_that_cannot_be(a_run, images, shared_cache, tmp_path):
    out, both = ("--out", tmp_path / "ft"), ("--train", images, "--val", images)

    def said(*words, code: int = 2) -> str:
        result = run("finetune", *words)
        assert result.exit_code == code, result.output
        lines = [line for line in result.stderr.splitlines() if not line.startswith(("settings of", "features"))]
        assert len(lines) == 1 and result.stdout == ""
        return lines[0]

    assert "finetune takes one WHAT, 2 are given" in said(a_run, a_run, *out, *both)
    assert "--recipe best: there are mae-b" in said(a_run, *out, *both, "--recipe", "best")
    assert "no such setting" in said(a_run, *out, *both, "--set", "lr=1")
    assert "runs frozen only" in said("demo", *out, *both)
    assert "is a cache, whose crops are cut already" in said(
        "random", "--like", "mae-demo", *out, "--train", shared_cache.path, "--val", shared_cache.path, code=1
    )


# --- what cannot be ------------------------------------------------------------------------------------------------------


def refused(*words, code: int = 2) -> str:
    result = run(*words)
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("features ")]
    assert line.startswith("Error: ") and result.stdout == ""
    return line


def test_words_that_nothing_answers_to(a_run, images, tmp_path):
    both = ("--train", images, "--val", images)
    assert "nothing holds no checkpoint" in refused("knn", "nothing", *both)
    assert "of which architecture? Add --like" in refused("knn", "random", *both)
    assert "There is no preset 'mea-demo'. Did you mean mae-demo" in refused("knn", "random", "--like", "mea-demo", *both)
    assert "no model of that name" in refused("knn", "random", "--like", "timm:vit_none", *both)
    assert "whole number" in refused("knn", "random:x", "--like", a_run, *both)
    assert "needs its weights" in refused("knn", "clip-b16", *both)
    two = ("clip-b16", "dino-b16", "--weights", "random:0")
    assert "which teacher is it of? (clip-b16, dino-b16 are asked for.)" in refused("knn", *two, *both)
    assert "none is asked for" in refused("knn", a_run, "--weights", "random:0", *both)
    assert "--averaged is about runs" in refused("knn", "demo", "--averaged", *both)
    assert "holds no average" in refused("knn", a_run, "--averaged", *both, code=1)
    foreign = tmp_path / "x.bin"
    foreign.write_bytes(b"hello")
    assert str(foreign) in refused("knn", foreign, *both, code=1)


def test_images_that_cannot_be(a_run, images, tmp_path):
    file = next(images.rglob("*.png"))
    assert "is one image" in refused("knn", a_run, "--train", file, "--val", images)
    other = write_images(tmp_path / "other", n_classes=4, per_class=1)
    said = refused("knn", a_run, "--train", images, "--val", other)
    assert re.search(r"few\S* lacks 1 of the 4 classes that are asked for: class-3", said)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(file.read_bytes())
    assert "has no classes" in refused("knn", a_run, "--train", flat, "--val", flat, code=1)
    one = write_images(tmp_path / "one", n_classes=1)
    assert "all of one class" in refused("linear", a_run, "--train", one, "--val", one)


def test_masks_that_cannot_be(a_run, tmp_path):
    pytest.importorskip("torchmetrics", reason="needs the extra evals")
    folder = segmented(tmp_path / "s")
    both = ("--val", folder)
    assert "has no folder 'images'" in refused("segment", a_run, "--train", tmp_path, *both, code=1)
    more = segmented(tmp_path / "more", classes=3)
    assert "classes that those of --train lack: [2]" in refused("segment", a_run, "--train", folder, "--val", more)
    (more / "masks" / "0.png").rename(more / "masks" / "nought.png")
    assert "the image '0' has no mask of its name" in refused("segment", a_run, "--train", more, *both, code=1)
    (more / "masks" / "nought.png").unlink()
    Image.new("RGB", (16, 16)).save(more / "masks" / "0.png")
    assert "a mask has one channel of 8 bits" in refused("segment", a_run, "--train", more, *both, code=1)


def test_options_that_do_not_fit(a_run, images, shared_cache, tmp_path):
    both = ("--train", images, "--val", images)
    assert "draws nothing without --share" in refused("knn", a_run, "--seeds", 3, *both)
    assert "give numbers with commas" in refused("linear", a_run, "--rates", "fast", *both)
    assert "above 0 and at most 1" in refused("knn", a_run, "--share", 2, *both)
    assert "is a run, which holds nothing else" in refused("knn", a_run, "--features", a_run / "x", *both)
    assert "is a cache, which holds nothing else" in refused("knn", a_run, "--features", shared_cache.path, *both)
    (tmp_path / "file").write_text("mine")
    assert "cannot be made" in refused("knn", a_run, "--features", tmp_path / "file" / "x", *both)
    assert "32 px, the student takes 16 px" in refused("knn", a_run, "--train", shared_cache.path, "--val", images, code=1)
    assert "cannot be read as records" in refused("table", tmp_path / "none.jsonl", code=1)


def test_without_a_home_no_features_are_kept(a_run, images, monkeypatch):
    """Where the user has no folder for them, a line says so and the result is the same."""
    both = ("--train", images, "--val", images)
    expected = done("knn", a_run, *both)
    for name in ("STUDENT_FEATURES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    result = run("knn", a_run, *both)
    assert result.exit_code == 0 and result.stdout == expected
    assert "this user has no home folder); none are kept. Give --features DIR" in result.stderr


def test_what_was_found_before_a_failure_is_shown(a_run, images, tmp_path):
    """Of several subjects, those that were measured are on record and in a table when one fails."""
    result = run("knn", a_run, "nothing", "--train", images, "--val", images, "--record", tmp_path / "r.jsonl")
    assert result.exit_code == 2 and "nothing holds no checkpoint" in result.stderr
    assert "knn (DINO)" in result.stdout and len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_random_weights_are_a_function_of_their_seed(a_run, images):
    """And asking for them leaves torch's own generator as it was."""
    state = torch.random.get_rng_state()
    words = ("--like", a_run, "--train", images, "--val", images, "--json")
    records = [json.loads(done("knn", what, *words))["records"][0] for what in ("random", "random:0", "random:1")]
    first, again, other = (record["weights"] for record in records)
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_demos_table_by_one_command(images):
    """student-eval knn gives the very figures of make demo's own table: of the teacher, and of weights before any training."""
    from pipelines.demo.__main__ import accuracy
    from pipelines.presets import recipe
    from student.evals import TeacherEncoder
    from student.modules.backbones import build_backbone
    from teacher_cache.teachers import load_teacher

    config, teacher = recipe("mae-demo").config, load_teacher("demo")
    torch.manual_seed(config.seed)
    sides = [LabelledImages(images, config.backbone.image_size) for _ in range(2)]
    expected = {"random": accuracy(build_backbone(config.backbone), *sides)}
    own = LabelledImages(images, teacher.spec.image_size, mean=teacher.spec.mean, std=teacher.spec.std)
    expected["demo"] = accuracy(TeacherEncoder(teacher), own, own)
    words = ("--like", "mae-demo", "--neighbours", 20, "--train", images, "--val", images, "--json")
    found = {what: {} for what in expected}
    for record in json.loads(done("knn", "demo", "random", *words))["records"]:
        found[record["what"]][record["readout"]] = record["results"][record["main"]]["mean"]
    assert found == expected
