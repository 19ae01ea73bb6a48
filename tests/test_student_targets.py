"""Targets: what a teacher's whitened tokens and an image's pixels become."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from student_fakes import fake_batch

from student import Needs, RunError, TeacherHead
from student.modules.targets import final_norm, normalise_patches, patchify, teacher_output, unit_length


def test_whitened_tokens_determine_norm_and_projection():
    """gamma * whiten(h) + beta is the teacher's LayerNorm of h, and times P its projection."""
    generator = torch.Generator().manual_seed(0)
    h = 5 * torch.randn(2, 7, 12, generator=generator) + 3
    head = TeacherHead(*(torch.randn(shape, generator=generator) for shape in [(12,), (12,), (12, 5)]))
    whitened = F.layer_norm(h, (12,), eps=1e-5)
    normed = F.layer_norm(h, (12,), head.gamma, head.beta, eps=1e-5)
    torch.testing.assert_close(final_norm(whitened, head), normed)
    torch.testing.assert_close(teacher_output(whitened, head), normed @ head.projection)


def test_output_without_a_projection():
    """The output of a teacher without a projection is its final norm."""
    head = TeacherHead(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.0]), None)
    assert teacher_output(torch.tensor([[1.0, 3.0]], dtype=torch.float16), head).tolist() == [[2.5, -3.0]]


def test_output_is_exact_under_autocast():
    """A student in bfloat16 gets the same target as one in float32."""
    generator = torch.Generator().manual_seed(0)
    head = TeacherHead(*(torch.randn(shape, generator=generator) for shape in [(12,), (12,), (12, 5)]))
    whitened = torch.randn(2, 7, 12, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        got = teacher_output(whitened, head)
    assert torch.equal(got, teacher_output(whitened, head))


def test_unit_length():
    """Tokens become unit vectors, so that their squared distance is 2 - 2 cos."""
    a, b = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    squared = (unit_length(a) - unit_length(b)).pow(2).sum(-1)
    torch.testing.assert_close(squared, 2 - 2 * F.cosine_similarity(a, b))


def test_patchify():
    """Patch n is the square at row n // columns, its values ordered row, column, channel."""
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], images[1, :, 2:4, 2:4].permute(1, 2, 0).reshape(-1))


def test_normalised_patches():
    """Each patch loses its mean and is divided by its unbiased deviation; a flat patch becomes zeros."""
    patches = np.random.default_rng(0).normal(3, 2, (2, 3, 12))
    patches[0, 0] = 7.0
    expected = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normalise_patches(torch.from_numpy(patches)).numpy(), expected, atol=1e-5)


def test_layers_are_counted_from_the_end():
    """`layer` finds a block by its number from the end, `patches` leaves out CLS, and an absent block is an error."""
    targets = fake_batch(range(2), (-3, -1)).targets[0]
    assert torch.equal(targets.layer(-1), targets.tokens[:, 1])
    assert torch.equal(targets.patches(-3), targets.tokens[:, 0, 1:])
    with pytest.raises(RunError, match=r"layers \(-3, -1\), not -2"):
        targets.layer(-2)


def test_needs_add_up():
    """What two parts need together is every layer once, in ascending order."""
    assert Needs((-1,)) | Needs((-3, -1), attention=True) == Needs((-3, -1), attention=True)
