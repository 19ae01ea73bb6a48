"""Other people's names for the parts of a ViT, and how they become those of the model that is filled.

Meta's own files of DINOv2 and DINOv3, and Hugging Face's of ViT, DINOv2, DINOv3, CLIP and SigLIP, are told by names that no other
file has. What a scheme has no rule for keeps its name, so that loading stays strict: it is then unexpected, or missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scheme:
    """One way of naming a ViT, as `in_own_names` reads it."""

    title: str
    """Whose it is, for people."""
    signature: tuple[str, ...]
    """Names that are all there, behind one prefix."""
    rules: Rules
    """(regular expression of a whole name, name in timm); `NAME|0`, `|1`, `|2` are the queries, keys and values of one NAME."""
    ignore: tuple[str, ...]
    """Shell patterns of what belongs to no ViT, or to its training."""
    mend: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    """What names alone do not do, on timm's names."""
    within: str = ""
    """Where the ViT may be a part of a larger model: a prefix that is then taken off, so that its projection stands beside it."""

    def prefixes(self, names: set[str]) -> Iterator[str]:
        """Beginnings behind which all names of the signature are."""
        first = self.signature[0]
        for name in sorted(names):
            prefix = name.removesuffix(first)
            at_a_part = prefix != name and (not prefix or prefix.endswith("."))
            if at_a_part and all(prefix + other in names for other in self.signature):
                yield prefix

    def renamed(self, name: str) -> str:
        for pattern, own in self.rules:
            if match := re.fullmatch(pattern, name):
                return match.expand(own)
        return name


def _without_mask(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv3's key bias is masked out by a buffer of ones, zeros and ones; its RoPE periods follow from the width of a head."""
    kept = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias_mask"):
            expected = torch.ones(3).repeat_interleave(len(tensor) // 3)
            expected[len(tensor) // 3 : -(len(tensor) // 3)] = 0
            if torch.equal(tensor.float(), expected):
                continue
        elif name == "rope_embed.periods":
            n = len(tensor)
            if torch.allclose(tensor.float(), 100 ** (torch.arange(n) / n), rtol=1e-2):  # rounded to bfloat16 in the files
                continue
        elif name.endswith("attn.qkv.bias") and f"{name}_mask" in state:
            query, key, value = tensor.chunk(3)
            tensor = torch.cat([query, torch.zeros_like(key), value])
        kept[name] = tensor
    return kept


def _with_key_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where queries and values have a bias and keys have none (DINOv3), one of zeros; an MLP without gate has one `fc1`."""
    if not any(".mlp.fc1_g." in name for name in state):
        state = {name.replace(".mlp.fc1_x.", ".mlp.fc1."): tensor for name, tensor in state.items()}
    for name in [name for name in state if name.endswith("attn.qkv.bias|0")]:
        state.setdefault(name.replace("|0", "|1"), torch.zeros_like(state[name]))
    return state


def _pooling_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's and SigLIP's tables and CLS token without a batch axis; SigLIP's pooling head has one matrix of q, k and v."""
    mended = {}
    for name, tensor in state.items():
        if name == "pos_embed" and tensor.ndim == 2:
            tensor = tensor[None]
        elif name == "cls_token" and tensor.ndim == 1:
            tensor = tensor[None, None]
        elif name.startswith("attn_pool.in_proj_"):
            query, key_value = tensor.split([len(tensor) // 3, len(tensor) - len(tensor) // 3])
            kind = name.removeprefix("attn_pool.in_proj_")
            mended |= {f"attn_pool.q.{kind}": query, f"attn_pool.kv.{kind}": key_value}
            continue
        mended[name] = tensor
    return mended


_BLOCK, _LAYER, _LAYERS = r"blocks\.(\d+)\.", r"(?:model\.)?layer\.(\d+)\.", r"encoder\.layers\.(\d+)\."
_ENCODER = r"encoder\.layer\.(\d+)\."
_ANY = r"(weight|bias)"
_OF_TRAINING = ("mask_token", "embeddings.mask_token", "classifier.*", "pooler.*")
_OF_TEXT = ("text_model.*", "text_projection.*", "logit_scale", "logit_bias", "*embeddings.position_ids")

SCHEMES = (
    Scheme(
        "Meta's DINOv3",
        ("storage_tokens", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
        (
            ("storage_tokens", "reg_token"),
            (_BLOCK + r"ls([12])\.gamma", r"blocks.\1.gamma_\2"),
            (_BLOCK + r"mlp\.w1\." + _ANY, r"blocks.\1.mlp.fc1_g.\2"),
            (_BLOCK + r"mlp\.w2\." + _ANY, r"blocks.\1.mlp.fc1_x.\2"),
            (_BLOCK + r"mlp\.w3\." + _ANY, r"blocks.\1.mlp.fc2.\2"),
        ),
        (*_OF_TRAINING, "local_cls_norm.*", "projectors.*"),
        _without_mask,
    ),
    *(
        Scheme(
            "Meta's DINOv2",
            (sign, "mask_token", "blocks.0.attn.qkv.weight"),
            (
                ("register_tokens", "reg_token"),
                (_BLOCK + r"mlp\.w12\." + _ANY, r"blocks.\1.mlp.fc1.\2"),
                (_BLOCK + r"mlp\.w3\." + _ANY, r"blocks.\1.mlp.fc2.\2"),
            ),
            _OF_TRAINING,
        )
        for sign in ("register_tokens", "blocks.0.mlp.w12.weight")
    ),
    Scheme(
        "Hugging Face's ViT and DINOv2",
        ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.attention.attention.query.weight"),
        (
            (r"embeddings\.cls_token", "cls_token"),
            (r"embeddings\.register_tokens", "reg_token"),
            (r"embeddings\.position_embeddings", "pos_embed"),
            (r"embeddings\.patch_embeddings\.projection\." + _ANY, r"patch_embed.proj.\1"),
            (_ENCODER + r"attention\.attention\.query\." + _ANY, r"blocks.\1.attn.qkv.\2|0"),
            (_ENCODER + r"attention\.attention\.key\." + _ANY, r"blocks.\1.attn.qkv.\2|1"),
            (_ENCODER + r"attention\.attention\.value\." + _ANY, r"blocks.\1.attn.qkv.\2|2"),
            (_ENCODER + r"attention\.output\.dense\." + _ANY, r"blocks.\1.attn.proj.\2"),
            (_ENCODER + r"(?:layernorm_before|norm1)\." + _ANY, r"blocks.\1.norm1.\2"),
            (_ENCODER + r"(?:layernorm_after|norm2)\." + _ANY, r"blocks.\1.norm2.\2"),
            (_ENCODER + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
            (_ENCODER + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\." + _ANY, r"blocks.\1.mlp.fc1.\2"),
            (_ENCODER + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out)\." + _ANY, r"blocks.\1.mlp.fc2.\2"),
            (r"layernorm\." + _ANY, r"norm.\1"),
        ),
        _OF_TRAINING,
    ),
    *(
        Scheme(
            "Hugging Face's DINOv3",
            ("embeddings.patch_embeddings.weight", f"{sign}.0.attention.q_proj.weight"),
            (
                (r"embeddings\.cls_token", "cls_token"),
                (r"embeddings\.register_tokens", "reg_token"),
                (r"embeddings\.patch_embeddings\." + _ANY, r"patch_embed.proj.\1"),
                (_LAYER + r"attention\.q_proj\." + _ANY, r"blocks.\1.attn.qkv.\2|0"),
                (_LAYER + r"attention\.k_proj\." + _ANY, r"blocks.\1.attn.qkv.\2|1"),
                (_LAYER + r"attention\.v_proj\." + _ANY, r"blocks.\1.attn.qkv.\2|2"),
                (_LAYER + r"attention\.o_proj\." + _ANY, r"blocks.\1.attn.proj.\2"),
                (_LAYER + r"norm([12])\." + _ANY, r"blocks.\1.norm\2.\3"),
                (_LAYER + r"layer_scale([12])\.lambda1", r"blocks.\1.gamma_\2"),
                (_LAYER + r"mlp\.gate_proj\." + _ANY, r"blocks.\1.mlp.fc1_g.\2"),
                (_LAYER + r"mlp\.up_proj\." + _ANY, r"blocks.\1.mlp.fc1_x.\2"),
                (_LAYER + r"mlp\.down_proj\." + _ANY, r"blocks.\1.mlp.fc2.\2"),
                (r"norm\." + _ANY, r"norm.\1"),
            ),
            _OF_TRAINING,
            _with_key_bias,
        )
        for sign in ("layer", "model.layer")
    ),
    Scheme(
        "Hugging Face's CLIP and SigLIP",
        ("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        (
            (r"embeddings\.class_embedding", "cls_token"),
            (r"embeddings\.position_embedding\.weight", "pos_embed"),
            (r"embeddings\.patch_embedding\." + _ANY, r"patch_embed.proj.\1"),
            (r"pre_layrnorm\." + _ANY, r"norm_pre.\1"),
            (_LAYERS + r"self_attn\.q_proj\." + _ANY, r"blocks.\1.attn.qkv.\2|0"),
            (_LAYERS + r"self_attn\.k_proj\." + _ANY, r"blocks.\1.attn.qkv.\2|1"),
            (_LAYERS + r"self_attn\.v_proj\." + _ANY, r"blocks.\1.attn.qkv.\2|2"),
            (_LAYERS + r"self_attn\.out_proj\." + _ANY, r"blocks.\1.attn.proj.\2"),
            (_LAYERS + r"layer_norm([12])\." + _ANY, r"blocks.\1.norm\2.\3"),
            (_LAYERS + r"mlp\.fc([12])\." + _ANY, r"blocks.\1.mlp.fc\2.\3"),
            (r"post_layernorm\." + _ANY, r"norm.\1"),
            (r"head\.probe", "attn_pool.latent"),
            (r"head\.attention\.in_proj_" + _ANY, r"attn_pool.in_proj_\1"),
            (r"head\.attention\.out_proj\." + _ANY, r"attn_pool.proj.\1"),
            (r"head\.layernorm\." + _ANY, r"attn_pool.norm.\1"),
            (r"head\.mlp\.fc([12])\." + _ANY, r"attn_pool.mlp.fc\1.\2"),
        ),
        _OF_TEXT,
        _pooling_head,
        within="vision_model.",
    ),
)
