"""Losses by hand: forward in numpy, gradient by central differences of that numpy function."""

import math

import numpy as np
import pytest
import torch
from student_fakes import fake_batch

from student import AlignConfig, BackboneConfig, ConfigError, MimicConfig, ReconstructConfig, TeacherShape
from student.backbone import Encoded
from student.masking import Mask
from student.objectives import OBJECTIVES, build_objective
from student.objectives.align import _initial_mixing

BACKBONE = BackboneConfig(image_size=8, patch_size=4, dim=8, depth=3, heads=2)  # 2 x 2 patches
MASK = Mask(keep=torch.tensor([[2, 0], [1, 2]]), drop=torch.tensor([[1, 3], [0, 3]]))
WITH_CLS = TeacherShape("with CLS", (2, 2), 6, 4, True, True, None)
NO_CLS = TeacherShape("no CLS", (2, 2), 6, 3, False, False, None)

erf = np.vectorize(math.erf)


def random_encoded(seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(torch.randn(2, 3, 8, generator=generator).requires_grad_() for _ in range(3))
    return Encoded(torch.randn(2, 3, 8, generator=generator).requires_grad_(), layers)


def with_random_weights(objective):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return objective


def assert_same_loss_and_gradient(objective, encoded, batch, by_hand):
    """by_hand(weights, tokens, layers) -> float, all float64 numpy; compared in value and in every gradient."""
    loss, _ = objective(encoded, batch, MASK)
    loss.backward()

    tensors = {
        **dict(objective.named_parameters()),
        "tokens": encoded.tokens,
        **{f"layers.{index}": layer for index, layer in enumerate(encoded.layers)},
    }
    values = {name: tensor.detach().numpy().astype(np.float64) for name, tensor in tensors.items()}

    def hand_loss():
        return by_hand(values, values["tokens"], [values[f"layers.{i}"] for i in range(3)])

    assert loss.item() == pytest.approx(hand_loss(), rel=1e-5)

    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        flat = values[name].reshape(-1)
        got = np.zeros(flat.size) if tensor.grad is None else tensor.grad.numpy().reshape(-1)
        for index in rng.choice(flat.size, size=min(flat.size, 12), replace=False):
            middle, step = flat[index], 1e-5
            flat[index] = middle + step
            above = hand_loss()
            flat[index] = middle - step
            below = hand_loss()
            flat[index] = middle
            assert got[index] == pytest.approx((above - below) / (2 * step), rel=2e-3, abs=2e-5), (name, index)


def visible(tokens: np.ndarray) -> np.ndarray:
    """Rows of numpy patch tokens [B, N, D] that MASK keeps."""
    return np.stack([tokens[b][MASK.keep[b].numpy()] for b in range(2)])


def test_mimic_by_hand():
    """L_M is the mean over crops, visible patches and channels of (W e + b - z)^2, without CLS."""
    objective = with_random_weights(build_objective(MimicConfig(), BACKBONE, WITH_CLS))
    batch = fake_batch(range(2), objective.needs.layers, WITH_CLS)
    z = visible(batch.targets.tokens[:, 0, 1:].numpy())

    def by_hand(w, tokens, layers):
        return np.mean((tokens[:, 1:] @ w["head.weight"].T + w["head.bias"] - z) ** 2)

    assert_same_loss_and_gradient(objective, random_encoded(), batch, by_hand)


@pytest.mark.parametrize("teacher", [WITH_CLS, NO_CLS], ids=["cls", "no cls"])
def test_align_by_hand(teacher):
    """MaskAlign: mix student blocks by W, adapt, 2 * smooth L1 with CLS where the teacher has one, mean of levels."""
    objective = with_random_weights(build_objective(AlignConfig(levels=2), BACKBONE, teacher))
    batch = fake_batch(range(2), objective.needs.layers, teacher)
    assert objective.needs.layers == (-2, -1)

    def by_hand(w, tokens, layers):
        total = 0.0
        for level in range(2):
            z = batch.targets.tokens[:, level].numpy().astype(np.float64)
            mixed = sum(w["mixing"][level, s] * layers[s] for s in range(3))
            if teacher.has_cls:
                z = np.concatenate([z[:, :1], visible(z[:, 1:])], axis=1)
            else:
                z, mixed = visible(z), mixed[:, 1:]
            error = np.abs(mixed @ w[f"adaptors.{level}.weight"].T + w[f"adaptors.{level}.bias"] - z)
            total += 2 * np.mean(np.where(error < 1, error**2 / 2, error - 0.5)) / 2
        return total

    assert_same_loss_and_gradient(objective, random_encoded(), batch, by_hand)


def layer_norm(x, w, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * w[name + ".weight"] + w[name + ".bias"]


def linear(x, w, name):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def attention(x, w, name, n_heads):
    n_images, n_tokens, dim = x.shape
    qkv = linear(x, w, name + ".qkv").reshape(n_images, n_tokens, 3, n_heads, dim // n_heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(dim // n_heads))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    return linear(mixed.transpose(0, 2, 1, 3).reshape(n_images, n_tokens, dim), w, name + ".proj")


def test_reconstruct_by_hand():
    """MAE: decoder of one block written out in numpy; mean over hidden patches of squared normalised-pixel errors."""
    config = ReconstructConfig(dim=8, depth=1, heads=2)
    objective = with_random_weights(build_objective(config, BACKBONE, None))
    batch = fake_batch(range(2), (), WITH_CLS)
    images = batch.images.numpy().astype(np.float64)
    omega = np.array([1.0, 0.01])
    places = np.stack(
        [
            np.concatenate([np.sin(c * omega), np.cos(c * omega), np.sin(r * omega), np.cos(r * omega)])
            for r in range(2)
            for c in range(2)
        ]
    )

    def by_hand(w, tokens, layers):
        embedded = linear(tokens, w, "decoder.embed")
        x = np.empty((2, 5, 8))
        x[:, 0] = embedded[:, 0]
        for b in range(2):
            x[b, 1 + MASK.drop[b].numpy()] = w["decoder.mask_token"][0, 0]
            x[b, 1 + MASK.keep[b].numpy()] = embedded[b, 1:]
        x[:, 1:] += places

        block = "decoder.blocks.0."
        x = x + attention(layer_norm(x, w, block + "norm1"), w, block + "attn", 2)
        hidden = linear(layer_norm(x, w, block + "norm2"), w, block + "mlp.fc1")
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, w, block + "mlp.fc2")
        predicted = linear(layer_norm(x, w, "decoder.norm"), w, "head")[:, 1:]

        errors = []
        for b in range(2):
            for n in MASK.drop[b].tolist():
                row, column = divmod(n, 2)
                pixels = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].transpose(1, 2, 0).reshape(-1)
                target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
                errors.append((predicted[b, n] - target) ** 2)
        return np.mean(errors)

    assert_same_loss_and_gradient(objective, random_encoded(), batch, by_hand)


@pytest.mark.parametrize(
    "config, expected",
    [(MimicConfig(), 1.0), (AlignConfig(levels=2), 0.849), (ReconstructConfig(dim=8, depth=1, heads=2), 1.0)],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_loss_of_a_prediction_of_zeros(config, expected):
    """Predicting nothing costs 1 in mean squared error and 0.849 in 2 * smooth L1 on standard normal targets."""
    teacher = TeacherShape("wide", (2, 2), 4096, 4, True, True, None)
    objective = build_objective(config, BACKBONE, teacher)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.zero_()
    loss, _ = objective(random_encoded(), fake_batch(range(2), objective.needs.layers, teacher), MASK)
    assert loss.item() == pytest.approx(expected, rel=0.03)


def test_initial_mixing():
    """W starts as identity + 0.01 where the depths agree and as the mean of all blocks where they differ."""
    same = build_objective(AlignConfig(levels=2), BACKBONE, NO_CLS).mixing  # 3 student blocks, 3 teacher blocks
    assert torch.equal(same, torch.tensor([[0.01, 1.01, 0.01], [0.01, 0.01, 1.01]]))
    other = build_objective(AlignConfig(levels=2), BACKBONE, WITH_CLS).mixing  # 4 teacher blocks
    assert torch.equal(other, torch.full((2, 3), 1 / 3))
    assert _initial_mixing(12, 12).diagonal().eq(1.01).all()


def test_align_parts_are_the_levels():
    """The details of align are the losses of single levels, and the loss is their mean."""
    objective = build_objective(AlignConfig(levels=3), BACKBONE, WITH_CLS)
    loss, parts = objective(random_encoded(), fake_batch(range(2), (-3, -2, -1), WITH_CLS), MASK)
    assert list(parts) == ["layer-3", "layer-2", "layer-1"]
    assert loss.item() == pytest.approx(sum(value.item() for value in parts.values()) / 3)


@pytest.mark.parametrize(
    "config, teacher, words",
    [
        (MimicConfig(), None, "mimic learns from a teacher's tokens"),
        (AlignConfig(), None, "align learns from a teacher's tokens"),
        (MimicConfig(), TeacherShape("l14", (16, 16), 1024, 24, True, True, 768), r"\(2, 2\).*l14 has \(16, 16\)"),
        (AlignConfig(levels=5), WITH_CLS, "levels=5 asks for more blocks than the teacher with CLS has: 4"),
    ],
)
def test_teacher_must_fit(config, teacher, words):
    """An objective refuses a teacher that lacks what it needs and says what is there."""
    with pytest.raises(ConfigError, match=words):
        build_objective(config, BACKBONE, teacher)


def test_every_objective_can_be_named():
    """The table of objectives and the kinds a config file may name are the same."""
    from student.config import OBJECTIVE_KINDS

    assert set(OBJECTIVES) == set(OBJECTIVE_KINDS.values())
