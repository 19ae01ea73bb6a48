"""Fine-tuning: layer decay as published, settings of the papers, a run that goes on as if it had not been stopped."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipelines.feed.labelled import LabelledImages
from pipelines.presets import PRESETS
from student import ConfigError, MCMAEConfig, SwinConfig, ViTConfig
from student.errors import NonFiniteLossError, RunError, RunMismatchError
from student.evals.finetuning.augmented import posterized, seeded, transform_of
from student.evals.finetuning.classifier import Classifier
from student.evals.finetuning.layers import layer_of, n_layers, parameter_groups, set_drop_path
from student.evals.finetuning.loop import FineTuning
from student.evals.finetuning.saved import NAME
from student.evals.finetuning.settings import RECIPES, FineTune, recipe_of
from student.evals.subject import Subject, TimmEncoder, fingerprint
from student.modules.backbones import build_backbone
from teacher_cache.errors import BadInputError

VIT = ViTConfig(image_size=16, patch_size=4, dim=16, depth=3, heads=2)
MCMAE = MCMAEConfig(image_size=16, strides=(2, 2, 1), dims=(8, 8, 16), depths=(1, 1, 2), heads=2)
SWIN = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=(1, 2), heads=(2, 2), window=4)
QUICK = FineTune(base_rate=0.05, layer_decay=0.75, drop_path=0.2, epochs=3, warmup_epochs=1, batch_size=8, erasing=0.1)


def subject_of(config, seed: int = 0) -> Subject:
    torch.manual_seed(seed)
    backbone = build_backbone(config).eval()
    backbone.grid = config.grid
    return Subject("tiny", "", fingerprint(str(config), backbone), backbone, config.image_size, (0.5,) * 3, (0.5,) * 3)


# --- layer decay ---------------------------------------------------------------------------------------------------------


def official_layer(name: str, n_blocks: int) -> int:
    """MAE's assignment for a ViT, worked out anew: blocks from 1, what precedes them 0, all else one behind the last."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else n_blocks + 1


def test_layer_decay_of_a_vit_is_the_official_one():
    """Each parameter's learning rate and weight decay, for a ViT of three blocks, at a decay of .5."""
    classifier = Classifier(subject_of(VIT), 5, dataclasses.replace(QUICK, layer_decay=0.5, weight_decay=0.1))
    groups = classifier.groups(dataclasses.replace(QUICK, layer_decay=0.5, weight_decay=0.1))
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {}
    for name, parameter in classifier.named_parameters():
        bare = name.removeprefix("encoder.")
        scale = 0.5 ** (3 + 1 - official_layer(bare, 3))
        expected[id(parameter)] = (scale, 0.0 if parameter.ndim == 1 or bare in ("cls_token", "pos_embed") else 0.1)
    assert found == expected and len(found) == sum(len(group["params"]) for group in groups)
    by_name = {name: found[id(parameter)] for name, parameter in classifier.named_parameters()}
    assert by_name["encoder.patch_embed.proj.weight"] == (0.0625, 0.1) and by_name["encoder.pos_embed"] == (0.0625, 0.0)
    assert by_name["encoder.blocks.0.mlp.fc1.weight"] == (0.125, 0.1) and by_name["encoder.blocks.2.norm1.bias"] == (0.5, 0.0)
    assert by_name["head.weight"] == (1.0, 0.1) and by_name["fc_norm.weight"] == (1.0, 0.0)


@pytest.mark.parametrize(
    "config, layers",
    [
        # of MCMAE only the blocks behind the convolutions count; all before them is layer 0 (MCMAE util/lr_decay.py)
        (MCMAE, {"embeds.0.proj.weight": 0, "stages.1.0.conv1.weight": 0, "project.weight": 0, "pos_embed": 0,
                 "blocks.0.attn.qkv.weight": 1, "blocks.1.attn.qkv.weight": 2, "norm.weight": 3}),
        # of Swin blocks count through the stages, and what joins two stages goes with the last block before it (SimMIM)
        (SWIN, {"patch_embed.proj.weight": 0, "layers.0.blocks.0.attn.qkv.weight": 1, "layers.1.downsample.reduction.weight": 1,
                "layers.1.blocks.0.attn.qkv.weight": 2, "layers.1.blocks.1.mlp.fc1.bias": 3, "norm.weight": 4}),
    ],
    ids=["mcmae", "swin"],
)  # fmt: skip
def test_layers_of_other_encoders(config, layers):
    backbone = build_backbone(config)
    assert {name: layer_of(name, backbone) for name in layers} == layers
    assert layers.keys() <= dict(backbone.named_parameters()).keys() and n_layers(backbone) == max(layers.values()) - 1


def test_nothing_learns_twice_or_not_at_all():
    """All parameters but those of pre-training are in one group each."""
    for config in (VIT, MCMAE, SWIN):
        classifier = Classifier(subject_of(config), 3, QUICK)
        of_groups = [p for group in classifier.groups(QUICK) for p in group["params"]]
        names = [name for name, p in classifier.named_parameters() if not any(p is other for other in of_groups)]
        assert len(of_groups) == len(set(map(id, of_groups)))
        assert all("mask_token" in name or "fuse" in name for name in names), names


def test_an_encoder_without_layers():
    with pytest.raises(ConfigError, match="neither blocks nor stages"):
        parameter_groups(nn.Linear(2, 2), [], 0.5, 0.1)


def test_drop_path_grows_with_depth():
    """From 0 at the first block to the rate at the last, whatever it was before; no rate takes it out."""
    backbone = build_backbone(dataclasses.replace(VIT, drop_path=0.9))
    set_drop_path(backbone, 0.2)
    rates = [getattr(block.drop_path2, "drop_prob", 0) for block in backbone.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2]) and all(isinstance(b.drop_path1, DropPath) for b in backbone.blocks[1:])
    set_drop_path(backbone, 0.0)
    assert all(isinstance(block.drop_path1, nn.Identity) for block in backbone.blocks)


# --- classifier and settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["mean", "cls"])
def test_what_the_classifier_reads(readout):
    """The mean of the patches behind a norm of its own, in the place of the final norm; or CLS behind the final norm. The subject
    stays as it was."""
    subject = subject_of(VIT)
    with torch.no_grad():
        subject.encoder.norm.weight.mul_(3)
    classifier = Classifier(subject, 4, dataclasses.replace(QUICK, readout=readout)).eval()
    nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = subject.encoder.encode_all(images)
        raw = images.new_tensor(0)

        def keep(module, inputs):
            nonlocal raw
            raw = inputs[0]

        handle = subject.encoder.norm.register_forward_pre_hook(keep)
        subject.encoder.encode_all(images)
        handle.remove()
        pooled = tokens[:, 0] if readout == "cls" else nn.functional.layer_norm(raw[:, 1:].mean(1), (16,), eps=1e-6)
        torch.testing.assert_close(classifier(images), classifier.head(pooled))
    assert isinstance(subject.encoder.norm, nn.LayerNorm) and not subject.encoder.pos_embed.requires_grad


def test_a_swin_keeps_its_norm():
    subject = subject_of(SWIN)
    classifier, images = Classifier(subject, 4, QUICK).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = classifier.head(subject.encoder.encode_all(images).mean(1))
        torch.testing.assert_close(classifier(images), expected)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_network_of_timm(pool):
    """Wherever timm has the final norm, it goes for the mean of the patches; a frozen network learns again, all of it."""
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, global_pool=pool)
    encoder = TimmEncoder(model.requires_grad_(False), 16).eval()
    subject = Subject("timm", "", "", encoder, 16, (0.5,) * 3, (0.5,) * 3)
    classifier, images = Classifier(subject, 3, QUICK).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        expected = classifier.head(classifier.fc_norm(model.blocks(x)[:, 1:].mean(1)))
        torch.testing.assert_close(classifier(images), expected)
    assert sum(len(group["params"]) for group in classifier.groups(QUICK)) == len(list(classifier.parameters()))


def test_recipes_of_the_papers():
    """Every preset of a paper finds its own recipe; every recipe is of a preset. The longest name counts."""
    presets = [name for name in PRESETS if not name.endswith("-demo")]
    found = {name: recipe_of(name) for name in presets}
    assert {name for name, recipe in found.items() if recipe is None} == {"mae-s16"}
    assert {recipe for recipe in found.values() if recipe} == RECIPES.keys()
    assert (
        found["mr-mae-b16-dino"] == "mr-mae-b"
        and found["mimco-swin-b"] == "mimco-swin-b"
        and found["maskalign-l16"] == "maskalign-l"
    )
    at_1024 = {name: round(recipe.settings.base_rate * 4, 6) for name, recipe in RECIPES.items()}
    assert (at_1024["maskalign-b"], at_1024["milan-b"], at_1024["cae-v2-b"], at_1024["mimco-b"]) == (1.2e-3, 4e-4, 2e-4, 4e-3)


def test_settings_as_text():
    settings = FineTune().with_overrides({"epochs": "5", "warmup_epochs": "0.5", "mixup": "0", "readout": "cls"})
    assert (settings.epochs, settings.warmup_epochs, settings.mixup, settings.readout) == (5, 0.5, 0.0, "cls")
    odd = [
        ({"rate": "1"}, "no such setting"),
        ({"epochs": "x"}, "give a value as 100"),
        ({"epochs": "5"}, "do not fit"),
        ({"layer_decay": "2"}, "at most 1"),
        ({"drop_path": "1"}, "in 0..1"),
        ({"readout": "max"}, "mean or cls"),
        ({"epochs": "0"}, "above 0"),
        ({"mixup": "-1"}, "0 or above"),
        ({"base_rate": "nan"}, "above 0"),
        ({"weight_decay": "inf"}, "0 or above"),
    ]
    for changes, message in odd:
        with pytest.raises(ConfigError, match=message):
            FineTune().with_overrides(changes)


def test_rates_of_the_schedule():
    """MAE's: from 0 over the warm-up, then half a cosine to the lowest rate; scaled by the batch."""
    settings = FineTune(base_rate=1e-3, epochs=25, warmup_epochs=5, min_rate=1e-6)
    rates = [settings.rate_at(epoch, 512) for epoch in (0, 2.5, 5, 15, 25)]
    assert rates == pytest.approx([0, 1e-3, 2e-3, (2e-3 + 1e-6) / 2, 1e-6])


# --- the loop ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(image_folder):
    return LabelledImages(image_folder, 16, mean=(0.5,) * 3, std=(0.5,) * 3)


def tuning(images, folder, settings=QUICK, say=lambda line: None, **more) -> FineTuning:
    folder.mkdir(exist_ok=True)
    subject = subject_of(VIT)
    identity = {"settings": dataclasses.asdict(settings), "weights": subject.weights, "seed": more.get("seed", 0)}
    return FineTuning(
        Classifier(subject, 3, settings, more.get("seed", 0)), images, images, settings, 3, folder, identity, say=say, **more
    )


def test_it_learns(tmp_path):
    """Three colours are told apart after a few epochs, with all of the augmentation that leaves colours alone."""
    for label, colour in enumerate([(220, 30, 30), (30, 220, 30), (30, 30, 220)]):
        (tmp_path / "c" / str(label)).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (20, 20), colour).save(tmp_path / "c" / str(label) / f"{number}.png")
    colours = LabelledImages(tmp_path / "c", 16, mean=(0.5,) * 3, std=(0.5,) * 3)
    settings = dataclasses.replace(QUICK, epochs=8, magnitude=0, base_rate=0.1, layer_decay=1.0)
    epochs = tuning(colours, tmp_path / "a", settings).run()
    assert epochs[-1]["top1"] == 1.0 and epochs[-1]["top5"] == 1.0 and epochs[-1]["loss"] < epochs[0]["loss"]


def test_resumed_equals_undisturbed(images, tmp_path):
    """Stopped behind its first epoch, and anywhere in the second, it ends with the very weights and losses of one that was not
    stopped, with all of the augmentation; Python's and numpy's generators are as before."""
    state = random.getstate(), np.random.get_state()[1].tolist()
    whole, parts = tuning(images, tmp_path / "whole"), tuning(images, tmp_path / "parts")
    epochs = whole.run()

    class Stop(Exception):
        pass

    def stop(line):
        if line.startswith("epoch 1"):
            raise Stop

    parts.say = stop
    with pytest.raises(Stop):
        parts.run()
    said = []
    again = tuning(images, tmp_path / "parts", say=said.append)
    assert again.run() == epochs and said[0] == "resumed behind epoch 1 of 3" and len(said) == 3
    for (name, value), other in zip(whole.classifier.state_dict().items(), again.classifier.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert tuning(images, tmp_path / "parts").run() == epochs  # nothing is left to do
    assert state == (random.getstate(), np.random.get_state()[1].tolist())


def test_micro_batches_without_mixing(images, tmp_path):
    """Without what depends on the batch, two micro-batches give the step of one."""
    settings = dataclasses.replace(QUICK, epochs=1, warmup_epochs=0, mixup=0, cutmix=0, drop_path=0, base_rate=1e-3)
    one, two = tuning(images, tmp_path / "one", settings), tuning(images, tmp_path / "two", settings, accumulate=2)
    assert one.run()[0]["loss"] == pytest.approx(two.run()[0]["loss"], rel=1e-4)


def test_what_cannot_go_on(images, tmp_path):
    """Other settings, a damaged file and a batch that cannot be cut are refused in words."""
    settings = dataclasses.replace(QUICK, epochs=2)
    tuning(images, tmp_path / "a", settings).run()
    with pytest.raises(RunMismatchError, match="another fine-tuning: settings.epochs is 2 there, 3 now"):
        tuning(images, tmp_path / "a").run()
    path = tmp_path / "a" / NAME
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="damaged .its checksum does not match"):
        tuning(images, tmp_path / "a", settings).run()
    with pytest.raises(ConfigError, match="cannot be cut into 3 parts"):
        tuning(images, tmp_path / "b", accumulate=3)
    broken = tuning(images, tmp_path / "c", dataclasses.replace(settings, mixup=0, cutmix=0))
    with torch.no_grad():
        broken.classifier.head.bias[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="step 1 of epoch 1 is nan"):
        broken.run()
    assert not (tmp_path / "c" / NAME).exists()


def test_draws_are_functions_of_their_position():
    """Within, all three generators give the same numbers again; outside they go on as if nothing had been."""

    def three():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    with seeded("x", 1, 2):
        first = three()
    with seeded("x", 1, 2):
        assert three() == first
    with seeded("x", 1, 3):
        assert three() != first
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_the_greatest_magnitude():
    """RandAugment's posterising to 0 bits gives black, which Pillow refuses by itself; to more bits it is Pillow's."""
    image = Image.new("RGB", (2, 2), (201, 100, 7))
    assert posterized(image, 0).getpixel((0, 0)) == (0, 0, 0) and posterized(image, 8) is image
    assert posterized(image, 2).getpixel((0, 0)) == (192, 64, 0)
    (augment,) = [part for part in transform_of(FineTune(), 16, (0.5,) * 3, (0.5,) * 3).transforms if hasattr(part, "ops")]
    (op,) = [op for op in augment.ops if op.aug_fn is posterized]
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert op(image).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(tmp_path, workers):
    """It is named in one sentence, also where a worker process meets it."""
    for label in "ab":
        (tmp_path / "c" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 20)).save(tmp_path / "c" / label / f"{number}.png")
    (tmp_path / "c" / "b" / "2.png").write_bytes(b"no image")
    images = LabelledImages(tmp_path / "c", 16)
    with pytest.raises(BadInputError, match=r"^b/2.png: none of the formats [^\n]*$"):
        tuning(images, tmp_path / "a", workers=workers).run()
