"""Subjects, kept features and records of evaluations."""

from __future__ import annotations

import json
import math
import os
import time

import pytest
import torch
from fakes import FakeTeacher
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from student import ConfigError, MCMAEConfig, SwinConfig, ViTConfig
from student.errors import RunError
from student.evals.feature_store import FeatureStore, frozen_features
from student.evals.records import append, cell, columns, groups, read, summed_up, title
from student.evals.semantic import most_attended, renormalised, seeing_most_attended
from student.evals.subject import Subject, TeacherEncoder, TimmEncoder, fingerprint
from student.modules.backbones import build_backbone

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
TINY = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2)


def subject_of(config=TINY, seed: int = 0, name: str = "tiny") -> Subject:
    torch.manual_seed(seed)
    backbone = build_backbone(config).eval()
    backbone.grid = config.grid
    return Subject(name, "", fingerprint(str(config), backbone), backbone, config.image_size, MEAN, STD)


class Images:
    """Six images; counts how often they are looked at."""

    size, decoder, batch_size = 16, "made up", 4

    def __init__(self, state: str = "a"):
        self._state, self.n_passes = state, 0
        self.pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 6

    def state(self):
        return self._state

    def __iter__(self):
        self.n_passes += 1
        for rows in torch.arange(6).split(4):
            yield self.pixels[rows], rows % 2


# --- features ------------------------------------------------------------------------------------------------------------


def test_features_are_computed_once(tmp_path):
    """The second time they come from the folder, equal to the bit; the key in the file says what of."""
    said, images, subject = [], Images(), subject_of()
    store = FeatureStore(tmp_path / "features", said.append)
    first, labels = frozen_features(subject, images, store, ("cls", "mean"))
    again, labels_again = frozen_features(subject, images, store, ("mean", "cls"))
    assert images.n_passes == 1 and said == []
    assert all(torch.equal(first[name], again[name]) for name in ("cls", "mean")) and torch.equal(labels, labels_again)
    torch.testing.assert_close(first["cls"], subject.encoder.encode_all(images.pixels)[:, 0].detach())
    files = sorted((tmp_path / "features").iterdir())
    keys = []
    for path in files:
        with safe_open(path, "pt") as file:
            keys.append(json.loads(file.metadata()["key"]))
    assert sorted(key["readout"] for key in keys) == ["cls", "mean"]
    assert {key["weights"] for key in keys} == {subject.weights} and {key["decoder"] for key in keys} == {"made up"}


@pytest.mark.parametrize("other", ["weights", "data", "precision", "seen", "mean"])
def test_features_of_something_else_are_not_taken(tmp_path, other):
    """Other weights, images, precision, patches or pixels have features of their own."""
    images, store = Images(), FeatureStore(tmp_path)
    frozen_features(subject_of(), images, store, ("mean",))
    subject = subject_of(seed=int(other == "weights"))
    if other == "mean":
        subject = Subject(**{**vars(subject), "mean": STD})
    images = Images("b" if other == "data" else "a")
    changed = {"precision": {"precision": "bf16"}, "seen": {"encode": subject.encoder.encode_all, "seen": "half"}}.get(other, {})
    frozen_features(subject, images, store, ("mean",), **changed)
    assert images.n_passes == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["a bit of a tensor", "cut short", "text", "another's"])
def test_damaged_features_are_made_again(tmp_path, damage):
    """With a line that names the file, and with the right numbers."""
    said, images, subject = [], Images(), subject_of()
    store = FeatureStore(tmp_path, said.append)
    right, _ = frozen_features(subject, images, store, ("mean",))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "a bit of a tensor":
        data[-100] ^= 1
    elif damage == "another's":
        frozen_features(subject_of(seed=1), images, store, ("mean",))
        (other,) = set(tmp_path.iterdir()) - {path}
        data = other.read_bytes()
    else:
        data = data[:-5] if damage == "cut short" else b"hello"
    path.write_bytes(data)
    found, _ = frozen_features(subject, images, store, ("mean",))
    assert torch.equal(found["mean"], right["mean"])
    assert len(said) == 1 and str(path) in said[0] and "computed again" in said[0]
    frozen_features(subject, images, store, ("mean",))
    assert len(said) == 1


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    """A failure while writing leaves nothing; what a writer left that was killed long ago is cleared, a young one is not."""
    store, subject = FeatureStore(tmp_path), subject_of()
    monkeypatch.setattr("student.evals.feature_store.publish", lambda aside, path: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        frozen_features(subject, Images(), store, ("mean",))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    frozen_features(subject, Images(), store, ("mean",))
    (path,) = tmp_path.iterdir()
    left = [tmp_path / f"{path.name}.{number}-aa.partial" for number in (1, 2)]
    for file in left:
        file.write_text("x")
    os.utime(left[0], (time.time() - 7200,) * 2)
    path.unlink()
    frozen_features(subject, Images(), store, ("mean",))
    assert sorted(tmp_path.iterdir()) == sorted([path, left[1]])


def test_features_that_are_no_numbers(tmp_path):
    """An encoder that gives NaN is refused by name, and nothing of it is kept."""
    subject = subject_of()
    with torch.no_grad():
        subject.encoder.norm.weight[0] = math.nan
    with pytest.raises(ConfigError, match="tiny are not finite for 6 of 6 images. Its weights are broken"):
        frozen_features(subject, Images(), FeatureStore(tmp_path), ("mean",))
    assert list(tmp_path.iterdir()) == []


# --- subjects ------------------------------------------------------------------------------------------------------------


def test_fingerprints():
    """Of architecture and every bit of the weights."""
    backbone = build_backbone(TINY)
    first = fingerprint("vit", backbone)
    assert first == fingerprint("vit", backbone) != fingerprint("vit with other heads", backbone)
    with torch.no_grad():
        backbone.norm.bias[3] = 1e-30
    assert fingerprint("vit", backbone) != first


def test_a_teacher_without_a_final_norm():
    """Its tokens are not those of a last norm, and are not measured as if they were."""
    assert TeacherEncoder(FakeTeacher()).has_cls
    with pytest.raises(ConfigError, match="fake has no final norm .* Give a teacher that has one"):
        TeacherEncoder(FakeTeacher(has_head=False))


@pytest.mark.parametrize("registers, pool", [(0, "token"), (2, "token"), (0, "avg")])
def test_a_network_of_timm(registers, pool):
    """Tokens are timm's own behind its final norm, wherever it has that; registers are left out."""
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, reg_tokens=registers,
                              global_pool=pool).eval()  # fmt: skip
    encoder, images = TimmEncoder(model, 16), torch.randn(2, 3, 16, 16)
    tokens = encoder.encode_all(images)
    whole = model.forward_features(images)
    expected = model.fc_norm(whole) if pool == "avg" else whole
    assert encoder.grid == (4, 4) and encoder.has_cls and tokens.shape == (2, 17, 16)
    torch.testing.assert_close(tokens, torch.cat([expected[:, :1], expected[:, 1 + registers :]], 1))


@pytest.mark.parametrize(
    "config",
    [TINY, MCMAEConfig(image_size=16, strides=(2, 2, 1), dims=(8, 8, 16), depths=(1, 1, 2), heads=2)],
    ids=["vit", "mcmae"],
)
def test_patches_can_be_left_out(config):
    """All of them kept gives the tokens of the whole image; pixels of those that are left out reach no token."""
    subject = subject_of(config)
    n = config.n_patches
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = subject.encode_kept(images, torch.arange(n).expand(2, -1))
        torch.testing.assert_close(whole, subject.encoder.encode_all(images), rtol=1e-4, atol=1e-5)
        keep = torch.arange(n // 2).expand(2, -1)  # the upper half
        changed = images.clone()
        changed[:, :, 8:] = 7.0
        half = subject.encode_kept(images, keep)
        assert half.shape == (2, 1 + n // 2, config.dim)
        torch.testing.assert_close(subject.encode_kept(changed, keep), half)


def test_what_cannot_be_asked():
    """Attention of an encoder without CLS, patches left out where mask tokens stand for them, grids that differ."""
    swin = subject_of(SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=(1, 1), heads=(2, 2), window=4), name="swin")
    images = torch.randn(1, 3, 16, 16)
    with pytest.raises(ConfigError, match="swin .* has no CLS attention"):
        swin.attention(images)
    with pytest.raises(ConfigError, match="swin .* cannot leave patches out"):
        swin.encode_kept(images, torch.tensor([[0]]))
    masked = subject_of(ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2, hidden="mask-token"))
    with pytest.raises(ConfigError, match="cannot leave patches out"):
        masked.encode_kept(images, torch.tensor([[0]]))
    finer = subject_of(ViTConfig(image_size=16, patch_size=2, dim=16, depth=1, heads=2), name="finer")
    with pytest.raises(ConfigError, match=r"finer attends over \(8, 8\) patches, tiny has \(4, 4\)"):
        seeing_most_attended(subject_of(), finer)


def test_semantic_features():
    """The encoder sees the half that the teacher attends to, by the teacher's own view of the pixels."""
    subject, teacher = subject_of(), subject_of(seed=1)
    teacher = Subject(**{**vars(teacher), "mean": STD, "std": MEAN})
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    seen = (pixels - torch.tensor(STD).view(3, 1, 1)) / torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(renormalised(images, subject, teacher), seen)
    with torch.no_grad():
        expected = subject.encode_kept(images, most_attended(teacher.attention(seen)))
        torch.testing.assert_close(seeing_most_attended(subject, teacher)(images), expected)
    assert expected.shape == (3, 1 + 8, 16)


# --- records -------------------------------------------------------------------------------------------------------------


def record(what: str, value: float, **changes) -> dict:
    data = {side: {"fingerprint": side, "images": 10, "name": side} for side in ("train", "val")}
    made = {"format": 1, "evaluator": "knn", "protocol": "knn (DINO)", "what": what, "about": "", "weights": what,
            "readout": "cls", "layer": "last", "data": data, "share": 1.0, "seeds": [0], "main": "20", "numbers": [],
            "results": summed_up([{"20": value}])}  # fmt: skip
    return {**made, **changes}


def test_protocols_are_not_ranked_together():
    """Other protocols, layers, shares, numbers of seeds and images are tables of their own; in each the best comes first."""
    data = record("x", 0)["data"]
    others = [
        {"protocol": "knn with other votes"},
        {"evaluator": "linear"},
        {"layer": "6"},
        {"share": 0.1},
        {"seeds": [0, 1, 2]},
        {"data": {**data, "val": {**data["val"], "fingerprint": "other"}}},
        {"data": {"val": data["val"]}},
    ]
    first = [record("low", 0.2), record("high", 0.9), record("broken", math.nan), record("middle", 0.5)]
    found = groups(first + [record("other", 0.99, **change) for change in others])
    assert [r["what"] for r in found[0]] == ["high", "middle", "low", "broken"]
    assert [[r["what"] for r in group] for group in found[1:]] == [["other"]] * len(others)


def test_measured_again():
    """Of the same weights, token and protocol the last result counts."""
    (group,) = groups([record("a", 0.1), record("b", 0.5), record("a", 0.9), record("a", 0.3, readout="mean")])
    assert [(r["what"], r["results"]["20"]["mean"]) for r in group] == [("a", 0.9), ("b", 0.5), ("a", 0.3)]


def test_mean_and_deviation():
    """Of the seeds, by n - 1; one alone has none."""
    found = summed_up([{"best": 0.5, "at 1": 1.0}, {"best": 0.7, "at 1": 1.0}])
    assert found["best"] == {"mean": pytest.approx(0.6), "deviation": pytest.approx(0.02**0.5), "values": [0.5, 0.7]}
    one = record("a", 0.5, results=found, seeds=[0, 1], main="best", share=0.01)
    assert columns([one]) == ["best"] and cell(one, "best") == "60.0% ± 14.1" and cell(one, "rate") == ""
    assert title([one]) == "knn (DINO)\ntrain train (10), val val (10), 1% of train, 2 seeds"
    assert summed_up([{"best": 0.5}])["best"]["deviation"] is None
    assert cell(record("a", 12.345, numbers=["20"]), "20") == "12.35"


def test_records_are_appended(tmp_path):
    """Each is a line; one that was cut short is named, and does not swallow the next."""
    path = tmp_path / "new" / "records.jsonl"
    append(path, [record("a", 0.5)])
    append(path, [record("b", 0.6)])
    assert [r["what"] for r in read(path)] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-20])
    append(path, [record("c", 0.7)])
    with pytest.raises(RunError, match="line 2 is no record .* Delete that line"):
        read(path)
    path.write_text("".join(line for number, line in enumerate(path.read_text().splitlines(True), 1) if number != 2))
    assert [r["what"] for r in read(path)] == ["a", "c"]


@pytest.mark.parametrize("text", ['{"format": 2}', "[]", "7", '{"format": 1}', "[" * 99999, "\xff"])
def test_what_is_no_record(tmp_path, text):
    """One sentence, which names the line."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match="line 1|not text"):
        read(path)
