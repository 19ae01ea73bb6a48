"""timm's ViTs by what they are made of: which can be tapped, where their parts are, and why the others cannot.

Two classes are read, VisionTransformer and Eva, with their pre-norm blocks and three kinds of attention: timm's own (one qkv),
EVA's (no key bias, qkv fused or split into q, k and v) and the rotary one. What follows the last block tells the head: a
LayerNorm, or nothing that the whitened tokens could give back.
"""

from __future__ import annotations

from functools import partial

import timm
from timm.layers import AttentionPoolLatent, AttentionRope, PatchEmbed, RmsNorm, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from .attention import AttentionParts, attention_map

KINDS = {VisionTransformer: (Block, (Attention,)), Eva: (EvaBlock, (EvaAttention, AttentionRope))}
"""Class of a model -> the class of its blocks, those of their attention."""


def why_not(model: nn.Module) -> str | None:
    """What about this model of timm's the taps and the attention do not allow for, or None."""
    if type(model) not in KINDS:
        return f"its class is {type(model).__name__}"
    block_kind, attention_kinds = KINDS[type(model)]
    block = model.blocks[-1]
    if type(block) is not block_kind:
        return f"its blocks are of the kind {type(block).__name__}"
    if type(block.attn) not in attention_kinds:
        return f"its attention is {type(block.attn).__name__}"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come out of a {type(model.patch_embed).__name__}"
    if not isinstance(block.norm1, nn.LayerNorm | RmsNorm):
        return f"its blocks begin with a {type(block.norm1).__name__}"
    patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    if patch[0] != patch[1] or grid[0] != grid[1]:
        return f"its patches of {patch[0]} x {patch[1]} pixels stand in a grid of {grid[0]} x {grid[1]}"
    if getattr(block.attn, "num_kv_groups", 1) > 1:
        return f"{block.attn.num_kv_groups} of its queries share a key"
    return None


def nearest(name: str) -> list[str]:
    """Names of timm's that are the same model, as far as there is one, in a kind that can be a teacher."""
    family = name.split(".")[0]
    if family.startswith("naflexvit_"):
        fixed = family.replace("naflexvit_", "vit_").replace("_par_", "_").replace("_parfac_", "_")
        return timm.list_models([f"{fixed}", f"{fixed}_[0-9]*"])[:2]
    if "_distilled" in family:
        return timm.list_models(family.replace("_distilled", ""))
    if "sapiens2" in family:
        return timm.list_models(family.replace("sapiens2", "dinov3"))
    return []


def final_norm(model: VisionTransformer | Eva) -> nn.LayerNorm | None:
    """The norm behind the last block; None where there is none, or one that is no LayerNorm.

    Where timm moved it behind the average pooling (`fc_norm`), that one: applied token by token it stands to
    the tokens as CLIP's ln_post, which CLIP itself applies to CLS only.
    """
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return norm if isinstance(norm, nn.LayerNorm) else None


def norm_eps(model: VisionTransformer | Eva) -> float:
    """Of the final norm, or of the blocks' where there is none."""
    return (final_norm(model) or model.blocks[-1].norm1).eps


def attention_source(model: VisionTransformer | Eva) -> str | None:
    """`TeacherSpec.attention_source`: `cls` where there is a CLS token, `pool` where patches are pooled by attention instead."""
    if model.cls_token is not None:
        return "cls"
    pool = model.attn_pool
    return "pool" if type(pool) is AttentionPoolLatent and pool.pos_embed is None and pool.latent_len == 1 else None


def attention_parts(n_prefix: int, block: EvaBlock | Block) -> AttentionParts:
    """Of one block. n_prefix: tokens before the patches."""
    attention = block.attn
    query, key = _query_and_key(attention)
    rotate = partial(apply_rot_embed_cat, half=getattr(attention, "rotate_half", False))
    norms = attention.q_norm, attention.k_norm
    return AttentionParts(block.norm1, *query, *key, attention.num_heads, *norms, n_prefix, rotate)


def pool_attention(model: VisionTransformer | Eva, tokens: Tensor) -> Tensor:
    """The weights of the pooling head over the patches, float32 [B, N], from what the last block gives, [B, T, D]."""
    pool, n_prefix = model.attn_pool, model.num_prefix_tokens
    skipped = 0 if getattr(model, "pool_include_prefix", True) else n_prefix
    key_weight, key_bias = pool.kv.weight.chunk(2)[0], None if pool.kv.bias is None else pool.kv.bias.chunk(2)[0]
    parts = AttentionParts(
        model.norm, pool.q.weight, pool.q.bias, key_weight, key_bias, pool.num_heads, pool.q_norm, pool.k_norm,
        n_prefix - skipped, latent=pool.latent,
    )  # fmt: skip
    return attention_map(tokens[:, skipped:], parts)


def rotation_in_words(model: VisionTransformer | Eva) -> str | None:
    """What the blocks rotate queries and keys by, for `TeacherSpec.positions`; None where they do not."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    kind = type(rope).__name__.removeprefix("RotaryEmbedding")
    said = [f"RoPE {kind} on patches alone, {getattr(rope, 'grid_indexing', 'ij')}"]
    said += [f"{name} {getattr(rope, name):g}" for name in ("temperature",) if getattr(rope, name, None) is not None]
    said += [f"offset {rope.grid_offset:g}"] if getattr(rope, "grid_offset", 0) else []
    reference = getattr(rope, "ref_feat_shape", None)
    said += [f"as in a grid of {reference[0]} x {reference[1]}"] if reference else []
    return ", ".join(said)


def _query_and_key(attention: nn.Module) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """(weight, bias) of both, whether they are one matrix with the values or stand alone."""
    if attention.qkv is None:
        return (attention.q_proj.weight, attention.q_proj.bias), (attention.k_proj.weight, attention.k_proj.bias)
    query, key, _ = attention.qkv.weight.chunk(3)
    if type(attention) is EvaAttention:
        return (query, attention.q_bias), (key, attention.k_bias)  # EVA's key bias is a buffer of zeros
    query_bias, key_bias, _ = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    return (query, query_bias), (key, key_bias)
