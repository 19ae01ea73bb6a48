"""Configurations: values that check themselves."""

import json
import subprocess
import sys

import pytest
from student_fakes import tiny_config

import student
from student import (
    AlignConfig,
    BackboneConfig,
    ConfigError,
    MaskConfig,
    MimicConfig,
    OptimConfig,
    TrainConfig,
    with_overrides,
)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        tiny_config(),
        tiny_config(
            objectives=(AlignConfig(2.0, levels=3),),
            teacher="clip-b16",
            optim=OptimConfig(clip_grad=3.0, warmup_epochs=1, betas=(0.9, 0.98)),
        ),
        TrainConfig(backbone=BackboneConfig(fuse_blocks=(3, 6, 9, 12))),
    ],
)
def test_json_round_trip(config):
    """A config written as JSON text and read back is equal."""
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("surprise",), 1, "exactly the keys"),
        (("optim", "surprise"), 1, "config.optim must have exactly the keys"),
        (("objectives",), [{"kind": "magic"}], "mimic, align, reconstruct, not 'magic'"),
        (("epochs",), 2.5, "epochs must be an integer, not 2.5"),
        (("epochs",), True, "epochs must be an integer"),
        (("optim", "betas"), [0.9], "2 numbers"),
        (("optim", "base_lr"), float("nan"), "finite"),
        (("mask",), "random", "config.mask must have"),
        (("backbone", "fuse_blocks"), 3, "fuse_blocks must be numbers"),
    ],
)
def test_json_is_strict(path, value, words):
    """Unknown keys and values of a wrong type are refused with the place and what would be right."""
    tree = TrainConfig().to_json()
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_json(tree)


def test_missing_key():
    """A key that is missing is refused, not filled in."""
    tree = TrainConfig().to_json()
    del tree["seed"]
    with pytest.raises(ConfigError, match="exactly the keys"):
        TrainConfig.from_json(tree)


def test_overrides():
    """Overrides are read as the type of their field, and all are applied before the whole is checked."""
    config = with_overrides(
        tiny_config(),
        {
            "optim.base_lr": "1e-4",
            "optim.betas": "0.9, 0.98",
            "optim.clip_grad": "3",
            "optim.lr_per_256": "false",
            "batch_size": "9",
            "accumulate": "3",  # only together do they divide
            "objectives.0.weight": "0.3",
            "backbone.fuse_blocks": "1,2",
            "mask.kind": "random",
            "teacher": "clip-b16",
        },
    )
    assert config.optim == OptimConfig(1e-4, False, (0.9, 0.98), warmup_epochs=0.5, clip_grad=3.0)
    assert (config.batch_size, config.accumulate, config.teacher) == (9, 3, "clip-b16")
    assert config.objectives[0] == MimicConfig(0.3)
    assert config.backbone.fuse_blocks == (1, 2) and config.mask == MaskConfig("random", 0.5)

    back = with_overrides(config, {"optim.clip_grad": "none", "backbone.fuse_blocks": "", "teacher": "none"})
    assert back.optim.clip_grad is None and back.backbone.fuse_blocks == () and back.teacher is None


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("optim.lr", "1", "no field 'optim.lr'.*optim.base_lr"),
        ("objectives.2.weight", "1", "objectives.0.weight, objectives.1.weight"),
        ("optim", "1", "no field 'optim'"),
        ("epochs", "many", "epochs=many must be an integer"),
        ("optim.lr_per_256", "yes", "true or false"),
        ("mask.kind", "blocks", "random, attention, attention-top"),
        ("optim.betas", "0.9", "2 numbers"),
    ],
)
def test_bad_overrides(name, text, words):
    """An override that cannot be is refused with the valid names or values."""
    with pytest.raises(ConfigError, match=words):
        with_overrides(tiny_config(), {name: text})


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: BackboneConfig(image_size=200), "image_size=200 is no multiple of patch_size=16"),
        (lambda: BackboneConfig(heads=5), "no multiple of heads=5"),
        (lambda: BackboneConfig(fuse_blocks=(3, 13)), r"in 1..12, not \(3, 13\)"),
        (lambda: BackboneConfig(drop_path=1.0), "drop_path"),
        (lambda: MaskConfig(ratio=1.0), "mask.ratio"),
        (lambda: TrainConfig(batch_size=10, accumulate=4), "accumulate=4 equal parts"),
        (lambda: TrainConfig(objectives=()), "at least one"),
        (lambda: TrainConfig(objectives=(MimicConfig(), MimicConfig())), "once"),
        (lambda: TrainConfig(epochs=10), "warmup_epochs=20.0 is more than epochs=10"),
        (lambda: TrainConfig(mask=MaskConfig(ratio=0.999)), "hides all 196"),
        (lambda: TrainConfig(mask=MaskConfig(ratio=0.0)), "hides no patch"),
        (lambda: TrainConfig(optim=OptimConfig(min_lr=0.1)), "above the peak"),
        (lambda: MimicConfig(weight=0), "positive"),
        (lambda: AlignConfig(levels=0), "positive"),
    ],
)
def test_senseless_values(build, words):
    """Values that fit their type but cannot be trained are refused when the config is built."""
    with pytest.raises(ConfigError, match=words):
        build()


def test_peak_learning_rate():
    """MR-MAE's 1.5e-4 for 256 crops is 6e-4 at batch 1024; CAE v2's 1.5e-3 is absolute."""
    assert OptimConfig(1.5e-4).peak_lr(1024) == pytest.approx(6e-4)
    assert OptimConfig(1.5e-3, lr_per_256=False).peak_lr(2048) == 1.5e-3


def test_config_needs_no_torch():
    """Reading and changing a config imports neither torch nor timm, so a command line can do it at once."""
    code = (
        "import sys, student; student.with_overrides(student.TrainConfig(), {'epochs': '30'}); "
        "sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    """Every public name can be imported, and any other is an AttributeError."""
    for name in student.__all__:
        assert getattr(student, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Teacher'"):
        student.Teacher  # noqa: B018
