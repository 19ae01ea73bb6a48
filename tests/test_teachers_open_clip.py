"""`open_clip:ARCH/TAG` is open_clip's own tower with the activation of its configuration; what is not plain is refused."""

import json

import open_clip
import pytest
import timm
import torch
from open_clip import pretrained
from open_clip.timm_model import TimmModel
from safetensors.torch import save_file
from teacher_fakes import crops_u8
from torch import nn

from teacher_cache.errors import BadInputError, UnknownNameError, UsageError
from teacher_cache.teachers import load_teacher
from teacher_cache.teachers.base import whiten
from teacher_cache.teachers.open_clip_vit import _require_not_openais
from teacher_cache.teachers.weights.load import LoadedWeights, random_weights

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(autouse=True, scope="module")
def tiny_architectures(tmp_path_factory):
    """`test-tiny` (GELU) and `test-tiny-quickgelu`, known to open_clip for the time of these tests."""
    folder = tmp_path_factory.mktemp("configs")
    vision = {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
    text = {"context_length": 7, "vocab_size": 11, "width": 16, "heads": 2, "layers": 1}
    for name, quick in (("test-tiny", False), ("test-tiny-quickgelu", True)):
        config = {"embed_dim": 20, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        for registry in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
            values = getattr(open_clip.factory, registry)
            patch.setattr(open_clip.factory, registry, type(values)(values))
        open_clip.add_model_config(folder)
        plain, quick = {"mean": MEAN, "std": STD, "hf_hub": "org/tiny/"}, {"url": "https://host/tiny.pt", "quick_gelu": True}
        patch.setitem(pretrained._PRETRAINED, "test-tiny", {"plain": plain, "quick": quick})
        patch.setitem(pretrained._PRETRAINED, "test-tiny-quickgelu", {"quick": quick})
        yield


def whole_model(arch: str) -> nn.Module:
    """open_clip's CLIP, both towers, with random weights."""
    model = open_clip.create_model(arch, pretrained=None).eval()
    random_weights(model, 0)
    return model


@torch.no_grad()
def check_against_open_clip(teacher, model, side: int = 32) -> None:
    """Tokens of each block and the image embedding against open_clip's own."""
    images = crops_u8(2, side)
    tokens, normalised = teacher(images, [1, 2, 3]).tokens, teacher.preprocess(images)
    found = model.visual.forward_intermediates(normalised, output_fmt="NLC", output_extra_tokens=True)
    for position, (cls, patches) in enumerate(
        zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
    ):
        assert torch.allclose(tokens[:, position], whiten(torch.cat([cls, patches], 1), 1e-5), atol=1e-4)
    gamma, beta, projection = (torch.from_numpy(teacher.head[name]) for name in ("gamma", "beta", "projection"))
    embedding = (tokens[:, -1, 0] * gamma + beta) @ projection
    assert torch.allclose(embedding, model.encode_image(normalised), atol=1e-4)


@pytest.mark.parametrize("arch", ["test-tiny", "test-tiny-quickgelu"])
def test_the_tower_is_open_clips_with_its_own_activation(arch, tmp_path):
    """Tokens and embedding equal open_clip's for both activations, which differ from each other on equal weights."""
    model = whole_model(arch)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    teacher = load_teacher(f"open_clip:{arch}", tmp_path / "open_clip_model.safetensors")
    check_against_open_clip(teacher, model)
    spec = teacher.spec
    assert (spec.name, spec.weights) == (f"open_clip:{arch}", "open_clip_model.safetensors")
    assert (spec.grid, spec.dim, spec.depth, spec.heads, spec.projection_dim, spec.norm_eps) == ((4, 4), 48, 3, 4, 20, 1e-5)
    assert spec.has_cls and spec.mean == open_clip.OPENAI_DATASET_MEAN
    assert {"logit_scale", "token_embedding.weight"} <= set(teacher.ignored_weights)

    other = "test-tiny" if "quick" in arch else "test-tiny-quickgelu"
    images = crops_u8(1, 32)
    difference = load_teacher(f"open_clip:{other}", tmp_path / "open_clip_model.safetensors")(images, [3]).tokens
    assert (difference - teacher(images, [3]).tokens).abs().mean() > 1e-3


def test_a_checkpoint_of_open_clips_trainer_loads_too(tmp_path):
    """`epoch_N.pt` has the same names behind `module.` and beside an optimiser; a name nobody knows is refused."""
    model = whole_model("test-tiny")
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    check_against_open_clip(load_teacher("open_clip:test-tiny", tmp_path / "epoch_3.pt"), model)
    state["module.visual.extra"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    with pytest.raises(BadInputError, match=r"1 unexpected \(module.visual.extra\)"):
        load_teacher("open_clip:test-tiny", tmp_path / "epoch_3.pt")


def test_a_tag_brings_mean_std_and_the_file_that_open_clip_downloads(tmp_path, monkeypatch):
    """Without --weights open_clip fetches the tag's file, which is read strictly; source and hash say which it was."""
    model = whole_model("test-tiny")
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), path)
    asked = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: asked.append(config) or str(path))
    teacher = load_teacher("open_clip:test-tiny/plain")
    check_against_open_clip(teacher, model)
    assert asked[0]["hf_hub"] == "org/tiny/" and teacher.spec.weights == "open_clip pretrained: org/tiny"
    assert (teacher.spec.mean, teacher.spec.std) == (MEAN, STD)
    assert teacher.spec.weights_sha256 == load_teacher("open_clip:test-tiny/plain", path).spec.weights_sha256


def test_without_a_network_the_way_on_is_said(monkeypatch):
    """A failed download, and a name without a tag, are errors that say what to pass."""

    def fail(config):
        raise OSError("no route to host\nand a long trace")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(BadInputError, match=r"\(no route to host\). Fetch the file of org/tiny .*--weights PATH.*random:0"):
        load_teacher("open_clip:test-tiny/plain")
    with pytest.raises(UsageError, match="open_clip:test-tiny names no weights: ask for open_clip:test-tiny/TAG"):
        load_teacher("open_clip:test-tiny")


def test_weights_trained_with_another_activation_are_refused():
    """A tag that wants QuickGELU on an architecture without it (open_clip warns and goes on) is refused, with the right name."""
    with pytest.raises(
        UsageError, match="trained with QuickGELU, and.*test-tiny has GELU. Ask for open_clip:test-tiny-quickgelu/quick"
    ):
        load_teacher("open_clip:test-tiny/quick", "random:0")
    with pytest.raises(UsageError, match="Ask for open_clip:ViT-B-16-quickgelu/openai"):
        load_teacher("open_clip:ViT-B-16/openai")
    assert load_teacher("open_clip:test-tiny-quickgelu/quick", "random:0").spec.name == "open_clip:test-tiny-quickgelu/quick"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RN50-quickgelu/openai", "a ResNet"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "pools by attention"),
        ("ViT-H-14-CLIPA/datacomp1b", "its embedding is the avg of its patches"),
        ("convnext_base/laion400m_s13b_b51k", r"timm's convnext_base, and its class is ConvNeXt"),
        ("MobileCLIP2-B/dfndr2b", r"timm's vit_base_mci_224, and its patches come out of a HybridEmbed"),
    ],
)
def test_a_tower_that_is_not_plain_is_refused_by_what_it_is(name, says):
    """ResNets, timm's towers, attention pooling and average pooling are refused before anything is built."""
    with pytest.raises(UsageError, match=f"open_clip:{name} cannot be a teacher: .*{says}.*ViT-B-16/laion2b"):
        load_teacher(f"open_clip:{name}", "random:0")


def test_unknown_names_are_answered_with_likely_ones():
    """A typing error in the architecture or the tag lists what there is."""
    with pytest.raises(UnknownNameError, match="no architecture named 'ViT-B-15'. Did you mean .*ViT-B-16"):
        load_teacher("open_clip:ViT-B-15/openai")
    with pytest.raises(UnknownNameError, match="no weights of test-tiny tagged 'nonsense'. Its tags: plain, quick"):
        load_teacher("open_clip:test-tiny/nonsense")


def test_another_image_size_resizes_the_position_table():
    """At 48 pixels the grid is 6 x 6 and 32-pixel crops go in."""
    teacher = load_teacher("open_clip:test-tiny", "random:0", image_size=48)
    assert (teacher.spec.image_size, teacher.spec.grid) == (48, (6, 6))
    assert teacher(crops_u8(2, 32), [3]).tokens.shape == (2, 1, 37, 48)


INTEGERS = {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}


def test_openais_own_file_needs_a_name_of_openais(tmp_path, monkeypatch):
    """The three integers of OpenAI's archive tell its file: GELU towers and other tags refuse it and name who takes it."""
    patched = {**pretrained._PRETRAINED["test-tiny-quickgelu"], "openai": {"quick_gelu": True}}
    monkeypatch.setitem(pretrained._PRETRAINED, "test-tiny-quickgelu", patched)
    path = tmp_path / "openai.pt"
    torch.save(
        {"state_dict": {f"module.{name}": t for name, t in (whole_model("test-tiny").state_dict() | INTEGERS).items()}}, path
    )
    for name in ("test-tiny", "test-tiny/plain", "test-tiny-quickgelu/quick"):
        with pytest.raises(UsageError, match="this is OpenAI's file.*Ask for open_clip:test-tiny-quickgelu/openai"):
            load_teacher(f"open_clip:{name}", path)
    for name in ("test-tiny-quickgelu", "test-tiny-quickgelu/openai"):
        assert load_teacher(f"open_clip:{name}", path).spec.activation == "quick_gelu"


def test_the_file_of_openai_is_sent_to_our_own_names_too():
    """For ViT-B/16 and L/14 the way is also clip-b16 and clip-l14; what open_clip lacks is not advised."""
    loaded = LoadedWeights("a.pt", "0" * 64, tuple(INTEGERS))
    for arch, right in (("ViT-B-16", "clip-b16 or open_clip:ViT-B-16-quickgelu/openai"), ("ViT-L-14", "clip-l14 or "),
                        ("ViT-L-14-336", "open_clip:ViT-L-14-336-quickgelu/openai"), ("ViT-S-16", None)):  # fmt: skip
        with pytest.raises(UsageError, match=f"Ask for {right}" if right else "no architecture with QuickGELU"):
            _require_not_openais(f"open_clip:{arch}", arch, "", "a.pt", loaded)


def test_a_refusal_does_not_advise_what_it_refuses():
    """Where open_clip's only tag of an architecture disagrees with it, the advice is not the same name again."""
    with pytest.raises(UsageError, match="open_clip:roberta-ViT-B-32 --weights PATH") as caught:
        load_teacher("open_clip:roberta-ViT-B-32/laion2b_s12b_b32k", "random:0")
    assert "Ask for" not in str(caught.value)


TIMM_TOWERS = {
    "ViT-B-16-SigLIP2/webli": (0.5, 0.5, 0.5),
    "ViT-B-16-SigLIP2": (0.5, 0.5, 0.5),
    "PE-Core-B-16/meta": (0.5, 0.5, 0.5),
    "EVA02-B-16/merged2b_s8b_b131k": open_clip.OPENAI_DATASET_MEAN,
    "EVA01-g-14": open_clip.OPENAI_DATASET_MEAN,
}
"""Name -> mean of its pixels."""


@pytest.mark.parametrize("name", TIMM_TOWERS)
@torch.no_grad()
def test_towers_that_are_timms_are_read_as_such(name, tmp_path, monkeypatch):
    """A file in open_clip's names fills timm's trunk; tokens and attention are its own tower's; text is left out."""
    create, narrow = timm.create_model, dict(depth=2, embed_dim=64, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda model, **options: create(model, **narrow, **options))
    config = open_clip.get_model_config(name.partition("/")[0])["vision_cfg"]
    pool, proj = config["timm_pool"], config["timm_proj"]
    tower = TimmModel(config["timm_model_name"], 64, config["image_size"], pool=pool, proj=proj).eval()
    random_weights(tower, 0)
    state = {f"visual.{key}": tensor for key, tensor in tower.state_dict().items()}
    save_file(
        state | {"text.token_embedding.weight": torch.ones(2, 3), "logit_scale": torch.ones(1)}, tmp_path / "clip.safetensors"
    )
    teacher = load_teacher(f"open_clip:{name}", tmp_path / "clip.safetensors")
    spec = teacher.spec
    assert spec.mean == TIMM_TOWERS[name] and spec.image_size == config["image_size"]
    assert {"logit_scale", "text.token_embedding.weight"} <= set(teacher.ignored_weights)

    images = crops_u8(2, spec.image_size)
    output, normalised = teacher(images, [1, 2]), teacher.preprocess(images)
    softmaxes, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, *args, **named: softmaxes.append(softmax(x, *args, **named)) or softmaxes[-1]
    )
    for module in tower.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    tower(normalised)
    taps = tower.trunk.forward_intermediates(
        normalised, return_prefix_tokens=spec.has_cls, output_fmt="NLC", intermediates_only=True
    )
    for position, tap in enumerate(taps):
        expected = whiten(torch.cat([tap[1], tap[0]], 1) if spec.has_cls else tap, spec.norm_eps)
        assert (output.tokens[:, position] - expected).abs().max() <= 1e-5 * expected.abs().max()
    row = softmaxes[1][:, :, :1, 1:] if spec.has_cls else softmaxes[2]
    assert (output.attention - row.mean(1)[:, 0]).abs().max() <= 1e-5 * row.max()
