"""CLIP's image towers, built from open_clip's blocks, filled from OpenAI's or open_clip's weights file.

The text tower in the file is left out by name. OpenAI's weights are made for QuickGELU, x * sigmoid(1.702 x);
a state dict does not say so, and open_clip's plain `ViT-B-16` runs them with the exact GELU after a warning.
Here it is part of the tower. For the same reason weights of another origin (LAION's, with GELU) are another
teacher, although they fit this one's shapes.
"""

from __future__ import annotations

import os

from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from ..errors import UsageError
from ..spec import TeacherSpec
from . import TeacherEntry
from .base import RESIZE, Anatomy, AttentionParts, Teacher, check_precision, grid_for, resize_position_table
from .weights import KeyRules, load_weights

OPENAI_NAMES = KeyRules(
    keep="visual.",
    ignore=(
        "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",  # the text tower
        "logit_scale",  # of the contrastive loss
        "input_resolution", "context_length", "vocab_size",  # integers in OpenAI's archive
    ),
)  # fmt: skip


def build_tower(entry: TeacherEntry, image_size: int | None = None) -> VisionTransformer:
    """The untrained image tower, as open_clip builds it for its `-quickgelu` configurations."""
    return VisionTransformer(
        image_size=image_size or entry.image_size,
        patch_size=entry.patch_size,
        width=entry.dim,
        layers=entry.depth,
        heads=entry.heads,
        mlp_ratio=4.0,
        output_dim=entry.projection_dim,
        act_layer=QuickGELU,
    )


def attention_parts(block: nn.Module) -> AttentionParts:
    """Of one of open_clip's residual blocks."""
    attention = block.attn
    same = nn.Identity()
    return AttentionParts(
        block.ln_1,
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.num_heads,
        query_norm=same,
        key_norm=same,
    )


def load(
    entry: TeacherEntry,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """The teacher of one line of the table; see `load_teacher`."""
    check_precision(precision, device)
    image_size = image_size or entry.image_size
    grid = grid_for(entry.name, image_size, entry.patch_size)
    if weights is None:
        raise UsageError(
            f"Teacher {entry.name} needs its weights, which are not shipped here. Download {entry.weights_from}, then add "
            f"--weights PATH. For a trial without the file: --weights random:0."
        )

    tower = build_tower(entry)
    loaded = load_weights(tower, weights, OPENAI_NAMES)
    if grid != entry.grid:
        native, tower = tower.state_dict(), build_tower(entry, image_size)
        table = resize_position_table(native["positional_embedding"], 1, grid)
        tower.load_state_dict({**native, "positional_embedding": table})

    spec = TeacherSpec(
        name=entry.name,
        weights=loaded.source,
        weights_sha256=loaded.sha256,
        image_size=image_size,
        patch_size=entry.patch_size,
        grid=grid,
        dim=entry.dim,
        depth=entry.depth,
        heads=entry.heads,
        has_cls=True,
        n_registers=0,
        mean=entry.mean,
        std=entry.std,
        norm_eps=entry.norm_eps,
        projection_dim=entry.projection_dim,
        resize=RESIZE,
    )
    anatomy = Anatomy(tower, tower, tower.transformer.resblocks, tower.ln_post, attention_parts, tower.proj)
    return Teacher(spec, anatomy, device, precision, loaded.ignored)
