"""timm's ViTs as teachers: any of them as `timm:NAME`, and those of our table that are built of them.

A ViT is here one flat sequence of [CLS, registers,] patches, absolute positions, rotary ones or both, and pre-norm blocks with
an attention that blocks/timm_kinds.py knows. Everything else is refused by what it is, not by its name.
"""

from __future__ import annotations

import difflib
import os
from functools import partial
from pathlib import Path

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import UnknownNameError, UsageError
from ..format.spec import TeacherSpec
from . import TIMM_PREFIX, TeacherEntry
from .base import RESIZE, Anatomy, Teacher, activation_of, check_precision, grid_for
from .blocks import timm_kinds
from .blocks.positions import OURS, PositionRule, as_begun, in_words, of_family
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


def position_rule(model: VisionTransformer | Eva) -> PositionRule:
    """How the family of this model of timm's resizes its table."""
    return of_family(model.pretrained_cfg["architecture"])


def at_image_size(model: VisionTransformer | Eva, name: str, image_size: int, rule: PositionRule = OURS) -> None:
    """Change the model's input size in place: its position table and its rotation by `rule` (timm's table is antialiased)."""
    if rule.counts_patches:
        model.rope.ref_feat_shape = None
    grid = grid_for(name, image_size, model.patch_embed.patch_size[0])
    if grid == model.patch_embed.grid_size:
        return
    model.patch_embed.set_input_size(image_size)
    if model.pos_embed is not None:
        n_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        model.pos_embed = nn.Parameter(rule.resize(model.pos_embed.detach(), n_prefix, grid))
    if getattr(model, "rope", None) is not None:
        model.rope.update_feat_shape(list(grid))


def as_teacher(
    name: str,
    model: VisionTransformer | Eva,
    loaded: LoadedWeights,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: str,
    precision: str,
    projection: Tensor | None = None,
    rule: PositionRule = OURS,
) -> Teacher:
    """A filled ViT, at the image size it stands at, described and frozen.

    projection: [D, E] behind the final norm, where there is one
    rule:       by which its position table was brought to that size
    """
    has_cls = model.cls_token is not None
    norm = timm_kinds.final_norm(model)
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
        has_cls=has_cls,
        n_registers=model.num_prefix_tokens - int(has_cls),
        mean=tuple(mean),
        std=tuple(std),
        norm_eps=timm_kinds.norm_eps(model),
        projection_dim=None if projection is None else projection.shape[1],
        resize=RESIZE,
        activation=activation_of(block.mlp for block in model.blocks),
        positions=in_words(rule, model.pos_embed is not None, timm_kinds.rotation_in_words(model)),
        attention_source=timm_kinds.attention_source(model),
        head="none" if norm is None else "layernorm",
    )
    parts_of, pool = partial(timm_kinds.attention_parts, model.num_prefix_tokens), partial(timm_kinds.pool_attention, model)
    anatomy = Anatomy(model, model.forward_features, model.blocks, norm, parts_of, projection, pool)
    return Teacher(spec, anatomy, device, precision, loaded.ignored, loaded.how)


def load_timm(
    name: str,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    begun: TeacherSpec | None = None,
) -> Teacher:
    """The teacher `timm:NAME`; see `load_teacher`.

    mean and std are those of timm's configuration of NAME, whose note on the activation has to be true of the model too. A
    weights file must hold exactly timm's names (wrapped or not: file_parts.py); only the classifier and DINOv2's mask token and
    heads are left out, and named in `ignored_weights`. Without `weights`, timm downloads its own; their sha256 is then that of
    the tensors, because timm may rename them on the way from the file. Raises UsageError for another activation than theirs.
    """
    check_precision(precision, device)
    with torch.device("meta"):  # what it is shows without its numbers, of which there may be billions
        reason = timm_kinds.why_not(_create(name))
    if reason:
        raise UsageError(f"{name} cannot be a teacher: {reason}. {_instead(name)}")
    model = _create(name)
    config = model.pretrained_cfg
    if begun is None or begun.activation is not None:
        _require_native_activation(name, model)
    if weights is None:
        model = _download(name, config)
        source = config.get("hf_hub_id") or config.get("url") or "timm"
        loaded = LoadedWeights(f"timm pretrained: {source}", sha256_tensors(model.state_dict()))
    else:
        classifier = config.get("classifier") or "head"
        layout = Layout(ignore=(f"{classifier}.*", *_NOT_IN_TIMM), inside=("state_dict", "model"))
        loaded = load_weights(model, weights, [layout], ("argparse.Namespace",), _expected(name))
    rule = as_begun(position_rule(model), begun)
    if image_size is not None or rule.counts_patches:
        at_image_size(model, name, image_size or model.patch_embed.img_size[0], rule)
    return as_teacher(name, model, loaded, config["mean"], config["std"], device, precision, rule=rule)


def _instead(name: str) -> str:
    """What to ask for where a name of timm's cannot be a teacher."""
    if near := timm_kinds.nearest(name.removeprefix(TIMM_PREFIX)):
        return f"The nearest that can: {' or '.join(TIMM_PREFIX + other for other in near)}."
    return (
        "timm's ViTs can that are one sequence of patches through pre-norm blocks, such as "
        f"{TIMM_PREFIX}vit_small_patch16_224, {TIMM_PREFIX}vit_small_patch14_dinov2 or {TIMM_PREFIX}vit_small_patch16_dinov3."
    )


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


def _expected(name: str) -> str:
    """Which file to give; and for which other name it would be, if biases of queries and values are all that differs."""
    arch, dot, tag = name.removeprefix(TIMM_PREFIX).partition(".")
    other, has = (arch.removesuffix("_qkvb"), "no") if arch.endswith("_qkvb") else (f"{arch}_qkvb", "")
    known = f"A file with {has} biases of queries and values is {TIMM_PREFIX}{other}{dot}{tag}'s. ".replace("  ", " ")
    return (known if timm.is_model(other) else "") + f"Give {_in_timms_names(name)}."


def _download(name: str, config: dict) -> VisionTransformer:
    hub, address = config.get("hf_hub_id"), config.get("url")
    file = config.get("hf_hub_filename") or "model.safetensors"
    what = f"{file} of {hub} on the Hugging Face hub" if hub else f"the file of {address}"
    cached_at = Path(torch.hub.get_dir(), "checkpoints", Path(address).name) if address and not hub else None
    return downloaded(name, what, _in_timms_names(name), lambda: _create(name, pretrained=True), cached_at)
