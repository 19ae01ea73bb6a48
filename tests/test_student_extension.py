"""--extend-epochs: a finished run goes on with a stated schedule, as one of its changes."""

import json

import pytest
import torch
from click.testing import CliRunner
from student_fakes import TEACHER, FakeSource, tiny_config

from pipelines.pages.of_run.run_facts import read_run
from student import ConfigError, RunError, Student
from student.cli.train import train
from student.files.changes import Change, extended, from_json, schedule_at, total_epochs
from student.files.checkpoint import checkpoints
from student.run.rates import learning_rate
from student.run.trainer import Trainer

CONFIG = tiny_config()
"""2 epochs of 5 steps."""
LONGER = {"epochs": "5", "optim.base_lr": "0.01", "optim.warmup_epochs": "1"}


def make_trainer(out_dir, changes=None, **options) -> Trainer:
    model = Student(CONFIG, (TEACHER,))
    return Trainer(CONFIG, model, FakeSource(CONFIG, model.needs), out_dir, changes=changes, **options)


def rates(out_dir) -> list[float]:
    return [json.loads(line)["lr"] for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}


def test_the_added_epochs_have_a_schedule_of_their_own(tmp_path):
    """Steps so far keep their rates; those added have warm-up and cosine over the added epochs, by the settings given."""
    make_trainer(tmp_path).fit()
    before = rates(tmp_path)
    trainer = make_trainer(tmp_path, LONGER)
    assert (trainer.step, trainer.total_steps) == (10, 25)
    assert trainer.fit() == 25
    settings = trainer.settings.optim
    assert (settings.base_lr, settings.warmup_epochs, trainer.config) == (0.01, 1.0, CONFIG)
    added = [learning_rate(step, 5, 3, CONFIG.batch_size, settings) for step in range(15)]
    assert rates(tmp_path) == [*before, *added]
    assert added[0] == 0 and max(added) == added[5] == settings.peak_lr(CONFIG.batch_size)
    changes = json.loads((tmp_path / "config.json").read_text())["changes"]
    assert {"step": 10, "key": "epochs", "old": 2, "new": 5} in changes and len(changes) == 3
    facts = read_run(tmp_path)
    assert (facts.total_steps, facts.epochs) == (25, 5)


def test_resumed_equals_undisturbed(tmp_path):
    """Interrupted in the added epochs, the same command and the plain one go on to equal weights, bit for bit."""
    ends = []
    for name, again in (("at once", None), ("again", LONGER), ("plain", None)):
        make_trainer(tmp_path / name).fit()
        if name != "at once":
            make_trainer(tmp_path / name, LONGER).fit(max_steps=13)
        run = make_trainer(tmp_path / name, again if name != "at once" else LONGER)
        assert run.fit() == 25
        ends.append(state(run))
    assert all(torch.equal(ends[0][key], end[key]) for end in ends[1:] for key in ends[0])


def test_an_older_checkpoint_replays_the_extension(tmp_path):
    """From a checkpoint before the end of the first schedule the steps are taken as they were, and the extension stays."""
    make_trainer(tmp_path / "a", checkpoint_every=4, keep_checkpoints=99).fit()
    run = make_trainer(tmp_path / "a", LONGER, keep_checkpoints=99)
    run.fit()
    expected, taken = state(run), rates(tmp_path / "a")
    for path in checkpoints(tmp_path / "a"):
        if path.name > "checkpoint-00000008.safetensors":
            path.unlink()
    replay = make_trainer(tmp_path / "a")
    assert (replay.step, replay.total_steps) == (8, 25)
    replay.fit()
    found = state(replay)
    assert rates(tmp_path / "a") == taken and all(torch.equal(found[key], expected[key]) for key in expected)


def test_extended_twice(tmp_path):
    """Each extension is a schedule; the run's epochs are the last."""
    changes = (Change(10, "epochs", 2, 5), Change(25, "epochs", 5, 6))
    assert [schedule_at(CONFIG, changes, step) for step in (0, 9, 10, 24, 25)] == [(0, 2), (0, 2), (2, 5), (2, 5), (5, 6)]
    assert total_epochs(CONFIG, changes) == 6
    assert extended(CONFIG, changes[:1], {"epochs": "6"}, 25, steps_per_epoch=5) == changes
    assert extended(CONFIG, changes, {"epochs": "6"}, 27, steps_per_epoch=5) == changes  # the same command again


@pytest.mark.parametrize(
    ("request_", "step", "message"),
    [
        ({"epochs": "5"}, 9, "at step 9 of 10. Let it finish first"),
        ({"epochs": "1"}, 10, "the run has 2 already, and cannot have fewer"),
        ({"epochs": "x"}, 10, "epochs"),
        (
            {"epochs": "3", "optim.warmup_epochs": "2"},
            10,
            "warmup_epochs=2 is more than the 1 epochs of the schedule from 2 to 3",
        ),
    ],
    ids=["unfinished", "fewer", "no number", "warm-up too long"],
)
def test_what_is_refused(request_, step, message):
    """A run that is not finished, fewer epochs, or a warm-up that does not fit: a sentence each."""
    with pytest.raises(ConfigError, match=message):
        extended(CONFIG, (), request_, step, steps_per_epoch=5)
    with pytest.raises(RunError, match="cannot be read"):
        from_json([{"step": 10, "key": "epochs", "old": 5, "new": 2}], "config.json")


def test_from_the_command_line(shared_cache, tmp_path):
    """A finished run goes on, says to where, and the same command once more finds it finished."""
    arguments = ["--cache", str(shared_cache.path), "--preset", "mae-s16", "--tiny", "--out", str(tmp_path / "run")]

    def command(*more: str):
        return CliRunner().invoke(train, [*arguments, *more])

    assert "holds no run that could be changed" in command("--extend-epochs", "3").output
    assert command("--max-steps", "2").exit_code == 0
    refused = command("--extend-epochs", "3")
    assert refused.exit_code == 2 and "Let it finish first" in refused.output
    assert command().exit_code == 0
    assert "goes on with --extend-epochs" in command("--change", "epochs=3").output
    result = command("--extend-epochs", "3", "--change", "optim.warmup_epochs=0")
    assert result.exit_code == 0 and "changed  epochs 2 -> 3 from step 7 on" in result.output and "9 in all" in result.output
    assert "finished" in command("--extend-epochs", "3").output
