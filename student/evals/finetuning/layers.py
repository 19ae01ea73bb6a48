"""Layer decay (BEiT; MAE util/lr_decay.py): the nearer a parameter is to the pixels, the slower it learns."""

from __future__ import annotations

import re

import torch
from torch import nn

from ...errors import ConfigError

NEVER_DECAYED = ("pos_embed", "cls_token", "dist_token", "relative_position_bias_table")
"""Ends of the names of parameters that have more than one axis and yet no weight decay."""


def n_layers(model: nn.Module) -> int:
    """Number of blocks that count: all of a ViT's, of MCMAE's those behind the convolutions, of Swin's those of all stages."""
    if hasattr(model, "blocks"):
        return len(model.blocks)
    if hasattr(model, "layers"):
        return sum(len(stage.blocks) for stage in model.layers)
    raise ConfigError(f"{type(model).__name__} has neither blocks nor stages, and so no layers that a rate could decay over.")


def layer_of(name: str, model: nn.Module) -> int:
    """The layer of a parameter of an encoder: 0 for what comes before the blocks, i + 1 for block i, blocks + 1 for what follows.

    Swin (SimMIM's rule): what joins two stages belongs to the last block before it, by timm's names of its downsampling.
    """
    last = n_layers(model) + 1
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if match := re.match(r"layers\.(\d+)\.(blocks\.(\d+)|downsample)\.", name):
        before = sum(len(stage.blocks) for stage in list(model.layers)[: int(match[1])])
        return before + int(match[3]) + 1 if match[3] else before
    early = ("cls_token", "pos_embed", "reg_token", "patch_embed", "norm_pre", "embeds.", "stages.", "project.")
    return 0 if name.startswith(early) else last


def parameter_groups(encoder: nn.Module, head: list[nn.Parameter], decay: float, weight_decay: float) -> list[dict]:
    """AdamW's groups of all parameters that learn, each with its "scale" of the learning rate.

    encoder: of ours, or a network of timm's; layer l of L blocks has decay ** (L + 1 - l).  head: what is new, with scale 1.
    """
    last = n_layers(encoder) + 1
    groups: dict[tuple[int, bool], dict] = {}
    named = [(name, parameter, layer_of(name, encoder)) for name, parameter in encoder.named_parameters()]
    for name, parameter, layer in [*named, *(("head", parameter, last) for parameter in head)]:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(NEVER_DECAYED)
        group = groups.setdefault((layer, decays), {"params": [], "weight_decay": weight_decay if decays else 0.0,
                                                    "scale": decay ** (last - layer)})  # fmt: skip
        group["params"].append(parameter)
    return list(groups.values())


def set_drop_path(encoder: nn.Module, rate: float) -> None:
    """Give each block its probability of being dropped: from 0 at the first to `rate` at the last, in the order they stand in."""
    from timm.layers import DropPath

    blocks = [module for module in encoder.modules() if hasattr(module, "drop_path1") and hasattr(module, "drop_path2")]
    for block, value in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        block.drop_path1, block.drop_path2 = (DropPath(value) if value > 0 else nn.Identity() for _ in range(2))
