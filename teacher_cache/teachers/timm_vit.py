"""timm's plain VisionTransformer as a teacher: any of them as `timm:NAME`, and those of our table that are built of it.

Plain means: one flat sequence of [CLS, registers,] patches, absolute positions or none, pre-norm blocks with
timm's own attention, LayerNorm. Everything else is refused by what it is, not by its name.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import get_arch_pretrained_cfgs
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from ..errors import UnknownNameError, UsageError
from ..format.spec import TeacherSpec
from . import TIMM_PREFIX, TeacherEntry
from .base import (
    NO_POSITIONS,
    POSITIONS,
    RESIZE,
    Anatomy,
    AttentionParts,
    Teacher,
    activation_of,
    check_precision,
    grid_for,
    resize_position_table,
)
from .weights.load import Layout, LoadedWeights, load_weights, sha256_tensors
from .weights.offline import downloaded

_NOT_IN_TIMM = ("mask_token", "dino_head.*", "ibot_head.*")
"""What DINOv2's files have beside the ViT: all of them the first, checkpoints of its trainer the heads too."""
_QUICK_ELSEWHERE = {"vit_base_patch16_clip_224.dfn2b": "open_clip:ViT-B-16-quickgelu/dfn2b"}
"""timm's names whose weights were trained with QuickGELU by open_clip's table, while timm has no note -> the right name."""


def build_vit(entry: TeacherEntry, weight_init: str = "") -> VisionTransformer:
    """The untrained ViT of one line of the table. weight_init: timm's; "skip" where every parameter is filled afterwards."""
    return VisionTransformer(
        img_size=entry.image_size,
        patch_size=entry.patch_size,
        embed_dim=entry.dim,
        depth=entry.depth,
        num_heads=entry.heads,
        num_classes=0,
        norm_layer=lambda width, **kwargs: nn.LayerNorm(width, eps=entry.norm_eps, **kwargs),
        weight_init=weight_init,
    )


def attention_parts(block: Block) -> AttentionParts:
    """Of one of timm's blocks."""
    attention = block.attn
    return AttentionParts(
        block.norm1,
        attention.qkv.weight,
        attention.qkv.bias,
        attention.num_heads,
        attention.q_norm,
        attention.k_norm,
    )


def final_norm(model: VisionTransformer) -> nn.Module:
    """The norm behind the last block.

    Where timm moved it behind the average pooling (`fc_norm`), that one: applied token by token it stands to
    the tokens as CLIP's ln_post, which CLIP itself applies to CLS only.
    """
    return model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm


def why_not_plain(model: nn.Module) -> str | None:
    """What about this model the taps and the attention do not allow for, or None."""
    if type(model) is not VisionTransformer:
        return f"its class is {type(model).__name__}"
    block = model.blocks[-1]
    if type(block) is not Block:
        return f"its blocks are of the kind {type(block).__name__}"
    if type(block.attn) is not Attention:
        return f"its attention is {type(block.attn).__name__}"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come out of a {type(model.patch_embed).__name__}"
    for norm in (block.norm1, final_norm(model)):
        if not isinstance(norm, nn.LayerNorm):
            return f"it has {type(norm).__name__} where the whitening is a LayerNorm"
    patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    if patch[0] != patch[1] or grid[0] != grid[1]:
        return f"its patches of {patch[0]} x {patch[1]} pixels stand in a grid of {grid[0]} x {grid[1]}"
    return None


def at_image_size(model: VisionTransformer, name: str, image_size: int) -> None:
    """Change the model's input size in place, its position table by our own rule (timm's is antialiased)."""
    grid = grid_for(name, image_size, model.patch_embed.patch_size[0])
    if grid == model.patch_embed.grid_size:
        return
    model.patch_embed.set_input_size(image_size)
    if model.pos_embed is not None:
        n_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        model.pos_embed = nn.Parameter(resize_position_table(model.pos_embed.detach(), n_prefix, grid))


def as_teacher(
    name: str,
    model: VisionTransformer,
    loaded: LoadedWeights,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: str,
    precision: str,
    projection: Tensor | None = None,
) -> Teacher:
    """A filled plain ViT, at the image size it stands at, described and frozen.

    projection: [D, E] behind the final norm, where there is one
    """
    spec = TeacherSpec(
        name=name,
        weights=loaded.source,
        weights_sha256=loaded.sha256,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        grid=tuple(model.patch_embed.grid_size),
        dim=model.embed_dim,
        depth=len(model.blocks),
        heads=model.blocks[-1].attn.num_heads,
        has_cls=model.has_class_token,
        n_registers=model.num_reg_tokens,
        mean=tuple(mean),
        std=tuple(std),
        norm_eps=final_norm(model).eps,
        projection_dim=None if projection is None else projection.shape[1],
        resize=RESIZE,
        activation=activation_of(block.mlp for block in model.blocks),
        positions=NO_POSITIONS if model.pos_embed is None else POSITIONS,
        attention_source="cls" if model.has_class_token else None,
        head="layernorm",
    )
    anatomy = Anatomy(model, model.forward_features, model.blocks, final_norm(model), attention_parts, projection)
    return Teacher(spec, anatomy, device, precision, loaded.ignored, loaded.how)


def load_timm(
    name: str,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    as_begun: bool = False,
) -> Teacher:
    """The teacher `timm:NAME`; see `load_teacher`.

    mean and std are those of timm's configuration of NAME, whose note on the activation has to be true of the model too. A
    weights file must hold exactly timm's names (wrapped or not: file_parts.py); only the classifier and DINOv2's mask token and
    heads are left out, and named in `ignored_weights`. Without `weights`, timm downloads its own; their sha256 is then that of
    the tensors, because timm may rename them on the way from the file. Raises UsageError for another activation than theirs.
    """
    check_precision(precision, device)
    model = _create(name)
    if reason := why_not_plain(model):
        raise UsageError(
            f"{name} cannot be a teacher: {reason}. Only timm's plain VisionTransformer can (one sequence of patches, "
            f"absolute positions, pre-norm blocks), such as {TIMM_PREFIX}vit_small_patch16_224 or "
            f"{TIMM_PREFIX}vit_small_patch14_dinov2."
        )
    config = model.pretrained_cfg
    if not as_begun:
        _require_native_activation(name, model)
    if weights is None:
        model = _download(name, config)
        source = config.get("hf_hub_id") or config.get("url") or "timm"
        loaded = LoadedWeights(f"timm pretrained: {source}", sha256_tensors(model.state_dict()))
    else:
        classifier = config.get("classifier") or "head"
        layout = Layout(ignore=(f"{classifier}.*", *_NOT_IN_TIMM), inside=("state_dict", "model"))
        loaded = load_weights(model, weights, [layout], ("argparse.Namespace",), f"Give {_in_timms_names(name)}.")
    if image_size is not None:
        at_image_size(model, name, image_size)
    return as_teacher(name, model, loaded, config["mean"], config["std"], device, precision)


def _create(name: str, pretrained: bool = False) -> nn.Module:
    wanted = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(wanted):
        close = difflib.get_close_matches(wanted.split(".")[0], timm.list_models("vit_*"), n=3)
        raise UnknownNameError(
            f"timm {timm.__version__} has no model named {wanted!r}."
            + (f" Did you mean {', '.join(TIMM_PREFIX + other for other in close)}?" if close else "")
            + " `timm.list_models('vit_*')` lists them."
        )
    try:
        return timm.create_model(wanted, pretrained=pretrained, num_classes=0)
    except RuntimeError as error:
        if pretrained or "tag" not in str(error):
            raise
        raise UnknownNameError(f"{name}: {error}") from error


def _require_native_activation(name: str, model: VisionTransformer) -> None:
    """Raise UsageError if timm's entry says that these weights were trained with QuickGELU and the model has another activation.

    timm notes it as "natively QuickGELU, use quickgelu model variant for original results", at both variants alike, and builds
    the plain one with GELU.
    """
    config, built = model.pretrained_cfg, activation_of(block.mlp for block in model.blocks)
    arch, tag = config["architecture"], config.get("tag") or ""
    full_name = f"{arch}.{tag}" if tag else arch
    noted = any("quickgelu" in note.lower() for note in config.get("notes") or ())
    if built == "quick_gelu" or not (noted or full_name in _QUICK_ELSEWHERE):
        return
    right = full_name.replace("_clip_", "_clip_quickgelu_", 1)
    there = right in (get_arch_pretrained_cfgs(right) if tag else timm.list_models())
    other = _QUICK_ELSEWHERE.get(full_name) or (f"{TIMM_PREFIX}{right}" if there else None)
    raise UsageError(
        f"{name}: the weights {tag or arch} were trained with QuickGELU, and this model of timm's has {built}."
        + (f" Ask for {other}." if other else " timm has no variant of it with QuickGELU.")
    )


def _in_timms_names(name: str) -> str:
    """Which file `--weights` takes for a name of timm, and how to make it."""
    wanted = name.removeprefix(TIMM_PREFIX)
    return (
        "a file with timm's own names, which on a machine with network this makes: python -c \"import timm, "
        f"safetensors.torch as s; s.save_file(timm.create_model('{wanted}', pretrained=True).state_dict(), "
        "'teacher.safetensors')\""
    )


def _download(name: str, config: dict) -> VisionTransformer:
    hub, address = config.get("hf_hub_id"), config.get("url")
    file = config.get("hf_hub_filename") or "model.safetensors"
    what = f"{file} of {hub} on the Hugging Face hub" if hub else f"the file of {address}"
    cached_at = Path(torch.hub.get_dir(), "checkpoints", Path(address).name) if address and not hub else None
    return downloaded(name, what, _in_timms_names(name), lambda: _create(name, pretrained=True), cached_at)
