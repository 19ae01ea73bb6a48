"""timm's plain ViTs as teachers equal timm's own forward; everything else of timm is refused."""

from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from teacher_fakes import crops_u8
from timm.layers import SwiGLU
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from teacher_cache.errors import BadInputError, UnknownNameError, UsageError
from teacher_cache.teachers import load_teacher
from teacher_cache.teachers.base import whiten
from teacher_cache.teachers.timm_vit import as_teacher, at_image_size
from teacher_cache.teachers.weights.load import LoadedWeights, random_weights

BASE = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=0)
VARIANTS = {
    "plain": {},
    "registers": dict(reg_tokens=4, no_embed_class=True),
    "registers with positions": dict(reg_tokens=2),
    "qk norm": dict(qk_norm=True),
    "no qkv bias": dict(qkv_bias=False),
    "layer scale, pre norm": dict(init_values=0.1, pre_norm=True),
    "pooled, final norm moved": dict(class_token=False, global_pool="avg"),
    "pooled, registers": dict(class_token=False, global_pool="avg", fc_norm=False, reg_tokens=1),
    "attention pooled": dict(class_token=False, global_pool="map"),
    "no positions": dict(pos_embed="none"),
}


def model_and_teacher(**variant):
    model = VisionTransformer(**BASE | variant)
    random_weights(model, 0)
    channels = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return model, as_teacher("timm:test", model, LoadedWeights("random:0", "0" * 64), *channels, "cpu", "fp32")


def timm_attention(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """The last block's softmax [B, H, T, T] as timm itself computes it when its attention is not fused."""
    seen = []
    attention = model.blocks[-1].attn
    was_fused, attention.fused_attn = attention.fused_attn, False
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images)
    handle.remove()
    attention.fused_attn = was_fused
    return seen[0]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_taps_attention_and_head_equal_timms_own(variant):
    """Whitened taps, the CLS map and the final norm rebuilt from the head equal timm's forward to 2e-5 (map: 1e-6)."""
    model, teacher = model_and_teacher(**variant)
    images = crops_u8(3, 32)
    output = teacher(images, [1, 3, 4])
    normalised = teacher.preprocess(images)

    n_cls, n_prefix = int(model.has_class_token), model.num_prefix_tokens
    taps = model.forward_intermediates(
        normalised, indices=[0, 2, 3], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    for position, tap in enumerate(taps):
        patches, prefix = tap if n_prefix else (tap, tap[:, :0])
        expected = whiten(torch.cat([prefix[:, :n_cls], patches], 1), 1e-6)
        assert torch.allclose(output.tokens[:, position], expected, atol=2e-5)
    assert not torch.allclose(output.tokens[:, 0], output.tokens[:, 2], atol=0.1)

    if n_cls:
        expected = timm_attention(model, normalised).mean(1)[:, 0, n_prefix:]
        assert torch.allclose(output.attention, expected, atol=1e-6)
        assert output.attention.std(1).min() > 1e-3  # a flat map would fit nearly anything
    else:
        assert (output.attention is None) == (model.attn_pool is None)

    gamma, beta = (torch.from_numpy(teacher.head[name]) for name in ("gamma", "beta"))
    rebuilt = output.tokens[:, -1] * gamma + beta
    features = model.forward_features(normalised)
    features = torch.cat([features[:, :n_cls], features[:, n_prefix:]], 1)
    features = model.fc_norm(features)  # the identity where timm has its final norm in place
    assert torch.allclose(rebuilt, features, atol=2e-5)
    assert (gamma - 1).abs().max() > 0.1 and beta.abs().max() > 0.05

    spec = teacher.spec
    assert (spec.has_cls, spec.n_registers) == (bool(n_cls), n_prefix - n_cls)
    assert (spec.grid, spec.dim, spec.depth, spec.heads, spec.norm_eps) == ((4, 4), 48, 4, 3, 1e-6)


@torch.no_grad()
def test_fused_attention_does_not_hide_the_map():
    """The CLS map is the same whether timm's blocks run fused or not, and they do run fused by default."""
    model, teacher = model_and_teacher()
    assert model.blocks[-1].attn.fused_attn
    fused = teacher(crops_u8(2, 32), [4]).attention
    for block in model.blocks:
        block.attn.fused_attn = False
    assert torch.allclose(fused, teacher(crops_u8(2, 32), [4]).attention, atol=1e-6)


def test_no_hooks_stay_behind():
    """After a call, also one that failed, the model has the hooks it had before."""
    model, teacher = model_and_teacher()
    teacher(crops_u8(1, 32), [1, 4])
    model.blocks[2].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        teacher(crops_u8(1, 32), [1, 4])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("variant", [{}, VARIANTS["registers"], VARIANTS["no positions"]], ids=str)
@torch.no_grad()
def test_another_image_size_changes_the_position_table_only(variant):
    """At 48 pixels a 32-pixel ViT has a 6 x 6 grid, its weights, and the table bicubically resized."""
    model, _ = model_and_teacher(**variant)
    native = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    at_image_size(model, "test", 48)
    teacher = as_teacher("test", model, LoadedWeights("", ""), (0.5,) * 3, (0.5,) * 3, "cpu", "fp32")
    assert (teacher.spec.image_size, teacher.spec.grid) == (48, (6, 6))
    assert teacher(crops_u8(2, 32), [4]).tokens.shape == (2, 1, 37, 48)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, native[name])}
    assert changed == ({"pos_embed"} if "pos_embed" in native else set())


def test_a_timm_name_with_a_weights_file_equals_timm_filled_from_it(tmp_path):
    """`timm:test_vit` from its state dict computes what timm computes; only the classifier is left out, by name."""
    model = timm.create_model("test_vit").eval()
    random_weights(model, 3)
    plain, wrapped = tmp_path / "vit.safetensors", tmp_path / "checkpoint.pth"
    save_file(model.state_dict(), plain)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, wrapped)
    images = crops_u8(2, 160)
    outputs = []
    for path in (plain, wrapped):
        teacher = load_teacher("timm:test_vit", path)
        assert teacher.ignored_weights == ("head.bias", "head.weight")
        assert teacher.spec.name == "timm:test_vit" and teacher.spec.weights == path.name
        assert teacher.spec.mean == tuple(model.pretrained_cfg["mean"])
        outputs.append(teacher(images, [6]).tokens)
    with torch.no_grad():
        normalised = teacher.preprocess(images)
        last = model.forward_intermediates(normalised, indices=1, output_fmt="NLC", intermediates_only=True)[0]
        expected = whiten(last, 1e-6)
    assert torch.allclose(outputs[0][:, 0, 1:], expected, atol=2e-5)
    assert torch.equal(outputs[0], outputs[1])


def test_a_weights_file_for_another_size_lists_what_differs(tmp_path):
    """A file of another ViT is refused with the names that are missing, unexpected, and of another shape."""
    state = {**timm.create_model("test_vit", img_size=96).state_dict(), "surprise": torch.zeros(1)}
    del state["norm.bias"], state["cls_token"]
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(BadInputError) as caught:
        load_teacher("timm:test_vit", tmp_path / "vit.safetensors")
    for part in (
        "2 missing (cls_token, norm.bias)",
        "1 unexpected (surprise)",
        "(1, 37, 64) instead of (1, 101, 64)",
        "Its position table has 37 rows and this model's 101: the file is of another input size",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer.*vit_small_patch16_224"),
        ("vit_base_patch16_rpn_224", "ResPostBlock.*vit_small_patch16_224"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention.*vit_small_patch16_224"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled.*timm:deit_tiny_patch16_224."),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed.*vit_small_patch16_224"),
        ("eva02_enormous_patch14_clip_224", "EvaBlockPostNorm.*vit_small_patch16_224"),
        ("naflexvit_base_patch16_siglip", "NaFlexVit.*timm:vit_base_patch16_siglip_224 or timm:vit_base_patch16_siglip_256."),
        ("naflexvit_huge_patch16_radio_v4", "NaFlexVit.*timm:vit_huge_patch16_radio_v4."),
        ("vit_base_patch16_sapiens2", "grid of 64 x 48.*timm:vit_base_patch16_dinov3."),
        ("resnet10t", "ResNet.*vit_small_patch16_224"),
    ],
)
def test_what_is_no_plain_vit_is_refused_by_what_it_is(name, says):
    """Swin, post-norm, distilled, hybrid and differential models, NaFlex and oblong grids are refused as what they are."""
    with pytest.raises(UsageError, match=f"timm:{name} cannot be a teacher: .*{says}"):
        load_teacher(f"timm:{name}", "random:0")


def test_an_unknown_timm_name_is_answered_with_likely_ones():
    """A typing error or an unknown tag in a timm name is an UnknownNameError with a way on."""
    with pytest.raises(UnknownNameError, match="timm:vit_tiny_patch16_224"):
        load_teacher("timm:vit_tny_patch16_224")
    with pytest.raises(UnknownNameError, match="nonsense"):
        load_teacher("timm:vit_tiny_patch16_224.nonsense")


def test_without_weights_timm_downloads_and_says_so_when_it_cannot(monkeypatch):
    """No --weights means timm's own; without a network the error says to pass a file or random:0."""
    create_model = timm.create_model

    def without_network(name, pretrained, **kwargs):
        if pretrained:
            raise ConnectionError("no route to host\nand a long trace")
        return create_model(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.raises(BadInputError, match=r"\(no route to host\).*--weights PATH.*random:0"):
        load_teacher("timm:test_vit")


def test_downloaded_weights_are_named_and_hashed(monkeypatch):
    """Where timm does deliver, the spec names the source and the hash is that of the tensors as random:SEED's is."""
    create_model = timm.create_model

    def delivering(name, pretrained, **kwargs):
        model = create_model(name, pretrained=False, **kwargs)
        random_weights(model, 7)
        return model

    monkeypatch.setattr(timm, "create_model", delivering)
    downloaded, random = load_teacher("timm:test_vit"), load_teacher("timm:test_vit", "random:7")
    assert downloaded.spec.weights.startswith("timm pretrained: ")
    assert downloaded.spec.weights_sha256 == random.spec.weights_sha256
    images = crops_u8(1, 160)
    assert torch.equal(downloaded(images, [6]).tokens, random(images, [6]).tokens)


def test_a_teacher_is_no_module():
    """A student that holds a teacher neither registers its parameters nor switches it to train mode."""
    _, teacher = model_and_teacher()
    student = nn.Module()
    student.teacher = teacher
    assert not list(student.parameters()) and not student.state_dict()
    student.train()
    assert not teacher._anatomy.model.training


NOTED = [
    name for name in timm.list_pretrained("vit_*") if (get_pretrained_cfg(name).notes or ("",))[0].startswith("natively Quick")
]


@pytest.fixture
def small_models(monkeypatch):
    """timm builds what it is asked for with one narrow block, its activation and its entry as they are."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, embed_dim=64, num_heads=1, **options))


@pytest.mark.parametrize("name", [*NOTED, "vit_huge_patch14_clip_378", "vit_base_patch16_clip_224.dfn2b"])
def test_weights_made_for_quickgelu_need_a_model_that_has_it(name, small_models):
    """Where timm's or open_clip's entry says QuickGELU, the plain model is refused and one that has it is named."""
    if "quickgelu" in name:
        assert load_teacher(f"timm:{name}", "random:0").spec.activation == "quick_gelu"
        return
    with pytest.raises(UsageError, match="were trained with QuickGELU, and this model of timm's has gelu. Ask for ") as caught:
        load_teacher(f"timm:{name}", "random:0")
    right = str(caught.value).rpartition("Ask for ")[2].removesuffix(".")
    if right.startswith("timm:"):
        assert get_pretrained_cfg(right.removeprefix("timm:")) is not None
        assert load_teacher(right, "random:0").spec.activation == "quick_gelu"
    else:
        arch, _, tag = right.removeprefix("open_clip:").partition("/")
        assert open_clip.get_pretrained_cfg(arch, tag)["quick_gelu"] and open_clip.get_model_config(arch)["quick_gelu"]


def test_a_store_that_was_begun_so_can_be_gone_on_with(small_models):
    """For a store of before such names were refused, the model is run with the activation that it was begun with."""
    begun = replace(load_teacher("timm:vit_base_patch16_clip_224.laion2b", "random:0").spec, activation=None, positions=None)
    assert load_teacher("timm:vit_base_patch16_clip_224.openai", "random:0", begun=begun).spec.activation == "gelu"


def test_other_weights_of_a_noted_architecture_load(small_models):
    """LAION's weights for the same architecture are GELU's, and remain a teacher; the notes were found at all."""
    assert load_teacher("timm:vit_base_patch16_clip_224.laion2b", "random:0").spec.activation == "gelu"
    assert len(NOTED) > 20


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "gelu"),
        ({"act_layer": "gelu_tanh"}, "gelu_tanh"),
        ({"act_layer": "quick_gelu"}, "quick_gelu"),
        ({"act_layer": "hard_swish"}, "hardswish"),
        ({"mlp_layer": SwiGLU, "act_layer": "silu"}, "gated_silu"),
    ],
    ids=str,
)
def test_the_activation_on_record_is_that_of_the_model(options, expected):
    """What was built is looked at, whatever it was named; blocks that differ are both on record."""
    model, teacher = model_and_teacher(**options)
    assert teacher.spec.activation == expected
    if not options:
        model.blocks[1].mlp.act = torch.nn.ReLU()
        channels = (0.5,) * 3, (0.5,) * 3
        other = as_teacher("timm:test", model, LoadedWeights("random:0", "0" * 64), *channels, "cpu", "fp32")
        assert other.spec.activation == "gelu and relu"
