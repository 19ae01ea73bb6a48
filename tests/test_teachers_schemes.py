"""Files in Meta's and Hugging Face's names give the very numbers that timm's names give, and nothing is left over."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from teacher_fakes import crops_u8, noise, prefixed

from teacher_cache.errors import BadInputError
from teacher_cache.teachers import TEACHERS, clip, load_teacher
from teacher_cache.teachers.weights.load import random_weights

NARROW = dict(depth=2, embed_dim=64, num_heads=2)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **NARROW, **options))


def filled(name: str, seed: int = 0):
    """timm's model with random weights, and its state."""
    model = timm.create_model(name, num_classes=0).eval()
    random_weights(model, seed)
    return model, {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def renamed(state: dict, *pairs: tuple[str, str]) -> dict:
    """Names through every pair (regular expression, replacement) in turn."""
    for pattern, new in pairs:
        state = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
    return state


def apart(state: dict, query: str, key: str, value: str, at: str) -> dict:
    """The one matrix `at` of every block as three."""
    found = {}
    for name, tensor in state.items():
        if match := re.fullmatch(at + r"(weight|bias)", name):
            start = name.removesuffix(name[match.start(1) :]).removesuffix("qkv.")
            found |= {
                f"{start}{part}.{match[1]}": third for part, third in zip((query, key, value), tensor.chunk(3), strict=True)
            }
        else:
            found[name] = tensor
    return found


def with_whole_bias(state: dict) -> dict:
    """EVA's biases of queries and values as one, 1e3 for the keys, which a mask takes out."""
    found = {name: tensor for name, tensor in state.items() if not name.endswith(("q_bias", "v_bias"))}
    for name in [name for name in state if name.endswith("q_bias")]:
        query, value = state[name], state[name.replace("q_bias", "v_bias")]
        start = name.removesuffix("q_bias")
        found[f"{start}qkv.bias"] = torch.cat([query, torch.full_like(query, 1e3), value])
        found[f"{start}qkv.bias_mask"] = torch.cat([torch.ones_like(query), torch.zeros_like(query), torch.ones_like(value)])
    return found


def metas_dinov3(state: dict) -> dict:
    n = 8  # a quarter of a head
    extra = {"rope_embed.periods": (100 ** (torch.arange(n) / n)).bfloat16(), "mask_token": torch.ones(1, 64)}
    state = renamed(state, (r"gamma_([12])", r"ls\1.gamma"), ("reg_token", "storage_tokens"), ("fc1_g", "w1"), ("fc1_x", "w2"))
    state = renamed(state, (r"mlp\.fc2", "mlp.w3")) if any(".w1." in name for name in state) else state
    return with_whole_bias(state) | extra | noise("local_cls_norm.weight")


def metas_dinov2(state: dict) -> dict:
    """The CLS token and its row of the table apart: together they are timm's CLS token."""
    row = torch.full((1, 1, 64), 0.25)
    state = renamed(state, ("reg_token", "register_tokens")) | {"mask_token": torch.ones(1, 64)}
    return state | {"cls_token": state["cls_token"] - row, "pos_embed": torch.cat([row, state["pos_embed"]], 1)}


def hfs_vit(state: dict) -> dict:
    state = renamed(
        state,
        (r"blocks\.(\d+)\.", r"encoder.layer.\1."),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"attn\.proj", "attention.output.dense"),
        (r"^norm\.", "layernorm."),
        (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        (r"attn\.qkv", "attention.attention.qkv"),
    )
    state = apart(state, "query", "key", "value", r"encoder\.layer\.\d+\.attention\.attention\.qkv\.")
    return prefixed("vit.", state) | noise("classifier.weight")


def hfs_dinov2(state: dict) -> dict:
    row = torch.full((1, 1, 64), 0.25)
    state = state | {"cls_token": state["cls_token"] - row, "pos_embed": torch.cat([row, state["pos_embed"]], 1)}
    state = renamed(
        state,
        (r"blocks\.(\d+)\.", r"encoder.layer.\1."),
        (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
        (r"attn\.proj", "attention.output.dense"),
        (r"^norm\.", "layernorm."),
        (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        ("(cls|reg)_token", lambda match: f"embeddings.{'register_tokens' if match[1] == 'reg' else 'cls_token'}"),
        ("pos_embed", "embeddings.position_embeddings"),
        (r"attn\.qkv", "attention.attention.qkv"),
    )
    state = apart(state, "query", "key", "value", r"encoder\.layer\.\d+\.attention\.attention\.qkv\.")
    return state | {"embeddings.mask_token": torch.ones(1, 64)}


def hfs_dinov3(state: dict) -> dict:
    state = renamed(
        state,
        (r"blocks\.(\d+)\.", r"layer.\1."),
        (r"gamma_([12])", r"layer_scale\1.lambda1"),
        (r"attn\.proj", "attention.o_proj"),
        (r"attn\.q_bias", "attention.q_proj.bias"),
        (r"attn\.v_bias", "attention.v_proj.bias"),
        (r"patch_embed\.proj", "embeddings.patch_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("reg_token", "embeddings.register_tokens"),
        ("fc1_g", "gate_proj"),
        ("fc1_x|fc1", "up_proj"),
        ("fc2", "down_proj"),
        (r"attn\.qkv", "attention.qkv"),
    )
    return apart(state, "q_proj", "k_proj", "v_proj", r"layer\.\d+\.attention\.qkv\.") | {
        "embeddings.mask_token": torch.ones(1, 1, 64)
    }


def hfs_clip(state: dict) -> dict:
    """Of CLIP and SigLIP, whole: with a text tower beside."""
    state = renamed(
        state,
        (r"blocks\.(\d+)\.", r"encoder.layers.\1."),
        (r"\.norm([12])", r".layer_norm\1"),
        (r"attn\.proj\.", "self_attn.out_proj."),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"patch_embed\.proj", "embeddings.patch_embedding"),
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding.weight"),
        (r"attn\.qkv", "self_attn.qkv"),
        (r"attn_pool\.latent", "head.probe"),
        (r"attn_pool\.proj", "head.attention.out_proj"),
        (r"attn_pool\.norm", "head.layernorm"),
        (r"attn_pool\.mlp", "head.mlp"),
    )
    for name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        if name in state:
            state[name] = state[name].flatten(0, 1).squeeze(0)
    for kind in ("weight", "bias"):
        if f"attn_pool.q.{kind}" in state:
            parts = [state.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
            state[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
    state = apart(state, "q_proj", "k_proj", "v_proj", r"encoder\.layers\.\d+\.self_attn\.qkv\.")
    return prefixed("vision_model.", state) | noise("text_model.final_layer_norm.weight", "logit_scale")


LAYOUTS = {
    "Meta's DINOv3": ("vit_small_patch16_dinov3_qkvb", metas_dinov3),
    "Meta's DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3_qkvb", metas_dinov3),
    "Meta's DINOv2": ("vit_small_patch14_reg4_dinov2", metas_dinov2),
    "Hugging Face's ViT": ("vit_base_patch16_224", hfs_vit),
    "Hugging Face's DINOv2": ("vit_small_patch14_reg4_dinov2", hfs_dinov2),
    "Hugging Face's DINOv3": ("vit_small_patch16_dinov3_qkvb", hfs_dinov3),
    "Hugging Face's DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3_qkvb", hfs_dinov3),
    "Hugging Face's CLIP": ("vit_base_patch16_clip_quickgelu_224", hfs_clip),
    "Hugging Face's SigLIP": ("vit_base_patch16_siglip_224", hfs_clip),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_in_other_names_is_the_same_teacher(layout, tmp_path):
    """Tokens and attention are those of the same weights in timm's names, to 1e-5; what is said names whose layout it was."""
    name, official = LAYOUTS[layout]
    model, state = filled(name)
    save_file({key: tensor.contiguous() for key, tensor in official(state).items()}, tmp_path / "theirs.safetensors")
    save_file(state, tmp_path / "timms.safetensors")
    size = 5 * model.patch_embed.patch_size[0]
    ours, theirs = (load_teacher(f"timm:{name}", tmp_path / f"{which}.safetensors", size) for which in ("timms", "theirs"))
    assert f"in the names of {layout.split()[0]}" in theirs.weights_read and not ours.weights_read
    images = crops_u8(2, size)
    expected, found = ours(images, [1, 2]), theirs(images, [1, 2])
    for wanted, got in ((expected.tokens, found.tokens), (expected.attention, found.attention)):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_in_other_names_is_read_strictly(layout, tmp_path):
    """One tensor too many, or one of a block's missing, is refused with its name."""
    name, official = LAYOUTS[layout]
    state = official(filled(name)[1])
    lost = next(key for key in state if re.search(r"1\.(attn\.qkv|.*(key|k_proj))\.weight", key))
    save_file({key: tensor.contiguous() for key, tensor in state.items() if key != lost}, tmp_path / "lost.safetensors")
    with pytest.raises(BadInputError, match=r"missing \((vit\.)?blocks\.1\.attn\.qkv\.weight.*read as (Meta|Hugging Face)'s"):
        load_teacher(f"timm:{name}", tmp_path / "lost.safetensors")
    first = next(iter(state))
    start = first[: first.index(".") + 1] if first.startswith(("vit.", "vision_model.")) else ""
    save_file(
        {key: t.contiguous() for key, t in state.items()} | {f"{start}surprise": torch.ones(2)}, tmp_path / "more.safetensors"
    )
    with pytest.raises(BadInputError, match="1 unexpected .*surprise"):
        load_teacher(f"timm:{name}", tmp_path / "more.safetensors")


def test_a_mask_or_periods_that_are_not_dinov3s_are_refused(tmp_path):
    """A mask that lets the keys' bias through, or other RoPE periods, make it another model than timm's."""
    state = metas_dinov3(filled("vit_small_patch16_dinov3_qkvb")[1])
    for key in ("blocks.1.attn.qkv.bias_mask", "rope_embed.periods"):
        torch.save(state | {key: torch.ones_like(state[key])}, tmp_path / "other.pth")
        with pytest.raises(BadInputError, match=f"unexpected .*{key}"):
            load_teacher("timm:vit_small_patch16_dinov3_qkvb", tmp_path / "other.pth")


def test_biases_that_a_model_has_no_place_for(tmp_path):
    """DINOv3's biases are refused by a model without, which names the one with; where all are zero they say nothing."""
    state = metas_dinov3(filled("vit_small_patch16_dinov3_qkvb")[1])
    torch.save(state, tmp_path / "biased.pth")
    with pytest.raises(
        BadInputError, match=r"unexpected .*qkv\.bias.*biases .* is timm:vit_small_patch16_dinov3_qkvb\.lvd1689m's"
    ):
        load_teacher("timm:vit_small_patch16_dinov3.lvd1689m", tmp_path / "biased.pth")
    torch.save({key: t * 0 if key.endswith("qkv.bias") else t for key, t in state.items()}, tmp_path / "zero.pth")
    assert load_teacher("timm:vit_small_patch16_dinov3", tmp_path / "zero.pth").head


def test_of_a_student_and_a_teacher_in_other_names_none_is_guessed(tmp_path):
    """Both are read, and a key says which."""
    theirs = {which: prefixed("backbone.", metas_dinov3(filled("vit_small_patch16_dinov3_qkvb", seed)[1]))
              for seed, which in enumerate(("student", "teacher"))}  # fmt: skip
    torch.save(theirs, tmp_path / "both.pth")
    name, path = "timm:vit_small_patch16_dinov3_qkvb", tmp_path / "both.pth"
    with pytest.raises(Exception, match=r"2 different sets of weights.*both\.pth#student.*or .*both\.pth#teacher"):
        load_teacher(name, path)
    images = crops_u8(1, 256)
    student, teacher = (load_teacher(name, f"{path}#{which}.backbone")(images, [2]).tokens for which in ("student", "teacher"))
    assert torch.equal(student, load_teacher(name, "random:0")(images, [2]).tokens)
    assert not torch.allclose(student, teacher, atol=0.1)


def test_hugging_faces_clip_fills_open_clips_tower(tmp_path):
    """clip-b16 from Hugging Face's names has open_clip's tower and projection, and leaves the text tower out."""
    entry = TEACHERS["clip-b16"].__class__(**{**vars(TEACHERS["clip-b16"]), "dim": 64, "depth": 2, "heads": 1, "image_size": 32})
    tower = clip.build_tower(entry).eval()
    random_weights(tower, 0)
    own = {key: tensor.detach().clone() for key, tensor in tower.state_dict().items()}
    state = renamed(
        {key: tensor for key, tensor in own.items() if key != "proj"},
        (r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
        (r"attn\.in_proj_", "self_attn.qkv."),
        (r"\.ln_([12])", r".layer_norm\1"),
        (r"attn\.out_proj", "self_attn.out_proj"),
        ("c_fc", "fc1"),
        ("c_proj", "fc2"),
        ("ln_pre", "pre_layrnorm"),
        ("ln_post", "post_layernorm"),
        ("conv1", "embeddings.patch_embedding"),
        ("class_embedding", "embeddings.class_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
    )
    state = prefixed("vision_model.", apart(state, "q_proj", "k_proj", "v_proj", r"encoder\.layers\.\d+\.self_attn\.qkv\."))
    state |= {"visual_projection.weight": own["proj"].T.contiguous()} | noise("text_model.embeddings.token_embedding.weight")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "clip.safetensors")
    teacher = clip.load(entry, tmp_path / "clip.safetensors")
    expected = clip.load(entry, "random:0")
    assert teacher.ignored_weights == ("text_model.embeddings.token_embedding.weight",)
    assert all((teacher.head[key] == expected.head[key]).all() for key in ("gamma", "beta", "projection"))
    assert torch.equal(teacher(crops_u8(2, 32), [1, 2]).tokens, expected(crops_u8(2, 32), [1, 2]).tokens)
