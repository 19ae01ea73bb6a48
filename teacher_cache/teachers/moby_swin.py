"""MoBY's Swins, built from timm's blocks: 7 x 7 tokens of the last stage, no CLS, no attention.

A Swin's stages differ in width and grid, so only the two blocks of the last one can be asked for, as 1 and 2.
`--layers last` keeps the whitened output of the second; with the head's gamma and beta it is the last norm's output,
which is MimCo's target.

The official file has, under "model", `encoder.*` (the online branch, which its own evaluation takes), `encoder_k.*`,
projectors, predictor and queues. Its names are timm's but for the downsampling, which ends a stage there and begins
the next one here, and two buffers that follow from the window size. It pickles a configuration of yacs. Unlike a
ViT's, the shape of its position tables tells its heads and its window.
"""

from __future__ import annotations

import os

from timm.models.swin_transformer import SwinTransformer

from ..errors import UsageError
from ..format.spec import TeacherSpec
from . import TeacherEntry
from .base import RESIZE, Anatomy, Teacher, activation_of, check_precision
from .blocks.positions import NO_POSITIONS
from .weights.load import Layout, load_weights, require_weights

DEPTHS = {768: (2, 2, 6, 2), 1024: (2, 2, 18, 2)}
"""Width of the last stage -> blocks of each stage: Swin-T, Swin-B."""
WINDOW = 7

LAYOUTS = (
    Layout(
        inside=("model",),
        keep=(
            ("encoder.layers.0.downsample.", "layers.1.downsample."),
            ("encoder.layers.1.downsample.", "layers.2.downsample."),
            ("encoder.layers.2.downsample.", "layers.3.downsample."),
            ("encoder.", ""),
        ),
        ignore=(
            "encoder.*.attn_mask",
            "encoder.*.relative_position_index",
            "encoder_k.*",
            "projector.*",
            "projector_k.*",
            "predictor.*",
            "queue*",
        ),
    ),
)


def build_swin(entry: TeacherEntry) -> SwinTransformer:
    """The untrained Swin of one line of the table; each stage has half the width and half the heads of the next."""
    return SwinTransformer(
        img_size=entry.image_size,
        patch_size=entry.patch_size // 8,
        embed_dim=entry.dim // 8,
        depths=DEPTHS[entry.dim],
        num_heads=tuple(entry.heads // shrink for shrink in (8, 4, 2, 1)),
        window_size=WINDOW,
        num_classes=0,
        weight_init="skip",  # every parameter is filled afterwards
    )


def load(
    entry: TeacherEntry,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """The teacher of one line of the table; see `load_teacher`. The windows fix its input size."""
    check_precision(precision, device)
    if image_size not in (None, entry.image_size):
        raise UsageError(
            f"Teacher {entry.name} takes {entry.image_size} x {entry.image_size} pixels only, because its windows are {WINDOW} x "
            f"{WINDOW} at every stage: leave out --image-size {image_size}."
        )
    weights = require_weights(entry, weights)
    model = build_swin(entry)
    loaded = load_weights(model, weights, LAYOUTS, entry.pickled)
    for stage in model.layers[1:]:  # timm rounds the residual stream to bf16 there under autocast
        stage.downsample.register_forward_hook(lambda module, inputs, output: output.float())
    spec = TeacherSpec(
        name=entry.name,
        weights=loaded.source,
        weights_sha256=loaded.sha256,
        image_size=entry.image_size,
        patch_size=entry.patch_size,
        grid=entry.grid,
        dim=entry.dim,
        depth=entry.depth,
        heads=entry.heads,
        has_cls=entry.has_cls,
        n_registers=0,
        mean=entry.mean,
        std=entry.std,
        norm_eps=model.norm.eps,
        projection_dim=None,
        resize=RESIZE,
        activation=activation_of(block.mlp for stage in model.layers for block in stage.blocks),
        positions=NO_POSITIONS,
        attention_source=None,
        head="layernorm",
    )
    anatomy = Anatomy(model, model.forward_features, model.layers[-1].blocks, model.norm, attention_parts=None)
    return Teacher(spec, anatomy, device, precision, loaded.ignored, loaded.how)
