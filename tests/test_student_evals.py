"""Evaluators: known answers."""

import math

import pytest
import torch
from torch import nn

from student import ConfigError, SwinConfig, ViT, ViTConfig
from student.evals import KNNEvaluator, extract_features, knn_accuracy
from student.modules.backbones import build_backbone


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_separable_classes():
    """Classes that point in different directions are told apart without an error."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = 5 * torch.eye(3)[labels] + 0.1 * torch.randn(60, 3, generator=generator)
    for n_neighbours in (1, 10, 20, 200):
        assert knn_accuracy(features[:30], labels[:30], features[30:], labels[30:], n_neighbours) == 1.0


@pytest.mark.parametrize(
    "temperature, label",
    [
        (0.07, 0),  # e^(cos 5 / T) = 1.51e6 against 2 e^(cos 20 / T) = 1.35e6: the one near neighbour wins
        (1.0, 1),  # e^(cos 5) = 2.71 against 2 e^(cos 20) = 5.12: two outvote one
    ],
)
def test_vote_by_hand(temperature, label):
    """Neighbours vote with exp(cosine / temperature): one at 5 degrees against two at 20."""
    train, labels = 3 * directions(5, 20, -20), torch.tensor([0, 1, 1])
    near, far = math.exp(math.cos(math.radians(5)) / temperature), math.exp(math.cos(math.radians(20)) / temperature)
    assert (near > 2 * far) == (label == 0)
    assert knn_accuracy(train, labels, directions(0), torch.tensor([label]), 3, temperature) == 1.0
    assert knn_accuracy(train, labels, directions(0), torch.tensor([1 - label]), 3, temperature) == 0.0


def test_chunks_do_not_matter():
    """Test features in chunks of any size give the same accuracy."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(2, 50, 4, generator=generator)
    labels = torch.arange(50) % 4
    whole = knn_accuracy(train, labels, test, labels, 5)
    assert 0 < whole < 1
    assert knn_accuracy(train, labels, test, labels, 5, chunk_size=7) == whole


def test_readouts():
    """`cls` is row 0 and `mean` the mean of the others, over all batches in order."""
    tokens = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    batches = [(tokens[:3], torch.tensor([0, 1, 2])), (tokens[3:], torch.tensor([3, 4]))]
    features, labels = extract_features(lambda images: images, batches)
    assert torch.equal(features["cls"], tokens[:, 0]) and labels.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(features["mean"], tokens[:, 1:].mean(1))


def test_backbone_is_evaluated_without_drop_path():
    """A backbone in training is put in eval mode for the features and back afterwards."""
    backbone = ViT(ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2, drop_path=0.9)).train()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features, _ = extract_features(backbone, [(images, torch.zeros(4, dtype=torch.int64))], ("cls",))
    assert backbone.training
    assert torch.equal(features["cls"], backbone.eval().encode_all(images)[:, 0].detach())


def test_without_cls():
    """Of a backbone without CLS the mean over all its tokens is read, and nothing called CLS."""
    backbone = build_backbone(SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=(1, 1), heads=(2, 2), window=4)).eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(4))]
    features, _ = extract_features(backbone, batches)
    assert features.keys() == {"mean"}
    torch.testing.assert_close(features["mean"], backbone.encode_all(images).mean(1).detach())
    assert {name.split("/")[1] for name, _ in KNNEvaluator(batches, batches).run(backbone)} == {"mean"}
    with pytest.raises(ConfigError, match="no CLS token"):
        extract_features(backbone, batches, ("cls",))


def test_knn_evaluator():
    """Names carry readout and number of neighbours, which the size of the training set limits."""
    images = torch.eye(3)[torch.arange(12) % 3][:, None].expand(12, 5, 3).contiguous()
    batches = [(images, torch.arange(12) % 3)]
    results = dict(KNNEvaluator(batches, batches, n_neighbours=(1, 10, 20, 200)).run(nn.Identity()))
    assert results == {f"knn/{readout}/{n}": 1.0 for readout in ("cls", "mean") for n in (1, 10, 12)}


def test_unknown_readout_and_no_images():
    """An unknown readout and an empty data set are refused in words."""
    with pytest.raises(ConfigError, match="there are cls, mean"):
        extract_features(nn.Identity(), [], ("max",))
    with pytest.raises(ConfigError, match="no images"):
        extract_features(nn.Identity(), [])
