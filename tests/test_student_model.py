"""The student as a whole, and its decoder."""

import pytest
import torch
from student_fakes import TEACHER, fake_batch, tiny_config

from student import AlignConfig, MaskConfig, MimicConfig, Needs, ReconstructConfig, Student, TrainConfig
from student.masking import Mask, draw_noise
from student.predictor import Decoder


def test_total_is_the_weighted_sum():
    """The total is the weighted sum of the parts, which are logged without their weights."""
    objectives = (MimicConfig(0.5), AlignConfig(2.0, levels=2), ReconstructConfig(0.25, dim=8, depth=1, heads=2))
    student = Student(tiny_config(objectives=objectives), TEACHER)
    total, parts = student(fake_batch(range(4)), draw_noise(0, 0, 4, 16))
    expected = 0.5 * parts["mimic"] + 2 * parts["align"] + 0.25 * parts["reconstruct"]
    assert total.item() == pytest.approx(expected.item())
    assert set(parts) == {"mimic", "align", "align/layer-2", "align/layer-1", "reconstruct"}


def test_every_weight_learns():
    """A backward pass reaches every trainable weight of backbone and heads."""
    student = Student(tiny_config(), TEACHER)
    student(fake_batch(range(4)), draw_noise(0, 0, 4, 16))[0].backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == ["backbone.pos_embed"]


def test_needs():
    """A student needs what its objectives and its masker need; reconstruction at random needs no teacher."""
    assert Student(tiny_config(), TEACHER).needs == Needs((-1,), attention=True)
    align = tiny_config(objectives=(MimicConfig(), AlignConfig(levels=3)), mask=MaskConfig("random"))
    assert Student(align, TEACHER).needs == Needs((-3, -2, -1))
    alone = tiny_config(objectives=(ReconstructConfig(dim=8, depth=1, heads=2),), mask=MaskConfig("random"))
    assert Student(alone).needs == Needs()


def test_initial_weights_follow_the_seed():
    """Equal seeds build equal students, other seeds others, and the global generator is left as it was."""
    before = torch.get_rng_state()
    one, two, other = (Student(tiny_config(seed=seed), TEACHER).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["backbone.cls_token"], other["backbone.cls_token"])
    assert torch.equal(torch.get_rng_state(), before)


def test_decoder_puts_tokens_at_their_places():
    """Visible tokens stand at their patches, the mask token at all others, each with its position; CLS is first."""
    decoder = Decoder(6, (2, 2), dim=8, depth=1, heads=2, mlp_ratio=4.0)
    tokens = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0))
    placed = decoder.place(tokens, Mask(torch.tensor([[3, 0]]), torch.tensor([[2, 1]]))) - decoder.positions
    embedded, hidden = decoder.embed(tokens)[0], decoder.mask_token[0, 0]
    expected = torch.stack([embedded[0], embedded[2], hidden, hidden, embedded[1]])
    torch.testing.assert_close(placed[0], expected)


def test_vit_b_student_has_the_size_of_mae():
    """Encoder, decoder and both position tables of ViT-B/16 have the 111,907,840 parameters of MAE's model."""
    with torch.device("meta"):
        student = Student(TrainConfig())
    n_parameters = sum(parameter.numel() for parameter in student.parameters())
    assert n_parameters + student.objectives["reconstruct"].decoder.positions.numel() == 111_907_840


def test_bfloat16_autocast():
    """Under bfloat16 autocast, as on CUDA, the loss stays float32 and near the exact one, and gradients are finite."""
    objectives = (MimicConfig(0.5), AlignConfig(levels=2), ReconstructConfig(dim=8, depth=1, heads=2))
    student = Student(tiny_config(objectives=objectives), TEACHER).eval()
    batch, noise = fake_batch(range(4)), draw_noise(0, 0, 4, 16)
    exact, _ = student(batch, noise)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = student(batch, noise)
    loss.backward()
    assert loss.dtype == torch.float32 and {part.dtype for part in parts.values()} == {torch.float32}
    assert loss.item() != exact.item() and loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
