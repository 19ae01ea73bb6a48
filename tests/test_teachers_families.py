"""The table of teachers holds what the libraries say of them, and can be searched."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
from click.testing import CliRunner
from timm.models import get_pretrained_cfg

from teacher_cache.cli.main import main
from teacher_cache.format.spec import TeacherSpec
from teacher_cache.teachers import OPEN_CLIP_PREFIX, TEACHERS, TIMM_PREFIX
from teacher_cache.teachers.blocks import timm_kinds
from teacher_cache.teachers.families import ON_REQUEST, in_the_table, known_teachers

OF_TIMM = {known.name.removeprefix(TIMM_PREFIX): known for known in ON_REQUEST if known.name.startswith(TIMM_PREFIX)}
OF_OPEN_CLIP = {known.name.removeprefix(OPEN_CLIP_PREFIX): known for known in ON_REQUEST if OPEN_CLIP_PREFIX in known.name}
LICENCES = {
    "DINOv3 License": "dinov3-license", "FAIR Noncommercial Research License": "fair-noncommercial-research-license",
    "Apache-2.0": "apache-2.0", "NVIDIA Open Model License": "nvidia-open-model-license", "MIT": "mit",
    "Apple ASCL": "apple-ascl",
}  # fmt: skip
"""A licence -> what timm calls it."""
SMALLEST = ("vit_small_patch16_dinov3_qkvb.lvd1689m", "vit_base_patch16_siglip_224.v2_webli", "vit_base_patch16_radio_v3.c_radio",
            "vit_pe_core_tiny_patch16_384.fb")  # fmt: skip


def teachers(*arguments, code=0) -> str:
    result = CliRunner().invoke(main, ["teachers", *arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("name", OF_TIMM)
def test_lines_are_those_of_timms_configuration(name):
    """The name is one of timm's with weights; input size, mean, deviation and licence are its own."""
    known, config = OF_TIMM[name], get_pretrained_cfg(name, allow_unregistered=False)
    assert timm.is_model(name) and config.has_weights
    assert (known.image_size, known.image_size) == config.input_size[1:]
    assert (known.mean, known.std, LICENCES[known.licence]) == (config.mean, config.std, config.license)


def require_as_built(name: str) -> None:
    """The table says of a model what timm's own classes say of it, built without numbers."""
    known = OF_TIMM[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    has_cls = model.cls_token is not None
    assert timm_kinds.why_not(model) is None
    assert (known.patch_size, known.patch_size) == tuple(model.patch_embed.patch_size)
    assert (known.dim, known.depth, known.heads) == (model.embed_dim, len(model.blocks), model.blocks[-1].attn.num_heads)
    assert (known.has_cls, known.n_registers) == (has_cls, model.num_prefix_tokens - has_cls)
    assert known.attention_source == timm_kinds.attention_source(model)
    assert (known.head == "layernorm") == (timm_kinds.final_norm(model) is not None)
    assert known.norm_eps == timm_kinds.norm_eps(model)


@pytest.mark.parametrize("name", SMALLEST)
def test_lines_are_those_of_timms_models(name):
    """A small model of each kind of block."""
    require_as_built(name)


@pytest.mark.large
@pytest.mark.parametrize("name", sorted(OF_TIMM.keys() - set(SMALLEST)))
def test_lines_are_those_of_all_of_timms_models(name):
    """All the others."""
    require_as_built(name)


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_lines_are_those_of_open_clips_configuration(name):
    """Architecture and tag are open_clip's, with the activation that the tag's weights were trained with; sizes are its own."""
    known, (arch, tag) = OF_OPEN_CLIP[name], name.split("/")
    config, published = open_clip.get_model_config(arch), open_clip.get_pretrained_cfg(arch, tag)
    vision = config["vision_cfg"]
    assert (known.image_size, known.patch_size, known.dim, known.depth) == tuple(
        vision[key] for key in ("image_size", "patch_size", "width", "layers")
    )
    assert known.heads == known.dim // vision.get("head_width", 64) and known.projection_dim == config["embed_dim"]
    assert (known.mean, known.std) == (published["mean"], published["std"])
    assert bool(config.get("quick_gelu")) == bool(published.get("quick_gelu"))


@pytest.mark.parametrize("name", TEACHERS)
def test_lines_of_our_own_names(name):
    """A line of the project's own teachers has all that its entry says of it, and what follows from that."""
    entry, spec = TEACHERS[name], in_the_table(name).spec()
    for field in set(TeacherSpec.__dataclass_fields__) & {*vars(entry), "grid"}:
        assert getattr(spec, field) == getattr(entry, field), field
    assert (spec.attention_source, spec.head, spec.n_registers) == ("cls" if entry.has_cls else None, "layernorm", 0)


def test_bytes_and_grids():
    """What a crop takes follows from tokens, scales and attention; sizes that patches do not fill have no grid."""
    by_name = {line["name"]: line for line in json.loads(teachers("--json"))}
    assert by_name.keys() == known_teachers().keys()
    for name, n_tokens, n_patches, size in [
        ("clip-b16", 197, 196, "224"), ("timm:vit_base_patch14_dinov2.lvd142m", 1370, 1369, "518"),
        ("timm:vit_base_patch16_siglip_256.v2_webli", 256, 256, "256"),
    ]:  # fmt: skip
        assert by_name[name]["bytes_a_crop"][size] == 5 * n_tokens * (768 + 2 * 768 // 128) + 4 * n_patches
    patch_14 = by_name["timm:vit_base_patch14_dinov2.lvd142m"]
    assert patch_14["grids"] == {"224": [16, 16], "256": None} and patch_14["bytes_a_crop"]["256"] is None
    assert by_name["moby-swin-t"]["grids"] == {"224": [7, 7], "256": None}
    no_attention = by_name["timm:aimv2_large_patch14_224.apple_pt"]
    assert no_attention["bytes_a_crop"]["224"] == 5 * 256 * (1024 + 2 * 1024 // 128)


def test_search():
    """--search looks in names, families and licences, whatever the case; a word that is nowhere is told with the families."""
    said = teachers("--search", "dinov3")
    assert "DINOv3: DINOv3 License, gated" in said and "gated: DINOv3, Meta's own files" in said and "clip-b16" not in said
    assert "EUPE: FAIR Noncommercial Research License, non-commercial" in said  # timm calls them so
    families = {line["family"] for line in json.loads(teachers("--search", "DINO", "--json"))}
    assert families == {"DINO", "DINOv3", "EUPE", "DINOv2", "DINOv2 with registers"}
    free = json.loads(teachers("--search", "non-commercial", "--json"))
    assert {line["family"] for line in free} == {"MoCo v3", "MAE", "EUPE", "MetaCLIP 1", "MetaCLIP 2"}
    said = teachers("--search", "slip")
    assert "slip_base_25ep.pt" in said and "timm:NAME" not in said
    said = teachers("--search", "resnet", code=2)
    assert "--search resnet: no teacher of the table" in said and "C-RADIO v4, PE core" in said


def test_the_table_reads_at_a_glance():
    """Grids at both sizes, registers, attention and what a crop takes stand in one line; the sizes that pair are said."""
    lines = teachers().splitlines()
    siglip = next(line for line in lines if "siglip_224" in line)
    assert " ".join(siglip.split()).endswith("v2_webli B 16 224 14 x 14 16 x 16 - - 768 pooling 765 kB 765 kB")
    assert "C-RADIO v3: NVIDIA Open Model License; no final norm" in lines
    assert any("--image-size 196" in line for line in lines) and max(map(len, lines[: len(known_teachers())])) < 165
