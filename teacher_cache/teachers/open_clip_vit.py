"""open_clip's ViT image towers as teachers: any plain one as `open_clip:ARCH/TAG`, those that are a ViT of timm's (SigLIP, PE,
EVA02), and those of our table that are built of them.

ARCH is one of open_clip's configurations and TAG one of its published weights, which also say mean, std and
activation. A state dict does not say the activation, and open_clip itself only warns where tag and configuration
differ in it; here that is an error. The files are read by our own reader, strictly.

Gives up: ResNets, attentional pooling of open_clip's own, blocks with norms inside the attention; of timm's towers the
projection, which stands behind their pooling.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transformer import VisionTransformer
from torch import nn

from ..errors import UnknownNameError, UsageError
from ..format.spec import TeacherSpec
from . import OPEN_CLIP_PREFIX, timm_vit
from .base import RESIZE, Anatomy, Teacher, activation_of, check_precision, grid_for
from .blocks import timm_kinds
from .blocks.attention import AttentionParts
from .blocks.positions import OURS, as_begun
from .weights.load import Layout, LoadedWeights, load_weights
from .weights.offline import downloaded

_OTHER_PARTS = (
    "transformer.*", "token_embedding.*", "positional_embedding", "ln_final.*", "text_projection",  # CLIP's text tower
    "text.*", "text_decoder.*",  # the text towers of other configurations
    "logit_scale", "logit_bias",  # of the contrastive loss
    "input_resolution", "context_length", "vocab_size",  # _OPENAI_INTEGERS
)  # fmt: skip
_OPENAI_INTEGERS = {"input_resolution", "context_length", "vocab_size"}
"""Beside the towers in OpenAI's archives, also where one was saved as a state dict; in nobody else's files."""
_OPENAI_TAG = "openai"
_OPENAI_IN_THE_TABLE = {"ViT-B-16": "clip-b16", "ViT-L-14": "clip-l14"}
"""open_clip's architecture -> our own name of OpenAI's weights for it."""
_CUSTOM_BLOCK = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
LAYOUTS = (
    Layout(keep=(("visual.", ""),), ignore=_OTHER_PARTS, inside=("state_dict",)),
    Layout(  # a checkpoint of open_clip's trainer
        keep=(("module.visual.", ""),), ignore=tuple(f"module.{name}" for name in _OTHER_PARTS), inside=("state_dict",)
    ),
)

TRUNK_LAYOUTS = (
    Layout(keep=(("visual.trunk.", ""),), ignore=("visual.head.*", "visual.trunk.head.*", *_OTHER_PARTS), inside=("state_dict",)),
    Layout(ignore=("head.*",)),  # timm's own names
)
"""Of towers that are a model of timm's."""


def attention_parts(block: nn.Module) -> AttentionParts:
    """Of one of open_clip's residual blocks."""
    attention, same = block.attn, nn.Identity()
    (query, key, _), (query_bias, key_bias, _) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    return AttentionParts(block.ln_1, query, query_bias, key, key_bias, attention.num_heads, same, same, n_prefix=1)


def as_teacher(
    name: str,
    tower: VisionTransformer,
    loaded: LoadedWeights,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: str,
    precision: str,
) -> Teacher:
    """A filled plain tower, at the image size it was built for, described and frozen."""
    block = tower.transformer.resblocks[-1]
    spec = TeacherSpec(
        name=name,
        weights=loaded.source,
        weights_sha256=loaded.sha256,
        image_size=tower.image_size[0],
        patch_size=tower.patch_size[0],
        grid=tuple(tower.grid_size),
        dim=block.attn.embed_dim,
        depth=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        has_cls=True,
        n_registers=0,
        mean=tuple(mean),
        std=tuple(std),
        norm_eps=tower.ln_post.eps,
        projection_dim=tower.proj.shape[1],
        resize=RESIZE,
        activation=activation_of(block.mlp for block in tower.transformer.resblocks),
        positions=OURS.words,
        attention_source="cls",
        head="layernorm",
    )
    anatomy = Anatomy(tower, tower, tower.transformer.resblocks, tower.ln_post, attention_parts, projection=tower.proj)
    return Teacher(spec, anatomy, device, precision, loaded.ignored, loaded.how)


def at_image_size(tower: VisionTransformer, name: str, image_size: int) -> None:
    """Change the tower's input size in place, its position table by our own rule (open_clip's is antialiased)."""
    grid = grid_for(name, image_size, tower.patch_size[0])
    if grid != tower.grid_size:
        tower.image_size, tower.grid_size = (image_size, image_size), grid
        tower.positional_embedding = nn.Parameter(OURS.resize(tower.positional_embedding.detach(), 1, grid))


def why_not_plain(vision: CLIPVisionCfg) -> str | None:
    """What about a tower of this configuration the taps and the attention do not allow for, or None."""
    if not isinstance(vision.layers, int):
        return "its image tower is a ResNet"
    if vision.attentional_pool:
        return "it pools by attention, and its last norm stands behind that"
    if vision.pool_type != "tok":
        return f"its embedding is the {vision.pool_type} of its patches, so that its CLS token was never trained"
    if vision.block_type not in (None, "default") or any(getattr(vision, name) for name in _CUSTOM_BLOCK):
        return "its blocks have norms or scales inside the attention"
    if not (isinstance(vision.image_size, int) and isinstance(vision.patch_size, int)):
        return f"its input is no square ({vision.image_size} pixels in patches of {vision.patch_size})"
    return None


def load_open_clip(
    name: str,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    begun: TeacherSpec | None = None,
) -> Teacher:
    """The teacher `open_clip:ARCH/TAG`; see `load_teacher`.

    With `weights`, the tag may be left out: mean and std are then OpenAI's, which open_clip trains with by default. Without
    `weights`, open_clip downloads the tag's file. The file does not tell heads or activation: those are ARCH's.
    """
    check_precision(precision, device)
    arch, _, tag = name.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    config, published = _config_of(name, arch, tag)
    vision = CLIPVisionCfg(**config["vision_cfg"])
    if vision.timm_model_name:
        return _load_trunk(name, arch, tag, vision, published, weights, image_size, device, precision, begun)
    if reason := why_not_plain(vision):
        raise UsageError(
            f"{name} cannot be a teacher: {reason}. Only open_clip's plain ViTs can, such as {OPEN_CLIP_PREFIX}"
            "ViT-B-16/laion2b_s34b_b88k."
        )

    tower = _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))
    loaded = _fill(tower, name, arch, tag, published, weights, LAYOUTS)
    if begun is None or begun.activation is not None:
        _require_not_openais(name, arch, tag, weights, loaded)
    at_image_size(tower, name, image_size or vision.image_size)
    mean, std = published.get("mean", open_clip.OPENAI_DATASET_MEAN), published.get("std", open_clip.OPENAI_DATASET_STD)
    return as_teacher(name, tower, loaded, mean, std, device, precision)


def _load_trunk(
    name: str,
    arch: str,
    tag: str,
    vision: CLIPVisionCfg,
    published: dict,
    weights: str | os.PathLike | None,
    image_size: int | None,
    device: str,
    precision: str,
    begun: TeacherSpec | None,
) -> Teacher:
    """The teacher of an architecture whose image tower is a model of timm's, without what open_clip puts behind its pooling.

    Where no tag is given, mean and std are those of all tags of the architecture, if these agree.
    """

    def trunk() -> nn.Module:
        pool = {"global_pool": vision.timm_pool} if vision.timm_pool else {}
        return timm.create_model(vision.timm_model_name, num_classes=0, **pool)

    with torch.device("meta"):
        reason = timm_kinds.why_not(trunk())
    if reason:
        raise UsageError(
            f"{name} cannot be a teacher: its image tower is timm's {vision.timm_model_name}, and {reason}. Towers that can: "
            f"{OPEN_CLIP_PREFIX}ViT-B-16/laion2b_s34b_b88k, {OPEN_CLIP_PREFIX}ViT-B-16-SigLIP2/webli."
        )
    model = trunk()
    loaded = _fill(model, name, arch, tag, published, weights, TRUNK_LAYOUTS)
    rule = as_begun(timm_vit.position_rule(model), begun)
    timm_vit.at_image_size(model, name, image_size or vision.image_size, rule)
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(arch)
    known = [open_clip.get_pretrained_cfg(arch, each) for each in tags]
    means = {(tuple(each["mean"]), tuple(each["std"])) for each in known if "mean" in each and "std" in each}
    mean, std = means.pop() if len(means) == 1 else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return timm_vit.as_teacher(name, model, loaded, mean, std, device, precision, rule=rule)


def _fill(
    tower: nn.Module,
    name: str,
    arch: str,
    tag: str,
    published: dict,
    weights: str | os.PathLike | None,
    layouts: Sequence[Layout],
) -> LoadedWeights:
    """Fill a tower from `weights`, or from the tag's file where there are none."""
    if weights is None:
        path, source = _download(name, tag, published)
        return dataclasses.replace(load_weights(tower, path, layouts), source=f"open_clip pretrained: {source}")
    source = published.get("hf_hub", "").rstrip("/") or published.get("url", "")
    of_tag = f", such as the file of {source}" if source else ""
    return load_weights(
        tower, weights, layouts, expected=f"Give a file with the names that open_clip gives to its {arch}{of_tag}."
    )


def _config_of(name: str, arch: str, tag: str) -> tuple[dict, dict]:
    """open_clip's configuration of ARCH and its entry for TAG (empty without a tag), which have to agree."""
    known = open_clip.list_models()
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=3)
        raise UnknownNameError(
            f"open_clip {open_clip.__version__} has no architecture named {arch!r}."
            + (f" Did you mean {', '.join(close)}?" if close else "")
            + f" Ask for {OPEN_CLIP_PREFIX}ARCH/TAG; `open_clip.list_pretrained()` lists the pairs."
        )
    config, published = open_clip.get_model_config(arch), open_clip.get_pretrained_cfg(arch, tag)
    if tag and not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise UnknownNameError(f"{name}: open_clip has no weights of {arch} tagged {tag!r}. Its tags: {tags}.")
    quick = config.get("quick_gelu", False)
    if tag and quick != published.get("quick_gelu", False):
        other = arch.removesuffix("-quickgelu") if quick else f"{arch}-quickgelu"
        is_there = other != arch and open_clip.get_pretrained_cfg(other, tag)
        raise UsageError(
            f"{name}: the weights {tag} were trained with {'GELU' if quick else 'QuickGELU'}, and the architecture {arch} has "
            f"{'QuickGELU' if quick else 'GELU'}."
            + (f" Ask for {OPEN_CLIP_PREFIX}{other}/{tag}." if is_there else " open_clip has no architecture with theirs; where "
               f"you know better, {OPEN_CLIP_PREFIX}{arch} --weights PATH runs their file with the architecture's own.")
        )  # fmt: skip
    return config, published


def _require_not_openais(name: str, arch: str, tag: str, weights: str | os.PathLike | None, loaded: LoadedWeights) -> None:
    """Raise UsageError if a file is OpenAI's, whose activation is QuickGELU, and the name is not that of OpenAI's weights."""
    is_openais = {name_in_file.rpartition(".")[2] for name_in_file in loaded.ignored} >= _OPENAI_INTEGERS
    family = arch.removesuffix("-quickgelu")
    quick = open_clip.get_model_config(arch).get("quick_gelu", False)
    if not is_openais or (quick and tag in ("", _OPENAI_TAG)):
        return
    right = [_OPENAI_IN_THE_TABLE[family]] if family in _OPENAI_IN_THE_TABLE else []
    if open_clip.get_pretrained_cfg(f"{family}-quickgelu", _OPENAI_TAG):
        right.append(f"{OPEN_CLIP_PREFIX}{family}-quickgelu/{_OPENAI_TAG}")
    raise UsageError(
        f"--weights {weights}: this is OpenAI's file ({', '.join(sorted(_OPENAI_INTEGERS))} are in it), trained with QuickGELU; "
        f"{name} is {f'the weights {tag}' if tag else 'a tower'} with {'QuickGELU' if quick else 'GELU'}. "
        + (f"Ask for {' or '.join(right)}." if right else "open_clip has no architecture with QuickGELU for it.")
    )


def _download(name: str, tag: str, published: dict) -> tuple[str, str]:
    """The tag's file on this machine, and where it came from."""
    if not tag:
        raise UsageError(f"{name} names no weights: ask for {name}/TAG, or add --weights PATH (or random:0, for a trial).")
    hub, address = published.get("hf_hub", "").rstrip("/"), published.get("url", "")
    source = hub or address
    what, advice = f"the file of {source}", "any with the names that open_clip gives to this architecture"
    cached_at = None if hub else Path("~/.cache/clip").expanduser() / Path(address).name
    return downloaded(name, what, advice, lambda: open_clip.download_pretrained(published), cached_at), source
