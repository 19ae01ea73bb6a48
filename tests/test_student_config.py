"""Configurations: values that check themselves."""

import json
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from student_fakes import tiny_config

import student
from student import AlignConfig, ConfigError, MaskConfig, MimicConfig, OptimConfig, TrainConfig, ViTConfig, with_overrides
from student.config import as_overrides


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        tiny_config(),
        tiny_config(
            objectives=(AlignConfig(2.0, levels=3),),
            teachers=("clip-b16",),
            optim=OptimConfig(clip_grad=3.0, warmup_epochs=1, betas=(0.9, 0.98)),
        ),
        TrainConfig(backbone=ViTConfig(fuse_blocks=(3, 6, 9, 12))),
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
        (("objectives",), [{"kind": "magic"}], "mimic, align, reconstruct, cosine, contrast, not 'magic'"),
        (("epochs",), 2.5, "epochs must be an integer, not 2.5"),
        (("epochs",), True, "epochs must be an integer"),
        (("optim", "betas"), [0.9], "2 numbers"),
        (("optim", "base_lr"), float("nan"), "finite"),
        (("mask",), "random", "config.mask must have"),
        (("backbone", "fuse_blocks"), 3, "fuse_blocks must be values"),
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
            "teachers": "clip-b16,dino-b16",
        },
    )
    assert config.optim == OptimConfig(1e-4, False, (0.9, 0.98), warmup_epochs=0.5, clip_grad=3.0)
    assert (config.batch_size, config.accumulate, config.teachers) == (9, 3, ("clip-b16", "dino-b16"))
    assert config.objectives[0] == MimicConfig(0.3)
    assert config.backbone.fuse_blocks == (1, 2) and config.mask == MaskConfig("random", 0.5)

    back = with_overrides(config, {"optim.clip_grad": "none", "backbone.fuse_blocks": "", "teachers": ""})
    assert back.optim.clip_grad is None and back.backbone.fuse_blocks == () and back.teachers == ()


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("optim.lr", "1", "no field 'optim.lr'.*optim.base_lr"),
        ("objectives.2.weight", "1", "objectives.0.weight, objectives.0.teacher, objectives.1.weight"),
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
        (lambda: ViTConfig(image_size=200), "image_size=200 is no multiple of the 16 pixels of an output token. Take 192 or 208"),
        (lambda: ViTConfig(heads=5), "no multiple of heads=5"),
        (lambda: ViTConfig(fuse_blocks=(3, 13)), r"in 1..12, not \(3, 13\)"),
        (lambda: ViTConfig(drop_path=1.0), "drop_path"),
        (lambda: MaskConfig(ratio=1.0), "mask.ratio"),
        (lambda: TrainConfig(batch_size=10, accumulate=4), "accumulate=4 equal parts"),
        (lambda: TrainConfig(objectives=()), "at least one"),
        (lambda: TrainConfig(objectives=(MimicConfig(), MimicConfig())), "once"),
        (lambda: TrainConfig(epochs=10), "warmup_epochs=20.0 is more than epochs=10"),
        (lambda: TrainConfig(mask=MaskConfig(ratio=0.999)), "hides all 196"),
        (lambda: TrainConfig(mask=MaskConfig(ratio=0.0)), "hides no patch"),
        (
            lambda: TrainConfig(backbone=ViTConfig(image_size=64), mask=MaskConfig("block", 0.85)),
            "14 of which are to be hidden, no",
        ),
        (lambda: TrainConfig(optim=OptimConfig(min_lr=0.1)), "above the peak"),
        (lambda: MimicConfig(weight=0), "positive"),
        (lambda: AlignConfig(levels=0), "positive"),
        (lambda: AlignConfig(levels=10**9), "levels must be at most 512, not 1000000000"),
        (lambda: ViTConfig(depth=10**9), "depth must be at most 512"),
        (lambda: TrainConfig(batch_size=1 << 40), "batch_size must be at most"),
        (lambda: TrainConfig(preset="a\x1b[2J"), "printable"),
        (lambda: TrainConfig(teachers=("\udce9",)), "printable"),
    ],
)
def test_senseless_values(build, words):
    """Values that fit their type but cannot be trained are refused when the config is built."""
    with pytest.raises(ConfigError, match=words):
        build()


def test_as_overrides():
    """Every field comes out as a text that sets it to what it is."""
    config = tiny_config(
        teachers=("clip-b16",), optim=OptimConfig(clip_grad=3.0, warmup_epochs=1), backbone=ViTConfig(fuse_blocks=(3, 6))
    )
    texts = as_overrides(config)
    assert texts["optim.betas"] == "0.9,0.95" and texts["optim.lr_per_256"] == "true" and texts["backbone.fuse_blocks"] == "3,6"
    assert with_overrides(tiny_config(), texts) == config


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, 1e308, -1, 0, 2**63]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "weight", "dim", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(tree, prefix=()):
    """The path to every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix] * bool(prefix) + [place for key, value in items for place in places(value, (*prefix, key))]


PLACES = places(tiny_config().to_json())


@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON, st.sampled_from(["set", "delete", "add"])), min_size=1, max_size=3))
@example([(("objectives", 0, "kind"), [], "set")])
@example([(("optim", "base_lr"), 10**400, "set")])
@example([((1,), 0, "add")])
def test_no_json_breaks_it(changes):
    """Whatever is changed in a configuration's JSON, it is read as a sound configuration or refused as a ConfigError."""
    tree = tiny_config().to_json()
    for place, value, how in changes:
        *parents, leaf = place
        node = tree
        try:
            for key in parents:
                node = node[key]
            if how == "set":
                node[leaf] = value
            elif how == "delete":
                del node[leaf]
            else:
                node[f"{leaf}2" if isinstance(leaf, str) else leaf] = value
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change has taken the place away
    try:
        config = TrainConfig.from_json(tree)
    except ConfigError as error:
        assert 10 < len(str(error)) < 1000
        return
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@given(
    st.dictionaries(
        st.sampled_from(
            [*as_overrides(tiny_config()), "optim", "objectives.9.weight", "objectives.x.weight", "", "backbone..dim"]
        ),
        st.text(max_size=8)
        | st.integers().map(str)
        | st.floats().map(str)
        | st.sampled_from(["none", "true", "1,2", "1e999", "9" * 5000]),
        min_size=1,
        max_size=3,
    )
)
@example({"objectives.0.weight": "9" * 5000})
@example({"preset": "\udcff"})
def test_no_text_breaks_it(overrides):
    """Whatever is set to whatever text, the result is a sound configuration or a ConfigError."""
    try:
        config = with_overrides(tiny_config(), overrides)
    except ConfigError as error:
        assert 10 < len(str(error)) < 1000
        return
    assert with_overrides(tiny_config(), as_overrides(config)) == config


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
        assert getattr(getattr(student, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="no attribute 'Teacher'"):
        student.Teacher  # noqa: B018
