"""Each kind of timm's blocks equals timm's own forward, at its native size and another: tokens, attention, head."""

from dataclasses import replace

import pytest
import timm
import torch
from teacher_fakes import crops_u8
from torch import nn

from teacher_cache import CropPlan, make_cache
from teacher_cache.teachers import load_teacher, timm_vit
from teacher_cache.teachers.base import whiten
from teacher_cache.teachers.blocks.positions import BILINEAR, DINOV2, OURS

FAMILIES = {
    "DINOv3": "vit_small_patch16_dinov3",
    "DINOv3, q and v biases": "vit_small_patch16_dinov3_qkvb",
    "DINOv3, SwiGLU": "vit_small_plus_patch16_dinov3_qkvb",
    "EUPE": "vit_tiny_patch16_dinov3_qkvb",
    "LingBot": "vit_base_patch16_lingbot",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2",
    "TIPSv2": "vit_base_patch14_reg1_tipsv2",
    "SigLIP 2": "vit_base_patch16_siglip_224",
    "SigLIP 2, mean": "vit_base_patch16_siglip_gap_224",
    "MetaCLIP": "vit_base_patch16_clip_quickgelu_224.metaclip_2pt5b",
    "MetaCLIP 2": "vit_huge_patch14_clip_quickgelu_224.metaclip2_worldwide",
    "C-RADIO": "vit_base_patch16_radio_v3",
    "PE core": "vit_pe_core_base_patch16_224",
    "PE spatial": "vit_pe_spatial_base_patch16_512",
    "EVA-02": "eva02_tiny_patch14_224",
    "EVA-02, q, k, v apart": "eva02_base_patch14_224",
    "EVA02-CLIP": "eva02_base_patch16_clip_224",
    "EVA": "eva_giant_patch14_224",
    "AIMv2": "aimv2_large_patch14_224",
    "RoPE mixed": "vit_small_patch16_rope_mixed_ape_224",
}
"""Family -> timm's name of one of its models."""
NO_HEAD = {"C-RADIO", "PE spatial", "AIMv2"}
POOLED = {"SigLIP 2"}
NO_ATTENTION = {"SigLIP 2, mean", "AIMv2"}
NARROW = dict(depth=2, embed_dim=64, num_heads=2)
N_PATCHES = 5
"""A side, at the other size."""


@pytest.fixture
def narrow(monkeypatch):
    """timm builds what it is asked for with two narrow blocks, everything else as it is."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **NARROW, **options))


@pytest.fixture
def softmaxes(monkeypatch):
    """What every call of Tensor.softmax gives, in order."""
    seen, softmax = [], torch.Tensor.softmax

    def noted(tensor, *args, **named):
        seen.append(softmax(tensor, *args, **named))
        return seen[-1]

    monkeypatch.setattr(torch.Tensor, "softmax", noted)
    return seen


def unfused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def close(found, wanted):
    return (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("size", ["native", "another"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_family_equals_timms_own_forward(family, size, narrow, softmaxes):
    """Tokens of both blocks, the attention that timm's own softmax forms and the final norm are timm's to 1e-5."""
    name = FAMILIES[family]
    patch = timm.create_model(name, num_classes=0).patch_embed.patch_size[0]
    teacher = load_teacher(f"timm:{name}", "random:0", None if size == "native" else N_PATCHES * patch)
    model, spec = teacher._anatomy.model, teacher.spec
    images = crops_u8(2, spec.image_size)
    output = teacher(images, [1, 2])
    again = teacher(images, [1, 2])
    assert torch.equal(output.tokens, again.tokens)

    reference = unfused(timm.create_model(name, num_classes=0, img_size=spec.image_size).eval())
    reference.load_state_dict(model.state_dict())
    normalised = teacher.preprocess(images)
    taps = reference.forward_intermediates(normalised, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    n_cls, n_prefix = int(spec.has_cls), model.num_prefix_tokens
    for position, tap in enumerate(taps):
        patches, prefix = tap if n_prefix else (tap, tap[:, :0])
        expected = whiten(torch.cat([prefix[:, :n_cls], patches], 1), spec.norm_eps)
        assert close(output.tokens[:, position], expected)
    assert spec.n_registers == n_prefix - n_cls

    softmaxes.clear()
    features = reference.forward_features(normalised)
    reference.forward_head(features)
    in_blocks, in_head = softmaxes[:2], softmaxes[2:]
    if family in NO_ATTENTION:
        assert output.attention is None
    else:
        row = in_head[0] if family in POOLED else in_blocks[-1][:, :, :1, n_prefix:]
        expected = row.mean(1)[:, 0]
        assert close(output.attention, expected)
        assert output.attention.shape == (2, spec.n_patches) and output.attention.std(1).min() > 1e-4

    assert (teacher.head == {}) == (family in NO_HEAD)
    if teacher.head:
        gamma, beta = (torch.from_numpy(teacher.head[name]) for name in ("gamma", "beta"))
        expected = reference.fc_norm(torch.cat([features[:, :n_cls], features[:, n_prefix:]], 1))
        assert close(output.tokens[:, -1] * gamma + beta, expected)


# --- position tables -------------------------------------------------------------------------------------------------------

TABLES = {
    "vit_small_patch14_dinov2": (1, {"mode": "bicubic", "scale_factor": (5.1 / 37, 5.1 / 37)}),
    "vit_small_patch14_reg4_dinov2": (0, {"mode": "bicubic", "size": (5, 5), "antialias": True}),
    "vit_base_patch14_reg1_tipsv2": (0, {"mode": "bilinear", "scale_factor": (5.1 / 32, 5.1 / 32)}),
    "vit_pe_core_base_patch16_224": (1, {"mode": "bilinear", "size": (5, 5)}),
    "vit_base_patch16_siglip_224": (0, {"mode": "bicubic", "size": (5, 5)}),
}
"""Name -> rows before the patches, and what the family's own code gives to torch for a grid of 5 x 5."""


@pytest.mark.parametrize("name", TABLES)
def test_a_table_follows_its_familys_own_rule(name, narrow):
    """At another size the table is what the family's own code makes of it, and the rule on record is the same at both sizes."""
    n_prefix, how = TABLES[name]
    native = load_teacher(f"timm:{name}", "random:0")
    small = load_teacher(f"timm:{name}", "random:0", 5 * native.spec.patch_size)
    table, resized = native._anatomy.model.pos_embed, small._anatomy.model.pos_embed
    image = table[:, n_prefix:].unflatten(1, native.spec.grid).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, **how).permute(0, 2, 3, 1).view(1, 25, 64)
    assert torch.equal(resized[:, n_prefix:], expected) and torch.equal(resized[:, :n_prefix], table[:, :n_prefix])
    assert small.spec.positions == native.spec.positions
    assert how["mode"] in small.spec.positions and ("no antialias" not in small.spec.positions) == ("antialias" in how)


@pytest.mark.parametrize("said", [OURS.words, None])
def test_a_store_of_dinov2_goes_on_under_the_rule_that_it_was_begun_with(said, narrow):
    """A store that says the former rule, or is of before rules were on record, keeps that rule and its tokens."""
    name = "timm:vit_small_patch14_dinov2"
    now = load_teacher(name, "random:0", 70)
    begun = replace(now.spec, positions=said)
    teacher = load_teacher(name, "random:0", 70, begun=begun)
    assert teacher.spec == replace(now.spec, positions=OURS.words)
    native = load_teacher(name, "random:0")._anatomy.model.pos_embed
    assert torch.equal(teacher._anatomy.model.pos_embed, OURS.resize(native, 1, (5, 5)))
    assert not torch.allclose(teacher(crops_u8(1, 70), [2]).tokens, now(crops_u8(1, 70), [2]).tokens, atol=1e-3)
    assert load_teacher(name, "random:0", 70, begun=now.spec).spec == now.spec


def test_a_cache_begun_under_the_former_rule_is_finished_under_it(narrow, tmp_path, image_folder, monkeypatch):
    """A second view of a cache whose first was made with the former rule has that rule on record too; a new cache has the new."""
    request = dict(
        images=image_folder, teacher="timm:vit_small_patch14_dinov2", weights="random:0", image_size=70, plan=CropPlan(size=70),
        device="cpu", layers="last",
    )  # fmt: skip
    with monkeypatch.context() as former:
        former.setattr(timm_vit, "position_rule", lambda model: OURS)
        make_cache(tmp_path / "old", **request)
    for name, rule in (("old", OURS), ("new", DINOV2)):
        cache = make_cache(tmp_path / name, views=2, **request)
        assert [view.store("timm_vit_small_patch14_dinov2").manifest.teacher.positions for view in cache.views()] == [
            rule.words
        ] * 2


def test_rotations_are_on_record(narrow):
    """What the blocks rotate by stands beside the rule for the table, if there is one."""
    said = {
        family: load_teacher(f"timm:{FAMILIES[family]}", "random:0").spec.positions
        for family in ("DINOv3", "PE core", "EVA02-CLIP")
    }
    assert said["DINOv3"] == "RoPE DinoV3 on patches alone, ij, temperature 100"
    assert (
        said["PE core"]
        == f"{BILINEAR.words}; RoPE Cat on patches alone, xy, temperature 10000, offset 1, as in a grid of 14 x 14"
    )
    assert said["EVA02-CLIP"] == f"{OURS.words}; RoPE Cat on patches alone, ij, temperature 10000, as in a grid of 16 x 16"


def test_a_teacher_in_train_mode_gives_nothing(narrow):
    """RoPE is augmented in train mode: a teacher that something has switched to it stops, and says so."""
    teacher = load_teacher("timm:vit_small_patch16_dinov3", "random:0", 80)
    teacher._anatomy.model.rope.train()
    with pytest.raises(AssertionError, match="train mode"):
        teacher(crops_u8(1, 80), [1])
