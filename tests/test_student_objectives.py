"""Losses by hand: forward in numpy, gradient by central differences of that numpy function."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_predictor import linear, predict
from student_fakes import fake_batch

from student import (
    AlignConfig,
    ConfigError,
    CosineConfig,
    MCMAEConfig,
    MimicConfig,
    Needs,
    PredictorConfig,
    ReconstructConfig,
    SwinConfig,
    TeacherHead,
    TeacherShape,
    ViTConfig,
)
from student.batch import Mask
from student.config import ContrastConfig, ObjectiveConfig
from student.modules.backbones import Encoded
from student.modules.objectives import OBJECTIVES, build_objective
from student.modules.objectives.align import _initial_mixing

BACKBONE = ViTConfig(image_size=8, patch_size=4, dim=8, depth=3, heads=2)  # 2 x 2 patches
MASK = Mask(keep=torch.tensor([[2, 0], [1, 2]]), drop=torch.tensor([[1, 3], [0, 3]]))
EVERYTHING = Mask(keep=torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]]), drop=torch.empty(2, 0, dtype=torch.long))
WITH_CLS = TeacherShape("with CLS", (2, 2), 6, 4, True, True, None)
PROJECTED = replace(WITH_CLS, name="CLIP-like", projection_dim=5)
NO_CLS = TeacherShape("no CLS", (2, 2), 6, 3, False, False, None)

MAE = PredictorConfig("self", dim=8, depth=1, heads=2)
MILAN = PredictorConfig("prompting", dim=8, depth=2, heads=2)
CAE = PredictorConfig("regressor", dim=8, depth=2, heads=2, layer_scale=0.1)
CAE_TI = PredictorConfig("regressor", dim=4, depth=1, heads=2, layer_scale=0.1)


class _NoCLS(ViTConfig):
    """An encoder that drops hidden patches and has no CLS token; none of ours is one."""

    has_cls = False


NO_CLS_BACKBONE = _NoCLS(image_size=8, patch_size=4, dim=8, depth=3, heads=2)


def random_encoded(has_cls: bool = True, n_visible: int = 2) -> Encoded:
    generator = torch.Generator().manual_seed(0)
    shape = (2, has_cls + n_visible, 8)
    layers = tuple(torch.randn(shape, generator=generator).requires_grad_() for _ in range(3))
    return Encoded(torch.randn(shape, generator=generator).requires_grad_(), layers, has_cls)


def random_batch(teacher: TeacherShape, layers: tuple[int, ...] = (-1,)):
    """A batch of one teacher, whose final norm and projection are not trivial."""
    batch = fake_batch(range(2), layers, teacher)
    generator = torch.Generator().manual_seed(2)
    gamma, beta = 1 + 0.3 * torch.randn(2, teacher.dim, generator=generator)
    projection = torch.randn(teacher.dim, teacher.projection_dim, generator=generator) if teacher.projection_dim else None
    return replace(batch, targets=(replace(batch.targets[0], head=TeacherHead(gamma, beta, projection)),))


def with_random_weights(objective):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return objective


def double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def assert_same_loss_and_gradient(objective, encoded, batch, by_hand, mask=MASK):
    """by_hand(weights, tokens, layers) -> float, all float64 numpy; compared in value and in every gradient."""
    loss, _ = objective(encoded, batch, mask)
    loss.backward()

    tensors = {
        **dict(objective.named_parameters()),
        "tokens": encoded.tokens,
        **{f"layers.{index}": layer for index, layer in enumerate(encoded.layers)},
    }
    values = {name: double(tensor) for name, tensor in tensors.items()}

    def hand_loss():
        return by_hand(values, values["tokens"], [values[f"layers.{i}"] for i in range(3)])

    assert loss.item() == pytest.approx(hand_loss(), rel=1e-5)

    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        flat = values[name].reshape(-1)
        got = np.zeros(flat.size) if tensor.grad is None else tensor.grad.numpy().reshape(-1)
        for index in rng.choice(flat.size, size=min(flat.size, 8), replace=False):
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


# --- mimic: MR-MAE -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [BACKBONE, NO_CLS_BACKBONE], ids=["cls", "no cls"])
def test_mimic_by_hand(backbone):
    """L_M is the mean over crops, visible patches and channels of (W e + b - z)^2, without CLS."""
    objective = with_random_weights(build_objective(MimicConfig(), backbone, (WITH_CLS,)))
    batch = random_batch(WITH_CLS)
    z = visible(double(batch.targets[0].tokens[:, 0, 1:]))

    def by_hand(w, tokens, layers):
        return np.mean((linear(tokens[:, backbone.has_cls :], w, "head") - z) ** 2)

    assert_same_loss_and_gradient(objective, random_encoded(backbone.has_cls), batch, by_hand)


def test_mimic_of_the_second_teacher():
    """Each objective reads the teacher it names: CLIP and DINO together are two mimic losses with a head each."""
    other = TeacherShape("other", (2, 2), 10, 2, True, True, None)
    objective = build_objective(MimicConfig(teacher=1), BACKBONE, (WITH_CLS, other))
    assert objective.teacher == 1 and objective.head.out_features == 10
    encoded, wrong, batch = random_encoded(), random_batch(WITH_CLS), random_batch(other)
    batch = replace(batch, targets=(*wrong.targets, *batch.targets))

    z = visible(double(batch.targets[1].tokens[:, 0, 1:]))
    weights = {name: double(value) for name, value in objective.named_parameters()}
    expected = np.mean((linear(double(encoded.patches), weights, "head") - z) ** 2)
    assert objective(encoded, batch, MASK)[0].item() == pytest.approx(expected, rel=1e-5)


# --- align: MaskAlign --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["dynamic", "layer-wise"])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(
    "backbone, teacher",
    [(BACKBONE, WITH_CLS), (BACKBONE, NO_CLS), (NO_CLS_BACKBONE, WITH_CLS)],
    ids=["cls", "teacher without cls", "student without cls"],
)
def test_align_by_hand(backbone, teacher, levels, mixing):
    """MaskAlign: blocks, mixed by W or each its own, are adapted; 2 * smooth L1, CLS where both have one, mean of levels."""
    config = AlignConfig(levels=levels, mixing=mixing)
    objective = with_random_weights(build_objective(config, backbone, (teacher,)))
    batch = random_batch(teacher, objective.needs.layers)
    assert objective.needs == Needs(tuple(range(-levels, 0)))

    def by_hand(w, tokens, layers):
        total = 0.0
        for level in range(levels):
            z = double(batch.targets[0].tokens[:, level])
            if mixing == "dynamic":
                mixed = sum(w["mixing"][level, s] * layers[s] for s in range(3))
            else:
                mixed = layers[3 - levels + level]
            if teacher.has_cls and backbone.has_cls:
                z = np.concatenate([z[:, :1], visible(z[:, 1:])], axis=1)
            else:
                z, mixed = visible(z[:, teacher.has_cls :]), mixed[:, backbone.has_cls :]
            error = np.abs(linear(mixed, w, f"adaptors.{level}") - z)
            total += 2 * np.mean(np.where(error < 1, error**2 / 2, error - 0.5)) / levels
        return total

    assert_same_loss_and_gradient(objective, random_encoded(backbone.has_cls), batch, by_hand)


def test_initial_mixing():
    """W starts as identity + 0.01 where the depths agree and as the mean of all blocks where they differ; layer-wise has none."""
    same = build_objective(AlignConfig(levels=2), BACKBONE, (NO_CLS,)).mixing  # 3 student blocks, 3 teacher blocks
    assert torch.equal(same, torch.tensor([[0.01, 1.01, 0.01], [0.01, 0.01, 1.01]]))
    other = build_objective(AlignConfig(levels=2), BACKBONE, (WITH_CLS,)).mixing  # 4 teacher blocks
    assert torch.equal(other, torch.full((2, 3), 1 / 3))
    assert _initial_mixing(12, 12).diagonal().eq(1.01).all()
    layer_wise = build_objective(AlignConfig(levels=2, mixing="layer-wise"), BACKBONE, (WITH_CLS,))
    assert {name for name, _ in layer_wise.named_parameters()} == {
        f"adaptors.{level}.{kind}" for level in (0, 1) for kind in ("weight", "bias")
    }


def test_align_parts_are_the_levels():
    """The details of align are the losses of single levels, and the loss is their mean."""
    objective = build_objective(AlignConfig(levels=3), BACKBONE, (WITH_CLS,))
    loss, parts = objective(random_encoded(), random_batch(WITH_CLS, (-3, -2, -1)), MASK)
    assert list(parts) == ["layer-3", "layer-2", "layer-1"]
    assert loss.item() == pytest.approx(sum(value.item() for value in parts.values()) / 3)


def test_one_level_of_align_is_mimic_where_errors_are_small():
    """Below an error of 1, 2 * smooth L1 is the squared error: MR-MAE without pixels is MaskAlign with one level (no CLS)."""
    align = build_objective(AlignConfig(levels=1, mixing="layer-wise"), BACKBONE, (NO_CLS,))
    mimic = build_objective(MimicConfig(), BACKBONE, (NO_CLS,))
    mimic.head.load_state_dict(align.adaptors[0].state_dict())
    batch, last = random_batch(NO_CLS), 0.2 * random_encoded().tokens.detach()
    batch = replace(batch, targets=(replace(batch.targets[0], tokens=0.2 * batch.targets[0].tokens),))
    encoded = Encoded(last, (last,) * 3)
    assert align(encoded, batch, MASK)[0].item() == pytest.approx(mimic(encoded, batch, MASK)[0].item(), rel=1e-5)


# --- reconstruct: MAE --------------------------------------------------------------------------------------------


def hand_pixel_errors(batch, predicted):
    """Squared errors of predicted[b][n] at the hidden patches of 4 x 4 pixels, each normalised by itself."""
    images = double(batch.images)
    for b in range(2):
        for n in MASK.drop[b].tolist():
            row, column = divmod(n, 2)
            pixels = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].transpose(1, 2, 0).reshape(-1)
            yield (predicted[b, n] - (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)) ** 2


@pytest.mark.parametrize("style", ["self", "prompting", "regressor"])
@pytest.mark.parametrize("mimic", [0.0, 0.7])
def test_reconstruct_by_hand(style, mimic):
    """MAE: mean over hidden patches of squared normalised-pixel errors, plus those of teacher tokens; any predictor will do."""
    config = ReconstructConfig(mimic=mimic, decoder=PredictorConfig(style, dim=8, depth=1, heads=2))
    objective = with_random_weights(build_objective(config, BACKBONE, (WITH_CLS,) if mimic else ()))
    batch = random_batch(WITH_CLS)
    z = double(batch.targets[0].tokens[:, 0, 1:])
    assert (objective.teacher, objective.needs) == ((0, Needs((-1,), hidden_tokens=True)) if mimic else (None, Needs()))

    def by_hand(w, tokens, layers):
        keep, drop = MASK.keep.numpy(), MASK.drop.numpy()
        decoded = predict(w, tokens, keep, drop, style=style, depth=1, n_heads=2, grid=(2, 2), prefix="decoder.")[:, 1:]
        loss = np.mean(list(hand_pixel_errors(batch, linear(decoded, w, "head"))))
        if mimic:
            guess = linear(decoded, w, "mimic_head")
            loss += mimic * np.mean([(guess[b, n] - z[b, n]) ** 2 for b in range(2) for n in drop[b]])
        return loss

    assert_same_loss_and_gradient(objective, random_encoded(), batch, by_hand)


def test_both_targets_at_the_decoder_are_logged():
    """With `mimic` the log has both losses, without their factor."""
    objective = build_objective(ReconstructConfig(mimic=3.0, decoder=MAE), BACKBONE, (WITH_CLS,))
    loss, parts = objective(random_encoded(), random_batch(WITH_CLS), MASK)
    assert list(parts) == ["pixels", "mimic"]
    assert loss.item() == pytest.approx(parts["pixels"].item() + 3 * parts["mimic"].item())


def test_reconstruct_patch_is_the_backbone_s():
    """A head has the pixels of one output token: 4 x 4 here, 16 x 16 for MCMAE, whose stem has strides 4, 2, 2."""
    assert build_objective(ReconstructConfig(decoder=MAE), BACKBONE, ()).head.out_features == 3 * 4 * 4
    mcmae = MCMAEConfig(image_size=32, dims=(8, 8, 8), depths=(1, 1, 1), heads=2)
    objective = build_objective(ReconstructConfig(decoder=MAE), mcmae, ())
    assert objective.head.out_features == 3 * 16 * 16
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert objective(random_encoded(), replace(random_batch(WITH_CLS), images=images), MASK)[0].isfinite()


# --- cosine: MILAN, CAE v2 ---------------------------------------------------------------------------------------


def hand_output(batch, teacher):
    """(gamma z + beta) P of every token of the last block, or without P where there is none."""
    targets = batch.targets[0]
    normed = double(targets.tokens[:, 0]) * double(targets.head.gamma) + double(targets.head.beta)
    return normed @ double(targets.head.projection) if teacher.projection_dim else normed


def hand_cosine_errors(predicted, target):
    """1 - cos of every token."""
    dots = (predicted * target).sum(-1)
    return 1 - dots / np.sqrt((predicted**2).sum(-1) * (target**2).sum(-1))


@pytest.mark.parametrize(
    "config, teacher, has_cls",
    [
        (CosineConfig(scale=2.0, predictor=MILAN), PROJECTED, True),
        (CosineConfig(scale=2.0, predictor=MILAN), WITH_CLS, True),
        (CosineConfig(scale=2.0, predictor=MAE), PROJECTED, True),
        (CosineConfig(predictor=CAE), PROJECTED, True),
        (CosineConfig(predictor=CAE_TI), PROJECTED, True),
        (CosineConfig(predictor=CAE, tokens=(0.5, 2.0, 0.25)), PROJECTED, True),
        (CosineConfig(predictor=MILAN, tokens=(0.0, 1.0, 1.0)), NO_CLS, True),
        (CosineConfig(predictor=CAE, tokens=(0.0, 1.0, 1.0)), PROJECTED, False),
    ],
    ids=["milan", "milan-dino", "milan-plain", "cae-v2", "cae-v2-ti", "factors", "teacher without cls", "student without cls"],
)
def test_cosine_by_hand(config, teacher, has_cls):
    """One mean of scale * (1 - cos) over CLS, visible and hidden tokens, to the teacher's projection, else its final norm."""
    backbone = BACKBONE if has_cls else NO_CLS_BACKBONE
    objective = with_random_weights(build_objective(config, backbone, (teacher,)))
    batch = random_batch(teacher)
    keep, drop = MASK.keep.numpy(), MASK.drop.numpy()
    predictor = config.predictor
    options = {"style": predictor.style, "depth": predictor.depth, "n_heads": predictor.heads, "grid": (2, 2)}
    with_cls = has_cls and teacher.has_cls
    target = hand_output(batch, teacher)

    def by_hand(w, tokens, layers):
        predicted = linear(predict(w, tokens, keep, drop, **options, has_cls=has_cls, prefix="predictor."), w, "head")
        if not with_cls:
            predicted = predicted[:, has_cls:]
        errors = hand_cosine_errors(predicted, target if with_cls else target[:, teacher.has_cls :])
        factors = np.zeros_like(errors)
        factors[:, : int(with_cls)] = config.tokens[0]
        for b in range(2):
            factors[b, with_cls + keep[b]] = config.tokens[1]
            factors[b, with_cls + drop[b]] = config.tokens[2]
        return config.scale * (factors * errors).sum() / errors.size

    assert_same_loss_and_gradient(objective, random_encoded(has_cls), batch, by_hand)


def milan_and_cae(**changes):
    """MILAN's and CAE v2's loss with the same weights; the prediction is CAE's."""
    objectives = [
        build_objective(CosineConfig(scale=scale, predictor=CAE, **changes), BACKBONE, (PROJECTED,)) for scale in (2, 1)
    ]
    objectives[1].load_state_dict(objectives[0].state_dict())
    return objectives


def test_milan_is_twice_cae():
    """|p - t|^2 of unit vectors is 2 - 2 cos: the two papers' losses differ by a factor of 2."""
    milan, cae = milan_and_cae()
    encoded, batch = random_encoded(), random_batch(PROJECTED)
    assert milan(encoded, batch, MASK)[0].item() == pytest.approx(2 * cae(encoded, batch, MASK)[0].item())


def test_cosine_parts_are_means():
    """CLS, visible and hidden are means of their own, which the loss weighs by their numbers: 1, 2 and 2 of 5 tokens."""
    objective, _ = milan_and_cae()
    loss, parts = objective(random_encoded(), random_batch(PROJECTED), MASK)
    assert list(parts) == ["cls", "visible", "hidden"]
    cls, seen, hidden = (part.item() for part in parts.values())
    assert loss.item() == pytest.approx((cls + 2 * seen + 2 * hidden) / 5)


def test_cae_v2_as_its_paper_has_it():
    """Factors turn one mean over all tokens into the paper's sum of two means, visible and hidden, without CLS."""
    encoded, batch = random_encoded(), random_batch(PROJECTED)
    torch.manual_seed(0)
    objective = build_objective(CosineConfig(predictor=CAE, tokens=(0.0, 5 / 2, 5 / 2)), BACKBONE, (PROJECTED,))
    loss, parts = objective(encoded, batch, MASK)
    assert loss.item() == pytest.approx(parts["visible"].item() + parts["hidden"].item())


def test_no_regressor_is_distillation_of_visible_tokens():
    """CAE v2 with regressor depth 0: hidden tokens teach the encoder nothing, its gradient is that of CLS and visible tokens."""
    predictor = replace(CAE, depth=0)
    gradients, batch = [], random_batch(PROJECTED)
    for tokens in ((1.0, 1.0, 1.0), (1.0, 1.0, 0.0)):
        torch.manual_seed(0)
        objective = build_objective(CosineConfig(predictor=predictor, tokens=tokens), BACKBONE, (PROJECTED,))
        encoded = random_encoded()
        objective(encoded, batch, MASK)[0].backward()
        gradients.append(encoded.tokens.grad)
    torch.testing.assert_close(*gradients)

    keep = MASK.keep.unsqueeze(-1).expand(-1, -1, 5)
    output = torch.from_numpy(hand_output(batch, PROJECTED)).float()
    target = torch.cat([output[:, :1], output[:, 1:].gather(1, keep)], dim=1)
    encoded = random_encoded()
    normed = torch.nn.functional.layer_norm(encoded.tokens, (8,), eps=1e-6)
    predicted = normed @ objective.head.weight.T
    (torch.nn.functional.cosine_embedding_loss(predicted.flatten(0, 1), target.flatten(0, 1), torch.ones(6)) * 3 / 5).backward()
    torch.testing.assert_close(encoded.tokens.grad, gradients[0], atol=1e-6, rtol=1e-4)


def test_milan_without_decoder_is_distillation():
    """The row "KD" of MILAN: nothing hidden, no blocks: 2 - 2 cos between a norm and Linear of each token and the teacher's."""
    config = CosineConfig(scale=2.0, predictor=replace(CAE, depth=0))
    objective = with_random_weights(build_objective(config, BACKBONE, (PROJECTED,)))
    batch = random_batch(PROJECTED)
    output = hand_output(batch, PROJECTED)

    def by_hand(w, tokens, layers):
        normed = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
        predicted = linear(normed * w["predictor.norm.weight"] + w["predictor.norm.bias"], w, "head")
        target = np.stack([output[b][[0, *(1 + EVERYTHING.keep[b].numpy())]] for b in range(2)])
        return 2 * hand_cosine_errors(predicted, target).mean()

    assert_same_loss_and_gradient(objective, random_encoded(n_visible=4), batch, by_hand, EVERYTHING)
    _, parts = objective(random_encoded(n_visible=4), batch, EVERYTHING)
    assert list(parts) == ["cls", "visible"]


def test_visible_tokens_skip_milan_s_decoder():
    """What MILAN says of CLS and visible tokens depends on no block of the decoder: it is distillation, whatever the depth."""
    losses, batch = [], random_batch(PROJECTED)
    for depth in (0, 3):
        torch.manual_seed(0)
        deep = with_random_weights(build_objective(CosineConfig(predictor=replace(MILAN, depth=3)), BACKBONE, (PROJECTED,)))
        config = CosineConfig(predictor=replace(MILAN, depth=depth), tokens=(1.0, 1.0, 0.0))
        objective = build_objective(config, BACKBONE, (PROJECTED,))
        objective.load_state_dict({name: deep.state_dict()[name] for name in objective.state_dict()})
        losses.append(objective(random_encoded(), batch, MASK)[0].item())
    assert losses[0] == pytest.approx(losses[1])


# --- what all have in common -------------------------------------------------------------------------------------


ALL = {
    "mimic": MimicConfig(),
    "align": AlignConfig(levels=2),
    "layer-wise": AlignConfig(levels=2, mixing="layer-wise"),
    "mae": ReconstructConfig(decoder=MAE),
    "joint": ReconstructConfig(mimic=1.0, decoder=MAE),
    "milan": CosineConfig(scale=2.0, predictor=MILAN),
    "cae-v2": CosineConfig(predictor=CAE_TI),
}


@pytest.mark.parametrize(
    "name, expected",
    [("mimic", 1.0), ("align", 0.849), ("layer-wise", 0.849), ("mae", 1.0), ("joint", 2.0)],
    ids=lambda v: str(v),
)
def test_loss_of_a_prediction_of_zeros(name, expected):
    """Predicting nothing costs 1 in mean squared error and 0.849 in 2 * smooth L1 on standard normal targets."""
    teacher = replace(WITH_CLS, dim=4096)
    objective = build_objective(ALL[name], BACKBONE, (teacher,))
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.zero_()
    loss, _ = objective(random_encoded(), fake_batch(range(2), objective.needs.layers or (-1,), teacher), MASK)
    assert loss.item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name, expected", [("milan", 2.0), ("cae-v2", 1.0)])
def test_loss_of_unrelated_directions(name, expected):
    """A fresh student's directions have nothing to do with the teacher's: 2 for MILAN, 1 for CAE v2."""
    teacher = replace(WITH_CLS, dim=4096)
    torch.manual_seed(0)
    loss, _ = build_objective(ALL[name], BACKBONE, (teacher,))(random_encoded(), fake_batch(range(2), (-1,), teacher), MASK)
    assert loss.item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_parts_and_precision(config):
    """Under bfloat16 autocast losses stay float32, finite and near the exact ones, and every parameter gets a gradient."""
    objective = with_random_weights(build_objective(config, BACKBONE, (PROJECTED,)))
    batch = random_batch(PROJECTED, (-2, -1))
    half = tuple(replace(targets, tokens=targets.tokens.half()) for targets in batch.targets)
    exact, _ = objective(random_encoded(), batch, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = objective(random_encoded(), replace(batch, targets=half), MASK)
    loss.backward()
    assert {value.dtype for value in (loss, *parts.values())} == {torch.float32}
    assert loss.item() != exact.item() and loss.item() == pytest.approx(exact.item(), rel=0.03)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in objective.parameters())


class _Several(torch.nn.Module):
    def __init__(self):
        super().__init__()
        names = ("mimic", "align", "joint", "milan", "cae-v2")  # the others are parts of these
        self.objectives = torch.nn.ModuleList(build_objective(ALL[name], BACKBONE, (PROJECTED,)) for name in names)

    def forward(self, encoded, batch, mask):
        return [objective(encoded, batch, mask) for objective in self.objectives]


def test_compiles_in_one_graph():
    """torch.compile finds no break in any forward pass, under autocast as a training step has it."""
    torch.compiler.reset()
    objectives, batch = _Several(), random_batch(PROJECTED, (-2, -1))
    compiled = torch.compile(objectives, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (module(random_encoded(), batch, MASK) for module in (compiled, objectives))
    torch.testing.assert_close(got, expected)


NEW_SIZE = TeacherShape("l14", (16, 16), 1024, 24, True, True, 768)


@pytest.mark.parametrize(
    "config, teachers, words",
    [
        (MimicConfig(), (), "mimic learns from the tokens of teacher 1, and this run has none"),
        (AlignConfig(), (), "align learns from the tokens of teacher 1, and this run has none"),
        (CosineConfig(), (), "cosine learns from the tokens of teacher 1, and this run has none"),
        (ReconstructConfig(mimic=1.0), (), "reconstruct learns from the tokens of teacher 1, and this run has none"),
        (MimicConfig(teacher=1), (WITH_CLS,), "mimic-2 learns from the tokens of teacher 2, and this run has 1: with CLS"),
        (MimicConfig(), (NEW_SIZE,), r"the student has 2 x 2 .*l14 has 16 x 16\. A student of 64 px"),
        (AlignConfig(), (replace(NEW_SIZE, patch_size=14),), r"--image-size 28, under another --name, l14 has 2 x 2 patches"),
        (ContrastConfig(), (replace(WITH_CLS, dim=8, has_final_norm=False),), "contrast learns from the output of the .* norm"),
        (CosineConfig(), (replace(WITH_CLS, has_final_norm=False),), "with CLS has none .* align, mimic and reconstruct.mimic"),
        (AlignConfig(levels=5), (WITH_CLS,), "levels=5 asks for more blocks than the teacher with CLS has: 4"),
        (AlignConfig(levels=4, mixing="layer-wise"), (WITH_CLS,), "more blocks than the backbone has: 3"),
        (CosineConfig(predictor=MILAN), (NO_CLS,), "counts CLS, which the teacher no CLS does not have"),
    ],
)
def test_teacher_must_fit(config, teachers, words):
    """An objective refuses a teacher that lacks what it needs and says what is there."""
    with pytest.raises(ConfigError, match=words):
        build_objective(config, BACKBONE, teachers)


def test_cosine_of_a_student_without_cls():
    """A student without CLS is refused unless the factor of CLS is 0."""
    with pytest.raises(ConfigError, match="counts CLS, which the backbone vit does not have"):
        build_objective(CosineConfig(predictor=MILAN), NO_CLS_BACKBONE, (WITH_CLS,))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_mask_tokens_in_the_encoder_are_refused(config):
    """Methods for visible patches do not train an encoder that sees all places."""
    for backbone in (replace(BACKBONE, hidden="mask-token"), SwinConfig(image_size=64, window=2)):
        with pytest.raises(ConfigError, match=f"this {backbone.kind} sees a mask token in place of each hidden one"):
            build_objective(config, backbone, (replace(WITH_CLS, grid=(2, 2)),))


def test_every_objective_can_be_named():
    """The table of objectives and the kinds a config file may name are the same."""
    assert set(OBJECTIVES) == set(ObjectiveConfig.__args__)
