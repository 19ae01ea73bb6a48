"""The study on 16 images by its real roads: its teacher, a cell, its record, and what happens when one is interrupted."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from study_fakes import write_splits

from pipelines.study import records
from pipelines.study.__main__ import study
from pipelines.study.augment import random_crops
from pipelines.study.cells import CURVE, Cell
from pipelines.study.cli import teaching
from pipelines.study.cli.making import cache_with
from pipelines.study.pretrain import Pretraining, nt_xent, pretrain
from pipelines.study.subset import Subset, drawn_of_each, fingerprints, lay_out, unpack
from student.errors import RunError, RunMismatchError
from teacher_cache.errors import MismatchError, UsageError
from teacher_cache.extraction.parts import WorkFolder
from teacher_cache.teachers import load_teacher

SHORT = Pretraining("self", epochs=2, batch_size=4)
SIZE = ("--epochs", "1", "--batch-size", "8", "--images", "0", "--test-images", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_splits(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory) -> Path:
    """A folder with the teacher of `SHORT`, never stopped."""
    out = tmp_path_factory.mktemp("teacher")
    pretrain(SHORT, data / "train", out)
    return out


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(study, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_teacher_goes_on_to_the_bit(data, taught, tmp_path):
    """A training that was stopped gives the weights of one that was not; other settings, or other images, are refused."""
    assert pretrain(SHORT, data / "train", tmp_path, most_steps=3) is None
    with pytest.raises(RunMismatchError, match="other plan"):
        pretrain(replace(SHORT, rate=1.0), data / "train", tmp_path)
    with pytest.raises(RunMismatchError, match="other images"):
        pretrain(SHORT, data / "test", tmp_path)
    facts = pretrain(SHORT, data / "train", tmp_path)
    one, other = (load_file(folder / teaching.WEIGHTS) for folder in (taught, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    assert (facts["learned_from"], facts["held_out"]) == (15, 1) and not (tmp_path / "training.pt").exists()
    assert pretrain(SHORT, data / "train", tmp_path) == facts


def test_a_damaged_training_is_refused(data, tmp_path):
    """What is left of the state of a training that was stopped, cut short, is refused in a sentence that names it."""
    pretrain(SHORT, data / "train", tmp_path, most_steps=3)
    path = next(tmp_path.glob("training.*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=f"{path.name} is damaged"):
        pretrain(SHORT, data / "train", tmp_path)


def test_the_teacher_is_one(taught):
    """What was trained is loaded as a teacher by the project's own means."""
    spec = load_teacher("demo", taught / teaching.WEIGHTS).spec
    assert (spec.image_size, spec.patch_size, spec.depth) == (32, 4, 6)


def test_a_supervised_teacher_learns_its_classes(data, tmp_path):
    """Its loss falls below that of guessing among two classes."""
    plan = Pretraining("supervised", epochs=12, batch_size=8, rate=1e-3, smoothing=0.0)
    facts = pretrain(plan, data / "train", tmp_path)
    assert facts["loss"][-1] < 0.69 and facts["plan"]["kind"] == "supervised"


def test_the_contrastive_loss():
    """By hand: two images whose crops are equal and orthogonal to each other's."""
    crops = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    expected = -torch.log(torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 2))
    assert nt_xent(crops, temperature=0.5).item() == pytest.approx(expected.item())


def test_random_crops():
    """Crops are functions of the generator alone, stay in 0..1, and show parts of the image."""
    images = torch.linspace(0, 1, 32).expand(8, 3, 32, 32)  # brighter to the right
    one, same, other = (random_crops(images, torch.Generator().manual_seed(seed), colours=False) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == images.shape
    slope = one[:, 0, 16, -1] - one[:, 0, 16, 0]
    assert {True, False} == {bool(s > 0) for s in slope} and (slope.abs() < 1).all()
    coloured = random_crops(images, torch.Generator().manual_seed(0))
    assert coloured.min() >= 0 and coloured.max() <= 1 and not torch.equal(coloured, one)


def test_images_are_drawn_of_each_class_alike():
    """A draw is a function of its seed, takes as many of each class, and refuses more than there are."""
    labels = np.repeat([0, 1, 2], 10)
    rows = drawn_of_each(labels, 10, 0, "train")
    assert np.bincount(labels[rows]).tolist() == [4, 3, 3] and (np.diff(rows) > 0).all()
    assert rows.tolist() == drawn_of_each(labels, 10, 0, "train").tolist() != drawn_of_each(labels, 10, 1, "train").tolist()
    with pytest.raises(UsageError, match="one class has 10 alone"):
        drawn_of_each(labels, 31, 0, "train")


def test_images_are_laid_out_once(data, tmp_path):
    """An archive is unpacked, the drawn images are copied, and a folder of others is refused; so is what has no splits."""
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for split in ("train", "test"):
            archive.add(data / split, split)
    found = unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    prints = fingerprints(data)
    chosen = lay_out(found, tmp_path / "out" / "images", Subset(8, 4), prints)
    assert [len(list((chosen / split / name).iterdir())) for split in ("train", "test") for name in ("dark", "bright")] == [
        4,
        4,
        2,
        2,
    ]
    assert lay_out(data, chosen, Subset(8, 4), prints) == chosen
    with pytest.raises(MismatchError, match="holds other images"):
        lay_out(data, chosen, Subset(10, 4), prints)
    with pytest.raises(UsageError, match="it has no train/"):
        unpack(data / "train", tmp_path / "out")
    with pytest.raises(UsageError, match="give an archive, or a folder"):
        unpack(Path(__file__), tmp_path / "out")


def test_all_images_are_all(data, tmp_path):
    """0 images are those that there are, however many each class has."""
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "train" / "bright" / "003.png").unlink()
    chosen = lay_out(tmp_path / "d", tmp_path / "images", Subset(0, 0), fingerprints(tmp_path / "d"))
    assert [len(list((chosen / "train" / name).iterdir())) for name in ("dark", "bright")] == [8, 7]


def test_archives_are_whole_and_those_of_the_study(data, tmp_path):
    """An archive that is cut short is refused in a sentence, and so is another one than a study was begun with."""
    for name, splits in (("a", ("train", "test")), ("b", ("test", "train"))):
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            for split, called in zip(splits, ("train", "test"), strict=True):
                archive.add(data / split, called)
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:-3000])
    assert "cut.tar.gz: it cannot be unpacked" in run("run", "--data", tmp_path / "cut.tar.gz", "--out", tmp_path / "out", code=2)
    folder = unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert unpack(tmp_path / "a.tar.gz", tmp_path / "out") == folder and (folder / "train").is_dir()
    with pytest.raises(MismatchError, match="unpacked from another archive"):
        unpack(tmp_path / "b.tar.gz", tmp_path / "out")
    next(folder.glob("*.sha256")).unlink()
    with pytest.raises(MismatchError, match="does not say from which archive"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert (folder / "train").is_dir()


def test_a_scale_that_cannot_be_drawn_begins_no_study(data, tmp_path, monkeypatch):
    """More images than there are are refused, and the same folder takes fewer."""
    monkeypatch.setattr("pipelines.study.__main__.cells_of", lambda group, seeds: [])
    where = ("run", "--data", data, "--out", tmp_path / "out", *SIZE)
    assert "Ask for fewer" in run(*where, "--images", "100", code=2)
    run(*where)


def test_crops_that_were_interrupted_are_gone_on_with(data, tmp_path, monkeypatch):
    """A cache without all its crops is gone on with, and its seconds are said not to be the whole."""
    folder = tmp_path / "caches" / "crops"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "commit", interrupted)
        cache_with(folder, data / "train", 2, None, None, "cpu")
    assert any(folder.iterdir())
    cache, cost = cache_with(folder, data / "train", 2, None, None, "cpu")
    assert len(cache.views()) == 2 and (cost["views"], cost["whole"]) == (2, False)


@pytest.fixture(scope="module")
def made(data, taught, tmp_path_factory) -> Path:
    """A study in which one cell was run by the commands of the project, and its cache grown by a second one's views."""
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("study") / "out"
    shutil.copytree(taught, out / "teachers" / "self")
    patch.setitem(teaching.PLANS, "self", SHORT)
    patch.setattr("pipelines.study.__main__.cells_of", lambda group, seeds: [Cell(CURVE, views=1), Cell(CURVE, views=2)])
    yield out, run("run", "--data", data, "--out", out, *SIZE)
    patch.undo()


def test_a_cell_is_on_record(made, data):
    """A record says how its figures were made: commands, settings, costs, protocols, teacher, commit, hardware."""
    out, _ = made
    found = records.read_all(out)
    assert set(found) == {"maskalign-self-v1-int8-s0", "maskalign-self-v2-int8-s0"}
    record = found["maskalign-self-v2-int8-s0"]
    assert [line.split()[:2] for line in record["commands"]][0] == ["student-train", "--cache"]
    assert record["run"]["config"]["epochs"] == 1 and record["epochs"] == 1
    assert {e["evaluator"] for e in record["evaluations"]} == {"knn", "linear"}
    assert record["evaluations"][0]["protocol"].startswith("knn (DINO): 20 neighbours")
    assert record["storage"]["views"] == 2 and record["storage"]["target_bytes_a_crop"] > 5 * 65 * 64
    assert record["seconds"]["training"] > 0 and record["storage"]["whole"] and record["commit"] and record["hardware"]["n_cpus"]
    assert record["teacher"]["plan"]["epochs"] == 2
    made_by = json.loads((out / "caches" / "self-int8.made.json").read_text())
    assert [call["views"] for call in made_by] == [1, 1]  # of one cache, grown
    assert 0 <= records.accuracy(record, "knn") <= 1 and records.accuracy(record, "finetune") is None


def test_a_study_goes_on(made, data):
    """A second call runs nothing; a record that is gone is made again, from the run that is there, with the same results."""
    out, _ = made
    assert "$ student" not in run("run", "--data", data, "--out", out, *SIZE)
    path = records.record_path(out, "maskalign-self-v1-int8-s0")
    before = records.read(path)
    path.unlink()
    said = run("run", "--data", data, "--out", out, *SIZE)
    assert "finished" in said and records.read(path)["seconds"]["training"] == before["seconds"]["training"]
    assert records.accuracy(records.read(path), "knn") == records.accuracy(before, "knn")


def test_the_budget_ends_it(made, data):
    """No cell is begun behind the budget, and those that are left are counted."""
    out, _ = made
    path = records.record_path(out, "maskalign-self-v2-int8-s0")
    kept = path.read_text()
    records.record_path(out, "maskalign-self-v1-int8-s0").unlink()
    path.unlink()
    said = run("run", "--data", data, "--out", out, "--budget", "0.0001", *SIZE)
    assert "1 cells are left" in said and not path.exists()
    path.write_text(kept)


def test_other_images_are_refused(made, tmp_path):
    """A study goes on with its own images and scale alone."""
    out, _ = made
    other = write_splits(tmp_path / "other", n_train=18)
    said = run("run", "--data", other, "--out", out, *SIZE, code=2)
    assert "holds a study of other images train" in said
    data_size = [*SIZE[:1], "3", *SIZE[2:]]
    assert "scale epochs" in run("run", "--data", other, "--out", out, *data_size, code=2)


def test_a_cell_that_fails_does_not_end_the_study(made, data, monkeypatch):
    """What no store can keep is refused with the project's own message, and the other cells are run."""
    out, _ = made
    monkeypatch.setattr("pipelines.study.__main__.cells_of", lambda group, seeds: [Cell(CURVE, code="int3"), Cell("teacher")])
    said = run("run", "--data", data, "--out", out, *SIZE, code=1)
    assert "failed   maskalign-self-v4-int3-s0: " in said and "int3" in said and "done     teacher-self" in said
    assert [e["readout"] for e in records.read(records.record_path(out, "teacher-self"))["evaluations"]] == [
        "cls",
        "mean",
        "mean",
    ]


def test_raw_targets_are_another_lesson(made, data, monkeypatch):
    """The ablation of whitening runs with the teacher on the spot, and its run says so."""
    out, _ = made
    cell = Cell(CURVE, views=1, source="live", switch="raw")
    monkeypatch.setattr("pipelines.study.__main__.cells_of", lambda group, seeds: [cell])
    run("run", "--data", data, "--out", out, *SIZE)
    record = records.read(records.record_path(out, cell.name))
    assert "--live" in record["commands"][0] and "--raw-targets" in record["commands"][0]
    assert record["run"]["identity"]["teachers"][0]["raw"] is True and record["storage"]["target_bytes_a_crop"] == 0


def test_the_tables_command(made):
    """The page and the plot are made from the records alone, each aside and whole."""
    out, _ = made
    for name in ("tables.md", "study.png"):
        (out / name).write_text("before")
        (out / f"{name}.kept").hardlink_to(out / name)
    assert run("tables", "--out", out).strip() == str(out / "tables.md")
    assert all((out / f"{name}.kept").read_text() == "before" for name in ("tables.md", "study.png"))
    assert "### Missing cells" in (out / "tables.md").read_text() and (out / "study.png").stat().st_size > 1000
