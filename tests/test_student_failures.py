"""A run that fails loses no completed step, keeps what is known of the one that failed, and saves nothing broken."""

import json
from dataclasses import replace

import pytest
import torch
from student_fakes import TEACHER, FakeSource, tiny_config

import student.run.rescue
import student.run.trainer
from student import NonFiniteLossError, RunError, Student
from student.files.checkpoint import latest_checkpoint, load_student
from student.masking import draw_noise
from student.modules.drop_path import draw_drops
from student.run.trainer import Trainer
from student.seeds import position_seed

CONFIG = tiny_config(accumulate=2)


def make_trainer(out_dir, before=lambda step, index: None, **options) -> Trainer:
    model = Student(CONFIG, (TEACHER,))
    return Trainer(CONFIG, model, FakeSource(CONFIG, model.needs, before=before), out_dir, **options)


def failing(error: BaseException, at: tuple[int, int]):
    def before(step, index):
        if (step, index) == at:
            raise error

    return before


@pytest.mark.parametrize("error", [RunError("a damaged row"), MemoryError("no memory"), torch.OutOfMemoryError("full")])
def test_any_error_saves_the_last_step(tmp_path, error):
    """Whatever the data source raises, the last completed step is saved; the error is raised as it was, with a note of both."""
    with pytest.raises(type(error), match=str(error)) as caught:
        make_trainer(tmp_path, failing(error, (3, 1))).fit()
    assert caught.value is error
    note = f"Step 3 is saved; the same command goes on from there. {tmp_path}/failed-00000004.json says what is known of step 4."
    assert error.__notes__ == [note]
    assert make_trainer(tmp_path).step == 3


def test_error_in_the_first_step(tmp_path):
    """Where no step was completed none is saved, and the note says so."""
    error = RunError("a damaged row")
    with pytest.raises(RunError):
        make_trainer(tmp_path, failing(error, (0, 0))).fit()
    assert error.__notes__[0].startswith("No step is saved.") and latest_checkpoint(tmp_path) is None


def test_error_while_a_step_is_told(tmp_path):
    """An error behind an update, of the caller's own or of the log, saves that update."""
    reports = []

    def tell(report):
        reports.append(report)
        if report.step == 4:
            raise ValueError("no ear")

    with pytest.raises(ValueError, match="no ear"):
        make_trainer(tmp_path, on_step=tell).fit()
    assert len(reports) == 4 and make_trainer(tmp_path).step == 4


def test_what_is_kept_of_a_broken_step(tmp_path):
    """The record of a step that broke names its rows, losses and random numbers; the step taken again from it is that step."""
    trainer = make_trainer(tmp_path / "run")
    whole = trainer.source.micro_batches

    def with_a_bad_crop(first_step, last_step):
        for batch in whole(first_step, last_step):
            if 14 in batch.rows:  # step 4, second half
                batch.images[0, 0, 0, 0] = float("inf")
            yield batch

    trainer.source.micro_batches = with_a_bad_crop
    with pytest.raises(NonFiniteLossError):
        trainer.fit()
    record = json.loads((tmp_path / "run" / "failed-00000004.json").read_text())
    assert record["step"] == 4 and record["saved_step"] == 3 and record["rows"] == [12, 13, 14, 15]
    assert record["losses"][1] in ("nan", "inf") and record["error"].startswith("NonFiniteLossError: The loss became")
    assert (record["seed"], record["micro_batches"], record["process"], record["processes"]) == (0, 2, 0, 1)
    for key, purpose, drawn in (("noise", "mask", draw_noise(0, 3, 4, 16)), ("drops", "drop path", None)):
        generator = torch.Generator().manual_seed(record[key]["generator_seed"])
        assert record[key]["generator_seed"] == position_seed(purpose, 0, 3)
        if drawn is not None:
            torch.testing.assert_close(torch.rand(4, 16, generator=generator), drawn)

    make_trainer(tmp_path / "run").fit(max_steps=4)
    make_trainer(tmp_path / "undisturbed").fit(max_steps=4)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "undisturbed")]
    first = record["losses"][0]
    again, undisturbed = (json.loads(lines[3])["loss"] for lines in logs)
    assert again == undisturbed and isinstance(first, float)


def test_broken_weights_are_not_saved(tmp_path):
    """Weights or moments that are not finite are never saved behind a failure: the last checkpoint stays the newest."""
    trainer = make_trainer(tmp_path, checkpoint_every=2)

    def break_a_weight(report):
        if report.step == 3:
            with torch.no_grad():
                trainer.student.backbone.cls_token[0, 0, 0] = float("inf")

    trainer.on_step = break_a_weight
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit()
    assert latest_checkpoint(tmp_path).name == "checkpoint-00000002.safetensors"
    assert caught.value.__notes__[0].startswith("Step 2 is saved") and "Step 3 could not be saved" in caught.value.__notes__[0]
    assert "not finite: model.backbone.cls_token" in caught.value.__notes__[0]
    student, *_ = load_student(latest_checkpoint(tmp_path), (TEACHER,))
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_half_an_update_is_not_saved(tmp_path):
    """An error in the middle of the update of the weights leaves the last checkpoint as the newest."""
    trainer = make_trainer(tmp_path, checkpoint_every=2)
    update = trainer.optimizer.step

    def half_an_update():
        update()
        if trainer.step == 3:
            raise torch.OutOfMemoryError("full")

    trainer.optimizer.step = half_an_update
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.fit()
    assert latest_checkpoint(tmp_path).name == "checkpoint-00000002.safetensors"
    assert (
        "Step 2 is saved" in caught.value.__notes__[0]
        and "update of the weights, or its line in the log, was under way" in caught.value.__notes__[0]
    )


def test_a_full_disk_does_not_hide_the_first_error(tmp_path, monkeypatch):
    """Where the last step cannot be saved, the first error is raised all the same, and the note says what is lost."""

    def no_space(*_, **__):
        raise RunError("could not be written: No space left on device")

    trainer = make_trainer(tmp_path, failing(RunError("a damaged row"), (3, 0)))
    monkeypatch.setattr(student.run.trainer, "save_checkpoint", no_space)
    monkeypatch.setattr(student.run.rescue, "write_failure", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RunError, match="a damaged row") as caught:
        trainer.fit()
    assert "Step 3 could not be saved: could not be written" in caught.value.__notes__[0]
    assert "could not be written: [Errno 28]" in caught.value.__notes__[0]


def test_drops_are_a_function_of_seed_step_and_row(tmp_path):
    """A crop's branches are dropped by seed, step and its row in the batch alone, at the stated rate; the others are scaled."""
    rates = (0.1, 0.5)
    drops = draw_drops(0, 3, 4096, rates)
    assert torch.equal(drops, draw_drops(0, 3, 4096, rates)) and torch.equal(drops[:16], draw_drops.__wrapped__(0, 3, 16, rates))
    assert not torch.equal(drops, draw_drops(0, 4, 4096, rates)) and not torch.equal(drops, draw_drops(1, 3, 4096, rates))
    for column, rate in zip(drops.T, rates, strict=True):
        assert column.unique().tolist() == [0.0, pytest.approx(1 / (1 - rate))]
        assert (column == 0).float().mean().item() == pytest.approx(rate, abs=0.03)
    assert not torch.equal(drops[:, 0] == 0, drops[:, 1] == 0)


def test_runs_of_before_drop_as_they_did(tmp_path):
    """A record without the field `drops` goes on by the law of then: torch's generator, seeded for each micro-batch."""
    there = CONFIG.to_json()
    del there["drops"]
    old = type(CONFIG).from_json(there)
    assert old == replace(CONFIG, drops="micro-batches")
    model = Student(old, (TEACHER,)).train()
    trainer = Trainer(old, model, FakeSource(old, model.needs), tmp_path)
    batch = next(trainer.source.micro_batches(0, 1))
    mask = trainer._draw_mask(batch, 0)
    assert trainer._draw_drops(0) is None
    first = model(batch, mask)[0]
    torch.manual_seed(position_seed("drop path", 0, 0, 0))
    assert torch.equal(model(batch, mask)[0], first)
    assert not torch.equal(model(batch, mask)[0], first)
