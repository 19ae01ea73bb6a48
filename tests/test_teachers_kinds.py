"""Each kind of timm's blocks equals timm's own forward, at its native size and another: tokens, attention, head."""

from dataclasses import replace

import pytest
import timm
import torch
from teacher_fakes import crops_u8
from torch import nn

from scripts.teachers import FAMILIES, differences
from scripts.teachers import narrow as narrow_models
from teacher_cache import CropPlan, make_cache
from teacher_cache.teachers import load_teacher, timm_vit
from teacher_cache.teachers.blocks.positions import DINOV2, OURS, PE

NO_HEAD = {"C-RADIO v3", "C-RADIO v4", "PE spatial", "AIMv2"}
POOLED = {"SigLIP 2", "PE core, no CLS"}
NO_ATTENTION = {"SigLIP 2, mean pooling", "AIMv2"}


@pytest.fixture
def narrow():
    """timm builds what it is asked for with two narrow blocks, everything else as it is."""
    with narrow_models():
        yield


@pytest.mark.parametrize("native", [True, False], ids=["native size", "another"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_timms_own_forward(family, native):
    """Tokens of both blocks, the attention that timm's own softmax forms and final norm are timm's to 1e-5; twice the same."""
    found = differences(FAMILIES[family], crops_u8, native)
    assert found.pop("again") == 0 and max(found.values()) <= 1e-5
    assert ("norm" in found, "attention" in found) == (family not in NO_HEAD, family not in NO_ATTENTION)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_described_as_it_is(family, narrow):
    """Source of the attention, head and registers are on record, and the attention depends on patch and image."""
    teacher = load_teacher(f"timm:{FAMILIES[family]}", "random:0", 5 * patch_size(FAMILIES[family]))
    spec, attention = teacher.spec, teacher(crops_u8(2, teacher.spec.image_size), [2]).attention
    source = None if family in NO_ATTENTION else "pool" if family in POOLED else "cls"
    assert (spec.attention_source, spec.head == "none") == (source, family in NO_HEAD)
    assert spec.n_registers == teacher._anatomy.model.num_prefix_tokens - spec.has_cls
    if source:
        assert attention.shape == (2, 25) and attention.std(1).min() > 1e-4 and (attention[0] - attention[1]).abs().max() > 1e-5


def patch_size(name: str) -> int:
    with torch.device("meta"):
        return timm.create_model(name).patch_embed.patch_size[0]


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
    assert said["PE core"] == f"{PE.words}; RoPE Cat on patches alone, xy, temperature 10000, offset 1"
    assert said["EVA02-CLIP"] == f"{OURS.words}; RoPE Cat on patches alone, ij, temperature 10000, as in a grid of 16 x 16"


def test_a_teacher_in_train_mode_gives_nothing(narrow):
    """RoPE is augmented in train mode: a teacher that something has switched to it stops, and says so."""
    teacher = load_teacher("timm:vit_small_patch16_dinov3", "random:0", 80)
    teacher._anatomy.model.rope.train()
    with pytest.raises(AssertionError, match="train mode"):
        teacher(crops_u8(1, 80), [1])
