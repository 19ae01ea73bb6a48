"""The student as a whole."""

from dataclasses import replace

import pytest
import torch
from student_fakes import TEACHER, fake_batch, tiny_config

from student import (
    AlignConfig,
    CosineConfig,
    MaskConfig,
    MimicConfig,
    Needs,
    PredictorConfig,
    ReconstructConfig,
    Student,
    TrainConfig,
)
from student.masking import draw_noise

SMALL = PredictorConfig(dim=8, depth=1, heads=2)
ALL = (
    MimicConfig(0.5),
    AlignConfig(levels=2),
    ReconstructConfig(decoder=SMALL),
    CosineConfig(predictor=replace(SMALL, style="regressor", layer_scale=0.1)),
)


def loss_of(student):
    """Total and parts on a fixed batch and mask."""
    batch = fake_batch(range(4))
    return student(batch, student.draw_mask(batch, draw_noise(0, 0, 4, 16)))


def test_total_is_the_weighted_sum():
    """The total is the weighted sum of the parts, which are logged without their weights."""
    objectives = (MimicConfig(0.5), AlignConfig(2.0, levels=2), ReconstructConfig(0.25, decoder=SMALL))
    student = Student(tiny_config(objectives=objectives), (TEACHER,))
    total, parts = loss_of(student)
    expected = 0.5 * parts["mimic"] + 2 * parts["align"] + 0.25 * parts["reconstruct"]
    assert total.item() == pytest.approx(expected.item())
    assert set(parts) == {"mimic", "align", "align/layer-2", "align/layer-1", "reconstruct"}


def test_every_weight_learns():
    """A backward pass reaches every trainable weight of backbone and heads."""
    student = Student(tiny_config(), (TEACHER,))
    loss_of(student)[0].backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == ["backbone.pos_embed"]


def test_needs():
    """A student needs what its objectives and its masker need; reconstruction at random needs no teacher."""
    assert Student(tiny_config(), (TEACHER,)).needs == (Needs((-1,), attention=True),)
    align = tiny_config(objectives=(MimicConfig(), AlignConfig(levels=3)), mask=MaskConfig("random"))
    assert Student(align, (TEACHER,)).needs == (Needs((-3, -2, -1)),)
    alone = tiny_config(objectives=(ReconstructConfig(decoder=SMALL),), mask=MaskConfig("random"))
    assert Student(alone).needs == ()


def test_initial_weights_follow_the_seed():
    """Equal seeds build equal students, other seeds others, and the global generator is left as it was."""
    before = torch.get_rng_state()
    one, two, other = (Student(tiny_config(seed=seed), (TEACHER,)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["backbone.cls_token"], other["backbone.cls_token"])
    assert torch.equal(torch.get_rng_state(), before)


def test_vit_b_student_has_the_size_of_mae():
    """Encoder, decoder and both position tables of ViT-B/16 have the 111,907,840 parameters of MAE's model."""
    with torch.device("meta"):
        student = Student(TrainConfig())
    decoder_positions = 197 * 512  # a buffer here, a frozen parameter there
    assert sum(parameter.numel() for parameter in student.parameters()) + decoder_positions == 111_907_840


def test_bfloat16_autocast():
    """Under bfloat16 autocast, as on CUDA, the loss stays float32 and near the exact one, and gradients are finite."""
    student = Student(tiny_config(objectives=ALL), (TEACHER,)).eval()
    batch = fake_batch(range(4))
    mask = student.draw_mask(batch, draw_noise(0, 0, 4, 16))
    exact, _ = student(batch, mask)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = student(batch, mask)
    loss.backward()
    assert loss.dtype == torch.float32 and {part.dtype for part in parts.values()} == {torch.float32}
    assert loss.item() != exact.item() and loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
