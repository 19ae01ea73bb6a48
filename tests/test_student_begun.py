"""Runs that were begun before a setting was there, or before a preset was corrected, are read and go on as they were begun."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from student_fakes import TEACHER, FakeSource, tiny_config

from pipelines.pages.of_run.run_facts import read_run
from pipelines.presets import PRESETS, recipe
from student import RunMismatchError, Student, TrainConfig
from student.cli.train import train
from student.config import keeping
from student.config.later import ADDED_LATER
from student.files.begun import as_begun
from student.files.checkpoint import load_backbone, recorded_config
from student.run.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden"
RUN = GOLDEN / "run_v1"
CHECKPOINT = "checkpoint-00000003.safetensors"
BEGUN_WITH = [
    "--preset", "mimco-b16", "--tiny", "--teacher", "four", "--device", "cpu", "--workers", "1",
    *(f"--set={setting}" for setting in (
        "backbone.image_size=32", "backbone.patch_size=8", "backbone.depth=1", "backbone.mlp_ratio=0.25", "batch_size=4",
        "epochs=4", "objectives.0.hidden_dim=8", "objectives.0.out_dim=4", "objectives.0.queue=8"))]  # fmt: skip
"""The command that began the golden run on the golden cache of version 2; 3 of its 8 steps are done. It was made before any field
came later, and is not written again."""


def resume(tmp_path: Path, *more: str):
    """The golden run and cache, copied, and the result of the command that began it."""
    if not (tmp_path / "run").exists():
        shutil.copytree(RUN, tmp_path / "run")
        shutil.copytree(GOLDEN / "cache_v2", tmp_path / "cache")
    command = ["--cache", tmp_path / "cache", "--out", tmp_path / "run", *BEGUN_WITH, *more]
    result = CliRunner().invoke(train, list(map(str, command)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_run_of_the_first_version_goes_on(tmp_path):
    """The command that began the golden run takes its other 5 steps with the losses and rates of the program that began it."""
    result = resume(tmp_path)
    assert result.exit_code == 0 and "resumed  at step 3" in result.output, result.output
    golden = json.loads((GOLDEN / "run_v1.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx(golden["lr"], rel=1e-12)
    assert [line["loss"] for line in lines] == pytest.approx(golden["loss"], rel=1e-4)
    assert resume(tmp_path).exit_code == 0  # and again, now that a newer checkpoint lies there


def test_a_run_of_the_first_version_is_read():
    """Reports, encoders and configurations come out of the golden run."""
    config = read_run(RUN).config
    assert config == load_backbone(RUN / CHECKPOINT)[1] == TrainConfig.from_json(recorded_config(RUN / CHECKPOINT))
    assert config.preset == "mimco-b16" and config.optim.betas == (0.9, 0.999)


@pytest.fixture
def later(monkeypatch):
    """As if optim.clip_grad and objectives.*.mimic had come after the runs: none and 0 mean what was done before."""
    monkeypatch.setitem(ADDED_LATER, "OptimConfig.clip_grad", None)
    monkeypatch.setitem(ADDED_LATER, "ReconstructConfig.mimic", 0.0)


def older(config: TrainConfig) -> dict:
    """The JSON of `config` without the fields of `later`."""
    value = config.to_json()
    del value["optim"]["clip_grad"]
    for objective in value["objectives"]:
        objective.pop("mimic", None)
    return value


def clipped(config: TrainConfig) -> TrainConfig:
    return replace(config, optim=replace(config.optim, clip_grad=2.0))


def test_a_missing_key_means_what_was_done(later):
    """A record without a later field is read with that field's value of before, in a tuple of losses too."""
    assert TrainConfig.from_json(older(clipped(tiny_config()))) == tiny_config()


def begin(folder: Path, config: TrainConfig) -> Trainer:
    student = Student(config, (TEACHER,))
    return Trainer(config, student, FakeSource(config, student.needs), folder)


@pytest.mark.parametrize("lost", ["", "config.json"])
def test_an_older_run_keeps_its_law(later, tmp_path, lost):
    """A run that is older than a setting goes on without it under a preset that now has it, and a line says so."""
    begin(tmp_path, tiny_config()).fit(max_steps=1)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, "config": older(tiny_config())}))
    if lost:
        (tmp_path / lost).unlink()
    now = clipped(tiny_config())
    config, lines = as_begun(tmp_path, now, given=(), former={})
    assert config == tiny_config()
    assert lines == ["optim.clip_grad=none, as the run was begun; a new one takes optim.clip_grad=2.0"]
    assert begin(tmp_path, config).fit() == 10


def test_what_the_user_sets_is_not_replaced(later, tmp_path):
    """Who asks for the new law on an older run is refused, as for any other setting."""
    begin(tmp_path, tiny_config()).fit(max_steps=1)
    config, lines = as_begun(tmp_path, clipped(tiny_config()), given={"optim.clip_grad": "2.0"}, former={})
    assert config == clipped(tiny_config()) and lines == []
    with pytest.raises(RunMismatchError, match=r"clip_grad: none in the run, 2.0 given"):
        begin(tmp_path, config)


def test_a_corrected_preset_goes_on_with_what_it_had(tmp_path):
    """A value that a preset has corrected stays what it was in runs begun before; one that the user chose then does not count."""
    begun, former = tiny_config(seed=3), {"optim.base_lr": 0.05, "backbone.layer_scale": 0.1}
    now = replace(begun, optim=replace(begun.optim, base_lr=0.01))
    assert keeping(now, begun.to_json(), former) == (begun, ["optim.base_lr"])
    assert keeping(now, begun.to_json(), former, given={"optim.base_lr"}) == (now, [])
    other = replace(begun, optim=replace(begun.optim, base_lr=0.02))
    assert keeping(now, other.to_json(), former) == (now, [])


@pytest.mark.parametrize(
    "record", [{}, {"optim": 3}, {"objectives": {"0": {}}, "optim": [1]}, {"objectives": [None, 3], "x": {}}]
)
def test_no_record_breaks_it(later, record):
    """A record that is no configuration keeps nothing; it is refused where the run is opened."""
    config = clipped(tiny_config())
    assert keeping(config, record, {"optim.base_lr": 1.0, "backbone.0.dim": 3})[0] == replace(config, drops="micro-batches")


@pytest.mark.parametrize("config_json", [None, "{", '{"config": 1, "identity": {}}'])
def test_no_directory_breaks_it(tmp_path, config_json):
    """Nothing, a file, or a directory that cannot be read changes nothing."""
    config = tiny_config()
    for place in (tmp_path / "none", tmp_path, Path(__file__)):
        assert as_begun(place, config, (), {}) == (config, [])
    if config_json:
        (tmp_path / "config.json").write_text(config_json)
    (tmp_path / "checkpoint-00000001.safetensors").write_bytes(b"no")
    assert as_begun(tmp_path, config, (), {}) == (config, [])


@pytest.mark.parametrize("preset", PRESETS)
def test_former_settings_are_settings(preset):
    """Every setting that a preset says it had before is one of its fields, with another value now."""
    made = recipe(preset)
    former, kept = keeping(made.config, {"drops": "rows"}, made.former)
    assert former == made.config and kept == []
    for name, value in made.former.items():
        node = made.config.to_json()
        for key in name.split("."):
            node = node[int(key)] if isinstance(node, list) else node[key]
        assert node != value, name


def test_every_later_field_is_one():
    """ADDED_LATER names fields that there are, and values that fit them."""
    import student.config as parts

    for key, value in ADDED_LATER.items():
        cls, _, name = key.partition(".")
        assert name in {f.name for f in getattr(parts, cls).__dataclass_fields__.values()}, key
        kind = {"kind": getattr(parts, cls).kind} if hasattr(getattr(parts, cls), "kind") else {}
        json.dumps({**kind, name: value})
