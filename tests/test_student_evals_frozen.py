"""Evaluators of frozen features: known answers on features that are separable by construction, and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student import ConfigError
from student.evals import LinearProbe, LogisticRegression, Retrieval
from student.evals.attention import overlap, rank_correlation, top_overlap
from student.evals.frozen.draws import balanced_share, split
from student.evals.frozen.lars import StackedLARS
from student.evals.frozen.linear import LinearStack
from student.evals.frozen.protocol import Labelled, require_classes
from student.evals.frozen.retrieval import average_precisions
from student.evals.frozen.segment import Segment, Segmented, mean_iou, number_of_classes
from student.evals.rank import rankme, singular_values
from student.evals.schedule import rate_at
from student.evals.semantic import most_attended
from student.evals.watch import unwatched


def separable(n: int, seed: int = 0, noise: float = 0.1) -> Labelled:
    """Three classes, one on each axis of four."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return Labelled(5 * torch.eye(4)[labels] + noise * torch.randn(n, 4, generator=generator), labels)


def meaningless(n: int, seed: int) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    return Labelled(torch.randn(n, 4, generator=generator), torch.arange(n) % 3)


LINEAR = LinearProbe(rates=(20.0, 100.0), epochs=60, warmup_epochs=3, batch_size=16)
LOGREG = LogisticRegression(strengths=(1e-3, 1.0, 1e3))


@pytest.mark.parametrize("evaluator", [LINEAR, LOGREG, Retrieval()], ids=lambda e: e.name)
def test_separable_classes_are_told_apart(evaluator):
    """Classes on axes of their own are told without an error; features that know nothing do no better than chance."""
    if evaluator is LOGREG:
        pytest.importorskip("sklearn")
    values = dict(evaluator.score(separable(60), separable(30, seed=1), 0, unwatched))
    assert values[evaluator.main] == pytest.approx(1.0)
    chance = dict(evaluator.score(meaningless(60, 0), meaningless(60, 1), 0, unwatched))
    assert chance[evaluator.main] < 0.6


# --- LARS ----------------------------------------------------------------------------------------------------------------


def lars_by_hand(weights, gradients, rates, decay, momentum=0.9, trust=0.001):
    """MAE's rule for one parameter, in numpy: the ratio only for what has more than one axis, the rate behind the momentum."""
    weights, velocity = weights.astype("float64"), np.zeros(weights.shape)
    for gradient, rate in zip(gradients, rates, strict=True):
        change = gradient.astype("float64")
        if weights.ndim > 1:
            change = change + decay * weights
            of_weights, of_change = np.sqrt((weights**2).sum()), np.sqrt((change**2).sum())
            if of_weights > 0 and of_change > 0:
                change = change * trust * of_weights / of_change
        velocity = momentum * velocity + change
        weights = weights - rate * velocity
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_is_the_official_rule(decay):
    """Four steps of three classifiers side by side, each at its own rates, equal the rule for each alone; a weight of zeros is
    moved by the plain gradient."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5))
    weight[2] = 0
    gradients = [(rng.normal(size=weight.shape), rng.normal(size=bias.shape)) for _ in range(4)]
    rates = rng.uniform(0.1, 50, size=(4, 3))
    parameters = [torch.tensor(weight), torch.tensor(bias)]
    optimizer = StackedLARS(parameters, weight_decay=decay)
    for step in range(4):
        optimizer.step([torch.tensor(g) for g in gradients[step]], torch.tensor(rates[step]))
    for head in range(3):
        of_weight = lars_by_hand(weight[head], [g[0][head] for g in gradients], rates[:, head], decay)
        of_bias = lars_by_hand(bias[head], [g[1][head] for g in gradients], rates[:, head], decay)
        np.testing.assert_allclose(parameters[0][head].numpy(), of_weight, rtol=1e-12)
        np.testing.assert_allclose(parameters[1][head].numpy(), of_bias, rtol=1e-12)
    assert not np.allclose(parameters[0][0].numpy(), weight[0], rtol=1e-3)


def test_gradients_of_the_stack_are_autograd_s():
    """The gradients that are worked out by hand are those of torch's cross-entropy behind torch's batch norm, head by head."""
    data = meaningless(12, 0)
    stack = LinearStack(2, 3, 4, seed=0, device=torch.device("cpu"))
    stack.weight[1] *= 3
    normed = stack.normed(data.features, training=True)
    found = stack.gradients(normed, data.labels)
    for head in range(2):
        norm, linear = torch.nn.BatchNorm1d(4, affine=False, eps=1e-6), torch.nn.Linear(4, 3)
        with torch.no_grad():
            linear.weight.copy_(stack.weight[head])
            linear.bias.copy_(stack.bias[head])
        torch.nn.functional.cross_entropy(linear(norm(data.features)), data.labels).backward()
        torch.testing.assert_close(found[0][head], linear.weight.grad)
        torch.testing.assert_close(found[1][head], linear.bias.grad)
        torch.testing.assert_close(stack.mean, norm.running_mean)
        torch.testing.assert_close(stack.var, norm.running_var)


def test_rates_of_the_schedule():
    """Linear over the warm-up, the peak at its end, half of it in the middle of the rest, nothing at the end."""
    values = [rate_at(epoch, 2.0, 90, 10) for epoch in (0, 5, 10, 50, 90)]
    assert values == pytest.approx([0, 1, 2, 1, 0])


def test_the_rate_is_chosen_without_val():
    """Which rate counts does not depend on the images that are judged; all rates are reported."""
    train, val = separable(60, noise=2.0), separable(60, seed=1, noise=2.0)
    other = Labelled(val.features, val.labels.roll(1))
    here, there = (dict(LINEAR.score(train, judged, 0, unwatched)) for judged in (val, other))
    assert here["rate"] == there["rate"] and here["best"] != there["best"]
    assert {"at 20", "at 100"} <= here.keys() and here["best"] in (here["at 20"], here["at 100"])
    assert here["best"] == here[f"at {here['rate']:g}"]


def test_seeds_are_their_own_draws():
    """The same seed gives the same classifiers, another one others."""
    train, val = separable(40, noise=3.0), separable(200, seed=1, noise=3.0)
    results = [dict(LINEAR.score(train, val, seed, unwatched)) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LinearProbe(rates=()), "give base rates above 0"),
        (lambda: LinearProbe(rates=(0.1, 0.1)), "each once"),
        (lambda: LinearProbe(epochs=5), "do not fit into 5"),
        (lambda: LogisticRegression(strengths=(0.0,)), "above 0"),
        (lambda: balanced_share(torch.tensor([0, 1]), 0.0, 0), "above 0 and at most 1"),
        (lambda: split(torch.tensor([0, 1]), 0.1, 0), "one training image"),
        (lambda: require_classes(Labelled(torch.zeros(2, 1), torch.tensor([1, 1])), separable(3)), "all of one class"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# --- draws ---------------------------------------------------------------------------------------------------------------


def test_shares_keep_the_balance():
    """Of each class the same share, one image at least, drawn by the seed alone."""
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    rows = balanced_share(labels, 0.1, 0)
    assert labels[rows].bincount().tolist() == [10, 5, 1] and rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, balanced_share(labels, 0.1, 0)) and not torch.equal(rows, balanced_share(labels, 0.1, 1))
    assert torch.equal(balanced_share(labels, 1.0, 0), torch.arange(153))


def test_splits_are_whole():
    """Every row is on one side, and no class with two images is missing on either."""
    labels = torch.tensor([0] * 20 + [1] * 2 + [2])
    learn, choose = split(labels, 0.1, 3)
    assert sorted([*learn.tolist(), *choose.tolist()]) == list(range(23))
    assert labels[choose].bincount(minlength=3).tolist() == [2, 1, 0] and labels[learn].bincount().tolist() == [18, 1, 1]


# --- retrieval, rank, attention ------------------------------------------------------------------------------------------


def test_average_precision_by_hand():
    """Relevant images at ranks 1 and 3 of four: (1/1 + 2/3) / 2."""
    angles = torch.deg2rad(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    query = torch.tensor([[2.0, 0.0]])
    found = average_precisions(query, torch.tensor([7]), gallery, torch.tensor([7, 0, 7, 0]))
    assert float(found) == pytest.approx((1 + 2 / 3) / 2)
    train = Labelled(gallery, torch.tensor([0, 1, 0, 1]))
    val = Labelled(query.repeat(3, 1), torch.tensor([0, 0, 1]))
    values = dict(Retrieval(most_numbers=4).score(train, val))
    first, second = 5 / 6, (1 / 2 + 2 / 4) / 2
    assert values["map"] == pytest.approx((first + second) / 2) and values["map_queries"] == pytest.approx(
        (2 * first + second) / 3
    )


def test_rankme_by_hand():
    """Features along one line have rank 1, along k equal axes k; two axes of 3 to 1 exp(entropy of 3/4, 1/4)."""
    assert rankme(singular_values(torch.ones(10, 6))) == pytest.approx(1, abs=1e-3)
    assert rankme(singular_values(torch.eye(6).repeat(4, 1))) == pytest.approx(6, abs=1e-3)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert rankme(singular_values(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(np.exp(entropy), abs=1e-3)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_singular_values_are_torch_s(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(singular_values(features).float(), torch.linalg.svdvals(features), rtol=1e-4, atol=1e-5)


def test_overlap_of_attention_by_hand():
    """Maps need not sum to 1; equal ones overlap whole, disjoint ones not at all."""
    ours, theirs = torch.tensor([[0.1, 0.1, 0.3, 0.0]]), torch.tensor([[0.4, 0.0, 0.0, 0.4]])
    assert float(overlap(ours, theirs)) == pytest.approx(0.2)  # .2, .2, .6, 0 against .5, 0, 0, .5
    assert float(overlap(ours, 3 * ours)) == pytest.approx(1.0)
    assert float(top_overlap(torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[4.0, 1, 3, 2]]), 0.5)) == 0.5
    assert float(rank_correlation(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[10.0, 20, 30, 400]]))) == pytest.approx(1)
    assert float(rank_correlation(torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 3, 2]]))) == pytest.approx(0.5)


def test_the_most_attended_patches():
    """Half of the patches, in their own order."""
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.1, 0.8, 0.0]])
    assert most_attended(attention).tolist() == [[1, 3], [0, 2]]
    assert most_attended(attention, 0.1).tolist() == [[1], [0]]


# --- segmentation --------------------------------------------------------------------------------------------------------


def test_mean_iou_by_hand():
    """Sums over both images, then classes, then the mean (7/12; the mean of images would be 23/48); a class that is nowhere, and
    pixels that are ignored, do not count."""
    pytest.importorskip("torchmetrics", reason="needs the extra evals")
    said = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 0]]])
    true = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 1]]])
    whole, by_class = mean_iou(said, true, 3)
    assert whole == pytest.approx(7 / 12) and by_class[:2] == pytest.approx([4 / 6, 2 / 4]) and np.isnan(by_class[2])
    true[0, 0, 1] = true[1, 1, 1] = 255  # both mistakes
    assert mean_iou(said, true, 3)[0] == 1.0


def test_segmentation_of_separable_patches():
    """Patch tokens that say their class are segmented without an error, by the grid's rows and columns."""
    pytest.importorskip("torchmetrics", reason="needs the extra evals")
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 2, (24, 1, 1), generator=generator).expand(-1, 2, 3).clone()  # a grid of 2 x 3
    classes[:, 0] = 1 - classes[:, 0]
    tokens = torch.eye(4)[classes.flatten(1)].half()
    masks = classes[:, :, :1].expand(-1, -1, 2).repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    data = Segmented(tokens, masks)
    values = dict(Segment(epochs=30, rate=0.1, batch_size=8).score(data, data, (2, 3)))
    assert values["miou"] > 0.99 and values["pixels"] > 0.99 and values["at 1"] > 0.99


def test_masks_that_do_not_match():
    """A class that only the validation masks have, or one class alone, is refused in words."""
    masks = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    tokens = torch.zeros(1, 4, 2).half()
    assert number_of_classes(Segmented(tokens, masks), Segmented(tokens, masks)) == 2
    with pytest.raises(ConfigError, match=r"1 classes that those of --train lack: \[2\]"):
        number_of_classes(Segmented(tokens, masks), Segmented(tokens, torch.full_like(masks, 2)))
    with pytest.raises(ConfigError, match="fewer than two classes"):
        number_of_classes(Segmented(tokens, masks * 0), Segmented(tokens, masks * 0))
