"""An encoder that begins from weights that are there: published ones, a model of timm, an export, another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from teacher_cache.files.durable import sha256_file

from ..config import BackboneConfig
from ..errors import ConfigError, RunError, RunMismatchError
from ..files.begun import recorded_init
from ..files.checkpoint import latest_checkpoint, load_backbone, recorded_description
from .layouts import LAYER_SCALE, ours, without_layer_scale
from .record import sha256_tensors
from .weight_files import HF_CONFIG, HF_WEIGHTS, read_weights

TIMM = "timm:"
MOST_NAMES = 50
"""Names on record of what does not fit, of each kind."""


@dataclass(frozen=True)
class Source:
    """Weights to begin from, under the names of our encoders."""

    name: str
    """As records and messages have it: timm:NAME, or the last part of a path."""
    tensors: dict[str, Tensor]
    heads: int | tuple[int, ...] | None
    """Of its attention; None where nothing tells."""
    sha256: str
    """Of the file; of the tensors for timm:NAME."""


def begin(what: str | None, backbone: nn.Module, config: BackboneConfig, out_dir: Path) -> tuple[dict, list[str]]:
    """Fill `backbone` with the weights `what` names, unless the run in `out_dir` is past that; its record, and lines to say.

    what: a file or folder as `read_weights` takes it, a run, a checkpoint, or timm:NAME; None: none are asked for.
    The record goes into the run; it is empty where the encoder begins from random weights, and that of the run where one is.
    Raises RunMismatchError if the run was begun from something else, RunError if the weights cannot be read, are of another shape
    or fit nowhere, ConfigError if the run was begun from weights that are needed again and not given.
    """
    begun = recorded_init(out_dir)
    if begun is None:
        return ({}, []) if what is None else _fill(backbone, config, read_source(what))
    recorded, has_checkpoint = begun
    origin = recorded.get("from")
    if what is not None and name_of(what) != origin:
        was = f"from {origin}" if origin else "from random weights"
        raise RunMismatchError(
            f"{out_dir} was begun {was}, not from {name_of(what)}. Leave out --init, or start a new run in another directory."
        )
    if has_checkpoint or origin is None:
        return recorded, []
    if what is None:
        raise ConfigError(f"{out_dir} was begun from {origin} and has no checkpoint yet: give --init with it again.")
    source = read_source(what)
    if source.sha256 != recorded.get("sha256"):
        raise RunMismatchError(
            f"{what} is not what {out_dir} was begun from: sha256 {source.sha256[:12]}, in the run "
            f"{str(recorded.get('sha256'))[:12]}. Give the same weights, or start a new run in another directory."
        )
    return _fill(backbone, config, source)


def name_of(what: str) -> str:
    """What records call it."""
    return what if what.startswith(TIMM) else Path(what).resolve().name


def read_source(what: str) -> Source:
    """The weights that `what` names. Raises RunError if they cannot be had."""
    if what.startswith(TIMM):
        return _of_timm(what)
    path = Path(what)
    is_hf = (path / HF_CONFIG).is_file() and (path / HF_WEIGHTS).is_file()
    checkpoint = latest_checkpoint(path) if path.is_dir() else path
    if path.is_dir() and checkpoint is None and not is_hf:
        raise RunError(
            f"{path} holds no checkpoint of a run and no model of transformers. Give one of these, or a file of weights."
        )
    if not is_hf and recorded_description(checkpoint) is not None:
        backbone, config = load_backbone(checkpoint)
        return Source(name_of(what), backbone.state_dict(), config.backbone.heads, sha256_file(checkpoint))
    found = read_weights(path)
    return Source(name_of(what), ours(found.tensors), found.heads, sha256_file(found.path))


def _of_timm(what: str) -> Source:
    name = what.removeprefix(TIMM)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # no such name, no weights under it, no network: each with errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"{what}: timm gives no such weights ({reason}). Give a file of them: --init FILE.") from error
    if type(model) is VisionTransformer:
        heads = model.blocks[0].attn.num_heads
    elif type(model) is SwinTransformer:
        heads = tuple(stage.blocks[0].attn.num_heads for stage in model.layers)
    else:
        raise RunError(f"{what} is a {type(model).__name__}. A student can begin from a VisionTransformer or SwinTransformer.")
    tensors = model.state_dict()
    return Source(what, tensors, heads, sha256_tensors(tensors))


def _fill(backbone: nn.Module, config: BackboneConfig, source: Source) -> tuple[dict, list[str]]:
    own, found, notes = backbone.state_dict(), dict(source.tensors), []
    if any(map(LAYER_SCALE.fullmatch, found)) and not any(map(LAYER_SCALE.fullmatch, own)):
        found = without_layer_scale(found)
        notes.append("its layer scale is multiplied into the layers before it: this student has none")
    fitting = {name: tensor for name, tensor in found.items() if name in own}
    if not fitting:
        names = ", ".join(sorted(found)[:3])
        raise RunError(
            f"{source.name} holds none of the {len(own)} weights of this encoder ({config.kind}): its names are {names} ... Give "
            "weights of MAE, timm, transformers' ViT, MCMAE, or of a student."
        )
    odd = {name: tensor for name, tensor in fitting.items() if tensor.shape != own[name].shape}
    if odd:
        first = min(odd)
        raise RunError(
            f"{source.name} does not fit this encoder in {len(odd)} of its weights: {first} is {list(odd[first].shape)} there, "
            f"{list(own[first].shape)} here. Take a preset of its size, or --set backbone.KEY=VALUE (--show lists them)."
        )
    if source.heads is not None and source.heads != config.heads:
        raise RunError(
            f"{source.name} was trained with {source.heads} heads, this encoder has {config.heads}: the weights would mean "
            f"nothing. --set backbone.heads={_set_text(source.heads)} takes as many."
        )
    if bad := [name for name, tensor in fitting.items() if not tensor.isfinite().all()]:
        raise RunError(f"{source.name} has values in {bad[0]} that are not finite. Get it again.")
    if "pos_embed" in fitting and not torch.allclose(fitting["pos_embed"].float(), own["pos_embed"], atol=1e-5):
        notes.append("its position table is taken, which is not the fixed one that this student would have")
    backbone.load_state_dict({name: tensor.float() for name, tensor in fitting.items()}, strict=False)
    new, left_out = sorted(own.keys() - fitting.keys()), sorted(found.keys() - fitting.keys())
    record = {"from": source.name, "sha256": source.sha256, "n_fitted": len(fitting), "n_weights": len(own),
              "new": new[:MOST_NAMES], "left_out": left_out[:MOST_NAMES], "notes": notes}  # fmt: skip
    lines = [f"{len(fitting)} of {len(own)} weights of the encoder are those of {source.name}, sha256 {source.sha256[:12]}"]
    lines += [f"not in it: {_listed(new)}"] * bool(new) + [f"in it and left out: {_listed(left_out)}"] * bool(left_out)
    return record, lines + notes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _set_text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
