"""Checkpoints: one file, complete or not there, and nothing in it but the student."""

import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from student_fakes import TEACHER, FakeSource, tiny_config
from timm.models.vision_transformer import VisionTransformer

from student import RunError, RunMismatchError, Student
from student.files.checkpoint import (
    checkpoints,
    describe_checkpoint,
    latest_checkpoint,
    load_backbone,
    load_checkpoint,
    load_student,
    save_checkpoint,
)
from student.files.run_directory import read_description
from student.run.optim import build_optimizer
from student.run.trainer import Trainer

IDENTITY = {"cache": "fake", "rows": 20}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trainer:
    config = tiny_config()
    student = Student(config, (TEACHER,))
    trainer = Trainer(config, student, FakeSource(config, student.needs), tmp_path_factory.mktemp("a") / "run")
    trainer.fit(max_steps=2)
    return trainer


def fresh(config):
    student = Student(config, (TEACHER,))
    return student, build_optimizer(student, config.optim)


def test_round_trip(trained):
    """Weights and both moments of every parameter come back to the bit, and so does the step."""
    student, optimizer = fresh(tiny_config(seed=0))
    with torch.no_grad():
        student.backbone.cls_token.zero_()
    path = latest_checkpoint(trained.directory.path)
    assert load_checkpoint(path, student, optimizer, trained.config, IDENTITY).step == 2

    for name, value in trained.student.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    there = dict(trained.student.named_parameters())
    for name, parameter in student.named_parameters():
        before, after = trained.optimizer.state.get(there[name], {}), optimizer.state.get(parameter, {})
        assert before.keys() == after.keys() and (name == "backbone.pos_embed") == (not before)
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_only_the_student_is_in_it(trained):
    """The file holds the student's weights and AdamW's moments and nothing of a teacher."""
    names = {f"model.{name}" for name in trained.student.state_dict()}
    for name, parameter in trained.student.named_parameters():
        if parameter.requires_grad:
            names |= {f"optim.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    with safe_open(latest_checkpoint(trained.directory.path), framework="pt") as file:
        assert set(file.keys()) == names
        assert "student" in file.metadata()


def test_backbone_alone(trained):
    """The encoder of a checkpoint loads without data or teacher, and strictly into timm."""
    backbone, config = load_backbone(latest_checkpoint(trained.directory.path))
    assert config == trained.config and not backbone.training
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0).eval()
    vit.load_state_dict(backbone.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vit.forward_features(images), backbone.encode_all(images))


def test_paths_as_text(trained, tmp_path):
    """Every public function takes a path as text too; a folder and a file that is none are answered with what to give."""
    run = str(trained.directory.path)
    newest = str(latest_checkpoint(run))
    assert load_backbone(newest)[1] == trained.config and load_student(newest, (TEACHER,))[2] == 2
    assert checkpoints(run)[-1] == latest_checkpoint(run) and read_description(run)["config"] == trained.config.to_json()
    for load in (load_backbone, describe_checkpoint):
        with pytest.raises(RunError, match=f"it is a folder. Give its newest checkpoint: {newest}"):
            load(run)
        with pytest.raises(RunError, match="config.json is damaged .*they are called checkpoint-NNNNNNNN.safetensors"):
            load(f"{run}/config.json")
        with pytest.raises(RunError, match="There is no checkpoint"):
            load(str(tmp_path / "nothing.safetensors"))


def test_what_pixels_are_normalised_by(trained, tmp_path):
    """A checkpoint says by which mean and deviation its pixels were normalised; one of format 1 means ImageNet's, unchanged."""
    assert describe_checkpoint(latest_checkpoint(trained.directory.path)).pixels == {}  # a source that does not tell
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3}
    path = save_checkpoint(tmp_path, 2, *fresh(trained.config), trained.config, IDENTITY, pixels=pixels)
    assert describe_checkpoint(path).pixels == pixels
    old = forge(tmp_path / "checkpoint-00000002.safetensors", trained, format=1)
    there = describe_checkpoint(old)
    assert there.pixels == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]} and there.changes == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit flip", "foreign"])
def test_damaged_file(trained, tmp_path, damage):
    """A cut, empty, changed or foreign file is refused by name, and the student stays as it was."""
    path = tmp_path / "checkpoint-00000002.safetensors"
    shutil.copy(latest_checkpoint(trained.directory.path), path)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-100]
    elif damage == "empty":
        data = b""
    elif damage == "bit flip":
        data[-3] ^= 16
    else:
        header = b'{"__metadata__":{"format":"pt"}}'
        data = len(header).to_bytes(8, "little") + header
    path.write_bytes(data)

    student, optimizer = fresh(trained.config)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(RunError, match="checkpoint-00000002.safetensors is damaged"):
        load_checkpoint(path, student, optimizer, trained.config, IDENTITY)
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())


def test_failed_write_leaves_the_old_one(trained, tmp_path, monkeypatch):
    """If a checkpoint cannot be written, the one before it stays and nothing half written is left."""
    from safetensors import SafetensorError

    student, optimizer = fresh(trained.config)
    save_checkpoint(tmp_path, 1, student, optimizer, trained.config, IDENTITY, keep=1)

    def no_space(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("student.files.checkpoint.save_file", no_space)
    with pytest.raises(RunError, match="No space left"):
        save_checkpoint(tmp_path, 2, student, optimizer, trained.config, IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]


def test_no_mutation_is_believed(trained, tmp_path):
    """Bits turned over, bytes overwritten, ends cut off: 300 damaged checkpoints are refused or, seldom, give the same values."""
    path = tmp_path / "checkpoint-00000002.safetensors"
    sound = latest_checkpoint(trained.directory.path).read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    random = np.random.default_rng(0)
    student, optimizer = fresh(trained.config)
    n_refused = 0
    for case in range(300):
        data = bytearray(sound)
        place = int(random.integers(header if case % 3 else len(sound)))  # two of three in the header
        if case % 10 == 0:
            del data[place:]
        elif case % 10 == 1:
            data[place : place + 64] = random.bytes(64)
        else:
            data[place] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            assert load_checkpoint(path, student, optimizer, trained.config, IDENTITY).step == 2, case
        except RunError:
            n_refused += 1
            continue
        for name, value in trained.student.state_dict().items():
            assert torch.equal(student.state_dict()[name], value), (case, name)
    assert n_refused > 280


def test_older_sound_one_is_named(trained, tmp_path):
    """Where the newest checkpoint is damaged, nothing is loaded: the message names the newest sound one and what to do."""
    student, optimizer = fresh(trained.config)
    for step in (1, 2, 3, 10**8):
        save_checkpoint(tmp_path, step, student, optimizer, trained.config, IDENTITY, keep=9)
    paths = checkpoints(tmp_path)
    assert [path.name for path in paths][-1] == latest_checkpoint(tmp_path).name == "checkpoint-100000000.safetensors"
    for path in paths[2:]:
        path.write_bytes(path.read_bytes()[:-1])
    match = r"100000000.safetensors is damaged .* delete it, .* from step 2: checkpoint-00000002.safetensors is sound"
    with pytest.raises(RunError, match=match):
        load_checkpoint(paths[-1], student, optimizer, trained.config, IDENTITY)
    with pytest.raises(RunError, match=match):
        load_backbone(paths[-1])
    for path in paths[:2]:
        path.unlink()
    with pytest.raises(RunError, match="no older one in .* is sound. Or start a new run"):
        load_checkpoint(paths[-1], student, optimizer, trained.config, IDENTITY)


def test_renamed_checkpoint(trained, tmp_path):
    """A checkpoint under the name of another step is refused."""
    path = tmp_path / "checkpoint-00000009.safetensors"
    shutil.copy(latest_checkpoint(trained.directory.path), path)
    with pytest.raises(RunError, match="holds step 2"):
        load_checkpoint(path, *fresh(trained.config), trained.config, IDENTITY)


def test_loaded_moments_are_not_the_file(trained, tmp_path):
    """What the optimizer goes on with is in memory: a checkpoint that is overwritten later does not reach into the training."""
    path = tmp_path / "checkpoint-00000002.safetensors"
    shutil.copy(latest_checkpoint(trained.directory.path), path)
    student, optimizer = fresh(trained.config)
    load_checkpoint(path, student, optimizer, trained.config, IDENTITY)
    backbone, _ = load_backbone(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    there = dict(trained.student.named_parameters())
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, there[name])
        for key, value in optimizer.state.get(parameter, {}).items():
            assert torch.equal(value, trained.optimizer.state[there[name]][key]), name
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, trained.student.state_dict()[f"backbone.{name}"]), name


def forge(path, trained, description=None, tensors=None, **changes):
    """A checkpoint as a stranger would write it: every checksum fits."""
    original = latest_checkpoint(trained.directory.path)
    tensors = load_file(original) if tensors is None else tensors
    with safe_open(original, "pt") as file:
        value = json.loads(file.metadata()["student"])
    value |= changes
    del value["crc32"]
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(f"{name} {tuple(tensors[name].shape)}".encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    value["tensors_crc32"] = changes.get("tensors_crc32", crc)
    value["crc32"] = zlib.crc32(json.dumps(value, sort_keys=True).encode())
    save_file(tensors, path, metadata={"student": json.dumps(value) if description is None else description})
    return path


def test_forging_works(trained, tmp_path):
    """What the next tests call forged is sound but for what they change."""
    path = forge(tmp_path / "checkpoint-00000002.safetensors", trained)
    assert load_checkpoint(path, *fresh(trained.config), trained.config, IDENTITY).step == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "2"},
        {"step": True},
        {"step": 2.0},
        {"step": 2**70},
        {"samples_seen": None},
        {"config": []},
        {"config": {}},
        {"identity": "x"},
        {"format": 4},
        {"format": 0},
        {"surprise": 1},
        {"tensors_crc32": "1"},
        {"description": ""},
        {"description": "[]"},
        {"description": "[" * 5000},
        {"description": "1" * 5000},
        {"description": '{"crc32": 1}'},
        {"description": " " * (1 << 21) + "{}"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_forged_description(trained, tmp_path, changes):
    """A header of another shape than ours is refused in a sentence, whatever its checksums say."""
    path = forge(tmp_path / "checkpoint-00000002.safetensors", trained, **changes)
    with pytest.raises(RunError, match="checkpoint-00000002"):
        load_checkpoint(path, *fresh(trained.config), trained.config, IDENTITY)
    if "identity" not in changes:
        with pytest.raises(RunError, match="checkpoint-00000002"):
            load_backbone(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 16384, "heads": 1},
        {"depth": 40},
        {"mlp_ratio": 64.0},
        {"image_size": 4096, "patch_size": 1},
        {"dim": 10**12, "heads": 1},
        {"depth": 0},
        {"dim": 8},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_forged_sizes_take_no_memory(trained, tmp_path, changes):
    """A configuration that promises other sizes than the file has is refused before a network of that size is built."""
    config = trained.config.to_json()
    config["backbone"] |= changes
    path = forge(tmp_path / "checkpoint-00000002.safetensors", trained, config=config)
    with pytest.raises(RunError, match="does not fit this student|cannot build"):
        load_backbone(path)


@pytest.mark.parametrize("change", ["dropped", "added", "shape", "dtype", "empty"])
@pytest.mark.parametrize("name", ["model.backbone.cls_token", "optim.backbone.cls_token.exp_avg"])
def test_forged_tensors(trained, tmp_path, name, change):
    """Tensors that are missing, too many, or of another shape or dtype are refused by name, before anything is changed."""
    tensors = load_file(latest_checkpoint(trained.directory.path))
    if change == "dropped":
        del tensors[name]
    elif change == "added":
        tensors[f"{name}.more"] = torch.zeros(1)
    else:
        tensors[name] = {"shape": torch.zeros(3, 5), "dtype": tensors[name].int(), "empty": torch.zeros(0)}[change]
    path = forge(tmp_path / "checkpoint-00000002.safetensors", trained, tensors=tensors)
    student, optimizer = fresh(trained.config)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        load_checkpoint(path, student, optimizer, trained.config, IDENTITY)
    assert all(torch.equal(student.state_dict()[key], value) for key, value in before.items()) and not optimizer.state


@pytest.mark.parametrize("kind", ["link", "broken link", "folder", "pipe"])
def test_names_that_are_no_files(trained, tmp_path, kind):
    """A link that leads out of the run's folder, a folder and a pipe are refused as checkpoints."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint-00000002.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(latest_checkpoint(trained.directory.path) if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(RunError, match="checkpoint-00000002.safetensors"):
        load_backbone(latest_checkpoint(tmp_path / "run"))


def test_a_link_inside_the_folder_is_fine(trained, tmp_path):
    """A link may point to another file of the same folder."""
    shutil.copy(latest_checkpoint(trained.directory.path), tmp_path / "sound")
    (tmp_path / "checkpoint-00000002.safetensors").symlink_to("sound")
    assert load_checkpoint(latest_checkpoint(tmp_path), *fresh(trained.config), trained.config, IDENTITY).step == 2


def test_full_disk(trained, tmp_path, monkeypatch):
    """A disk that is full when the file is made durable is an error with what to do; nothing half written stays."""
    student, optimizer = fresh(trained.config)
    save_checkpoint(tmp_path, 1, student, optimizer, trained.config, IDENTITY)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match="could not be written.*No space left on device.*same command again"):
        save_checkpoint(tmp_path, 2, student, optimizer, trained.config, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"weights_sha256": "cd" * 32}, "weights of the teacher: sha256 abababababab in the run, sha256 cdcdcdcdcdcd given"),
        ({"views": ["11" * 32]}, "views: 2 in the run, 1 given"),
        ({"views": ["11" * 32, "33" * 32]}, "crops of view 1: sha256 222222222222 in the run, sha256 333333333333 given"),
        ({"order": {"seed": 1}}, "order of the rows.seed: 0 in the run, 1 given"),
        ({"store": "clip-b16"}, "targets: demo in the run, clip-b16 given"),
        ({"dtype": "float16"}, "dtype of the targets: int8 in the run, float16 given"),
        ({"live": "demo"}, "teacher run on the spot: none in the run, demo given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_data_in_words(tmp_path, given, words):
    """What a checkpoint was trained on and what it is to go on with are named in words, both sides, and nothing else is."""
    config = tiny_config()
    there = {"crops_id": "cc" * 32, "views": ["11" * 32, "22" * 32], "order": {"seed": 0}, "store": "demo", "dtype": "int8",
             "weights_sha256": "ab" * 32}  # fmt: skip
    path = save_checkpoint(tmp_path, 1, *fresh(config), config, there)
    with pytest.raises(RunMismatchError, match="other data") as caught:
        load_checkpoint(path, *fresh(config), config, there | given)
    assert str(caught.value).splitlines()[1:-1] == [f"  {words}"]
    assert load_checkpoint(path, *fresh(config), config, there).step == 1


def test_nothing_a_terminal_would_obey(tmp_path):
    """Names and values from a stranger's file are shown without control characters, and shortly."""
    config = tiny_config()
    path = save_checkpoint(tmp_path, 1, *fresh(config), config, {"\x1b[2J": "\x1b[31m", "deep": [[[[[["x"] * 20] * 20]]]] * 20})
    with pytest.raises(RunMismatchError) as caught:
        load_checkpoint(path, *fresh(config), config, {"crops_id": "cc" * 32})
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


def test_missing_file(tmp_path):
    """A path without a file is said to have none."""
    with pytest.raises(RunError, match="There is no checkpoint"):
        load_backbone(tmp_path / "checkpoint-00000001.safetensors")
