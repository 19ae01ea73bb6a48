"""Checkpoints: one file, complete or not there, and nothing in it but the student."""

import shutil

import pytest
import torch
from safetensors import safe_open
from student_fakes import TEACHER, FakeSource, tiny_config
from timm.models.vision_transformer import VisionTransformer

from student import RunError, Student
from student.checkpoint import latest_checkpoint, load_backbone, load_checkpoint, save_checkpoint
from student.optim import build_optimizer
from student.trainer import Trainer

IDENTITY = {"cache": "fake", "rows": 20}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trainer:
    config = tiny_config()
    student = Student(config, TEACHER)
    trainer = Trainer(config, student, FakeSource(config, student.needs), tmp_path_factory.mktemp("a") / "run")
    trainer.fit(max_steps=2)
    return trainer


def fresh(config):
    student = Student(config, TEACHER)
    return student, build_optimizer(student, config.optim)


def test_round_trip(trained):
    """Weights and both moments of every parameter come back to the bit, and so does the step."""
    student, optimizer = fresh(tiny_config(seed=0))
    with torch.no_grad():
        student.backbone.cls_token.zero_()
    path = latest_checkpoint(trained.directory.path)
    assert load_checkpoint(path, student, optimizer, trained.config, IDENTITY) == 2

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
    words = "no checkpoint of a student" if damage == "foreign" else "checkpoint-00000002.safetensors is damaged"
    with pytest.raises(RunError, match=words):
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

    monkeypatch.setattr("student.checkpoint.save_file", no_space)
    with pytest.raises(RunError, match="No space left"):
        save_checkpoint(tmp_path, 2, student, optimizer, trained.config, IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]


def test_missing_file(tmp_path):
    """A path without a file is said to have none."""
    with pytest.raises(RunError, match="There is no checkpoint"):
        load_backbone(tmp_path / "checkpoint-00000001.safetensors")
