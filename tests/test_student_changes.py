"""A run's configuration is a function of its steps: changes under way are kept, taken again, refused with a reason."""

import json
from dataclasses import replace

import pytest
import torch
from student_fakes import TEACHER, FakeSource, tiny_config

from student import ConfigError, RunError, RunMismatchError, Student
from student.files.changes import Change, config_at, extended, from_json, to_json
from student.files.checkpoint import checkpoints, describe_checkpoint
from student.run.trainer import Trainer

CONFIG = tiny_config()
RATE = CONFIG.optim.base_lr


def make_trainer(out_dir, changes=None, **options) -> Trainer:
    model = Student(CONFIG, (TEACHER,))
    return Trainer(CONFIG, model, FakeSource(CONFIG, model.needs), out_dir, changes=changes, **options)


def rates(out_dir) -> list[float]:
    return [json.loads(line)["lr"] for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def recorded(out_dir) -> list[dict]:
    return json.loads((out_dir / "config.json").read_text()).get("changes", [])


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}


def test_a_change_holds_from_its_step_on(tmp_path):
    """Steps before a change have the old value, those behind it the new one; the record and each checkpoint say so."""
    make_trainer(tmp_path / "as begun").fit()
    make_trainer(tmp_path / "run").fit(max_steps=4)
    assert recorded(tmp_path / "run") == []
    changed = make_trainer(tmp_path / "run", {"optim.base_lr": str(RATE / 2), "optim.clip_grad": "1"})
    changed.fit(max_steps=6)
    begun = rates(tmp_path / "as begun")
    assert rates(tmp_path / "run") == pytest.approx([*begun[:4], begun[4] / 2, begun[5] / 2])
    expected = [{"step": 4, "key": "optim.base_lr", "old": RATE, "new": RATE / 2},
                {"step": 4, "key": "optim.clip_grad", "old": None, "new": 1.0}]  # fmt: skip
    assert recorded(tmp_path / "run") == expected
    assert [describe_checkpoint(path).changes for path in checkpoints(tmp_path / "run")] == [expected, expected]
    assert changed.settings.optim.clip_grad == 1.0 and changed.config == CONFIG


def test_the_same_command_and_the_plain_one_go_on(tmp_path):
    """Given again, a change adds nothing; without it, the run goes on with the changed value: all end with equal weights."""
    ends = []
    for name, again in (("at once", None), ("again", {"optim.base_lr": "0.01"}), ("plain", {})):
        make_trainer(tmp_path / name).fit(max_steps=3)
        run = make_trainer(tmp_path / name, {"optim.base_lr": "0.01"})
        if again is not None:
            run.fit(max_steps=6)
            run = make_trainer(tmp_path / name, again)
        run.fit()
        assert [change["step"] for change in recorded(tmp_path / name)] == [3]
        ends.append((state(run), rates(tmp_path / name)))
    for weights, seen in ends[1:]:
        assert seen == ends[0][1] and all(torch.equal(weights[name], ends[0][0][name]) for name in weights)


def test_an_older_checkpoint_replays_the_changes(tmp_path):
    """From a checkpoint before a change, the steps up to it are taken with the old value and those behind it with the new one."""
    make_trainer(tmp_path, keep_checkpoints=9, checkpoint_every=2).fit(max_steps=4)
    make_trainer(tmp_path, {"objectives.0.weight": "0.1", "optim.weight_decay": "0.3"}, keep_checkpoints=9).fit()
    before = state(run := make_trainer(tmp_path)), rates(tmp_path)
    run.directory.close()
    for path in checkpoints(tmp_path)[1:]:
        path.unlink()
    again = make_trainer(tmp_path)
    assert again.step == 2
    again.fit()
    assert rates(tmp_path) == before[1] and all(torch.equal(value, before[0][name]) for name, value in state(again).items())


def test_a_lost_record_is_written_from_the_checkpoint(tmp_path):
    """Where config.json is lost, the changes of the checkpoint are those of the run; where the two differ, the run is refused."""
    make_trainer(tmp_path).fit(max_steps=2)
    make_trainer(tmp_path, {"optim.base_lr": "0.01"}).fit(max_steps=4)
    kept = recorded(tmp_path)
    (tmp_path / "config.json").unlink()
    make_trainer(tmp_path).directory.close()
    assert recorded(tmp_path) == kept
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description | {"changes": []}))
    with pytest.raises(RunMismatchError, match="base_lr 0.05 -> 0.01 from step 3 on changed, config.json beside it says nothing"):
        make_trainer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(description | {"changes": [{"step": "x"}]}))
    with pytest.raises(RunError, match="list of changes that cannot be read"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    "key, text, reason",
    [
        ("backbone.drop_path", "0.1", "the weights have its shape|depends"),
        ("mask.ratio", "0.25", "depends on it"),
        ("batch_size", "2", "steps and rows are counted in it"),
        ("epochs", "3", "learning rate of the steps so far depends on it"),
        ("seed", "1", "order of the rows depends on it"),
        ("accumulate", "2", "give --micro-batch"),
        ("precision", "fp32", "taken with it"),
        ("objectives.0.teacher", "1", "of a loss, its weight can be changed"),
        ("optim.ema", "0.9", "from the first step on or not at all"),
        ("optim.base_lr", "-1", "must be positive"),
        ("optim.min_lr", "0.5", "above the peak"),
        ("optim.lr", "1", "no field 'optim.lr'"),
        ("views", "2", "cannot change its views"),
    ],
)
def test_what_cannot_be_changed(tmp_path, key, text, reason):
    """What shapes weights, rows or steps is refused with the reason, and nothing is recorded."""
    make_trainer(tmp_path).fit(max_steps=2)
    with pytest.raises(ConfigError, match=reason):
        make_trainer(tmp_path, {key: text})
    assert recorded(tmp_path) == [] and make_trainer(tmp_path).fit(max_steps=3) == 3


def test_a_new_run_is_not_changed(tmp_path):
    """Where there is no run yet a change is refused: it is begun with other values."""
    with pytest.raises(ConfigError, match="holds no run that could be changed"):
        make_trainer(tmp_path / "run", {"optim.base_lr": "0.01"})


def test_an_average_changes_its_decay_alone():
    """The decay of an average can be changed, its being there cannot."""
    config = tiny_config(optim=replace(CONFIG.optim, ema=0.9))
    assert extended(config, (), {"optim.ema": "0.99"}, 3) == (Change(3, "optim.ema", 0.9, 0.99),)
    with pytest.raises(ConfigError, match="from the first step on or not at all"):
        extended(config, (), {"optim.ema": "none"}, 3)


def test_changes_of_changes():
    """A value changed twice is a function of the step; changed again at an earlier step, it stays so from there on."""
    first = extended(CONFIG, (), {"optim.base_lr": "0.02"}, 3)
    second = extended(CONFIG, first, {"optim.base_lr": "0.01"}, 6)
    assert [config_at(CONFIG, second, step).optim.base_lr for step in (0, 2, 3, 5, 6, 99)] == [RATE, RATE, 0.02, 0.02, 0.01, 0.01]
    assert extended(CONFIG, second, {"optim.base_lr": "0.01"}, 8) == second
    earlier = extended(CONFIG, second, {"optim.base_lr": "0.04"}, 4)
    assert earlier == (first[0], Change(4, "optim.base_lr", 0.02, 0.04))
    assert extended(CONFIG, first, {"optim.base_lr": str(RATE)}, 3) == ()  # taken back before a step was taken
    assert from_json(to_json(earlier), "x") == earlier


@pytest.mark.parametrize(
    "value", ["x", [1], [{"step": 1}], [{"step": -1, "key": "a", "old": 1, "new": 2}], {"a": 1}, None, 3,
              [{"step": 1, "key": "views", "old": 1, "new": 2}], [{"step": True, "key": "a", "old": 1, "new": 2}]]
)  # fmt: skip
def test_records_that_cannot_be_read(value):
    """A list of changes of another shape is an error in a sentence."""
    with pytest.raises(RunError, match="config.json has a list of changes that cannot be read"):
        from_json(value, "config.json")
