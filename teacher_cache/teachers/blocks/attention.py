"""The attention that a store keeps, recomputed from its parameters: a fused attention never shows its map.

Two sources: the CLS token's row in the last block, or the weights of the head of a model that has no CLS and pools by attention.
"""

# B batch, N patches, T all tokens (CLS, registers, patches), D width, H heads

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionParts:
    """The parameters of one attention, as they stand in its module."""

    norm: Callable[[Tensor], Tensor]
    """Before the attention, of tokens [B, T, D]."""
    query_weight: Tensor
    """[H * head width, D]"""
    query_bias: Tensor | None
    key_weight: Tensor
    """[H * head width, D]"""
    key_bias: Tensor | None
    heads: int
    query_norm: Callable[[Tensor], Tensor]
    """Applied to each head's query (timm's qk-norm); the identity for most."""
    key_norm: Callable[[Tensor], Tensor]
    n_prefix: int
    """Tokens before the patches (CLS, registers), which are not rotated; their columns are dropped."""
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    """(keys of patches [B, H, N, head width], the rotation that the block was given) -> the same, rotated. None: no rotation."""
    latent: Tensor | None = None
    """[1, 1, D]: what asks instead of the CLS token, in a pooling head."""


def attention_map(tokens: Tensor, parts: AttentionParts, rotation: Tensor | None = None) -> Tensor:
    """What the CLS token (the first), or the latent of a pooling head, attends to among the patches: float32 [B, N].

    tokens:   [B, T, D], what enters the block, or what the last block gives to the pooling head
    rotation: the block's own, for its patches (RoPE)
    a = mean_h softmax(q . k / sqrt(head width)) over all T keys; the `n_prefix` columns of CLS and registers are then dropped:
    the map by which MILAN and MaskAlign sample what stays visible. Only one query and the keys are computed, so this costs one
    projection, and it does not matter whether the module itself uses a fused attention.
    """
    normed = parts.norm(tokens.float())
    asking = normed[:, :1] if parts.latent is None else parts.latent.float().expand(len(normed), -1, -1)

    query = F.linear(asking, parts.query_weight.float(), _float(parts.query_bias))  # [B, 1, H * head width]
    keys = F.linear(normed, parts.key_weight.float(), _float(parts.key_bias))  # [B, T, H * head width]
    query, keys = (x.unflatten(-1, (parts.heads, -1)).transpose(1, 2) for x in (query, keys))  # [B, H, ., head width]
    query, keys = parts.query_norm(query), parts.key_norm(keys)
    if rotation is not None and parts.rotate is not None:  # CLS stands before the patches: its query is not rotated
        prefix, patches = keys[:, :, : parts.n_prefix], keys[:, :, parts.n_prefix :]
        keys = torch.cat([prefix, parts.rotate(patches, rotation.float())], 2)

    logits = (query * query.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # [B, H, 1, T]
    return logits.softmax(-1).mean(1)[:, 0, parts.n_prefix :]


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
