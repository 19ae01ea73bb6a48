"""Names and shapes of an encoder's weights in other libraries, and back.

    timm    its own VisionTransformer and SwinTransformer: our encoders are subclasses of these, so the names are the same
    torch   of a ViT MAE's, which are timm's; of MCMAE's encoder those of its authors, see modules/backbones/mcmae.py
    hf      transformers' ViTModel: queries, keys and values apart

Left out everywhere is what only pre-training uses: mask tokens and the convolutions that add early stages to the last.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from ..config import BackboneConfig, MCMAEConfig, SwinConfig, ViTConfig
from ..errors import ConfigError, RunError

FORMATS = {ViTConfig: ("timm", "hf", "torch"), SwinConfig: ("timm",), MCMAEConfig: ("torch",)}
"""Of each kind of encoder, the formats that have such a network."""
PRE_TRAINING_ONLY = ("mask_token", "fuse.")
"""How the names of weights begin that evaluation does not use."""
LAYER_SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")
BEFORE_SCALE = {"1": "attn.proj", "2": "mlp.fc2"}
"""The layer whose output each layer scale multiplies."""

_MCMAE = (("patch_embed4.", "project."), ("blocks1.", "stages.0."), ("blocks2.", "stages.1."), ("blocks3.", "blocks."),
          ("patch_embed1.", "embeds.0."), ("patch_embed2.", "embeds.1."), ("patch_embed3.", "embeds.2."))  # fmt: skip
"""Beginnings of names (MCMAE models_convmae.py, here)."""
_MCMAE_DEPTHWISE = re.compile(r"((?:blocks[12]|stages\.[01])\.\d+\.)(attn|depthwise)\.")

_HF = (("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
       ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("layernorm.", "norm."))  # fmt: skip
_HF_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_HF_IN_LAYER = {
    "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
}  # fmt: skip
_HF_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_OURS_LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def require_format(config: BackboneConfig, layout: str) -> None:
    """ConfigError, naming what works, if `layout` has no such network."""
    known = sorted({name for names in FORMATS.values() for name in names})
    if layout not in known:
        raise ConfigError(f"There is no format {layout!r}; there are {', '.join(known)}.")
    fitting = FORMATS[type(config)]
    if layout not in fitting:
        raise ConfigError(
            f"The format {layout} has no network like this student's ({config.kind}). A {config.kind} can be exported as "
            f"{' or '.join(fitting)}: --format {fitting[0]}."
        )


def exported(config: BackboneConfig, tensors: dict[str, Tensor], layout: str) -> tuple[BackboneConfig, dict[str, Tensor]]:
    """What a file in `layout` holds of an encoder with these weights (names of `state_dict()`), and the encoder it describes.

    That encoder differs from `config` in what pre-training alone uses, and where the layout has no layer scale: there it is
    multiplied into the layer before it, in float64. Raises ConfigError where the layout has no such network.
    """
    require_format(config, layout)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(PRE_TRAINING_ONLY)}
    if isinstance(config, ViTConfig):
        config = replace(config, hidden="dropped", fuse_blocks=(), drop_path=0.0)
        if layout != "timm":
            config, tensors = replace(config, layer_scale=None), without_layer_scale(tensors)
    elif isinstance(config, MCMAEConfig):
        config = replace(config, fuse_stages=False, drop_path=0.0)
    else:
        config = replace(config, drop_path=0.0)
    if layout == "hf":
        tensors = to_hf(tensors)
    elif isinstance(config, MCMAEConfig):
        tensors = to_mcmae(tensors)
    return config, {name: tensor.detach().cpu().float().contiguous() for name, tensor in sorted(tensors.items())}


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of our encoders; which layout they are in, their names say.

    What has no counterpart keeps its name. Raises RunError for a layer of transformers without all of query, key and value.
    """
    if any(name.startswith(("embeddings.", "vit.embeddings.")) for name in tensors):
        return from_hf({name.removeprefix("vit."): tensor for name, tensor in tensors.items()})
    if any(name.startswith("patch_embed4.") for name in tensors):
        return from_mcmae(tensors)
    return dict(tensors)


def without_layer_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function without layer scale: gamma * (W x + b) = (gamma W) x + gamma b."""
    gammas = {match: tensors[match[0]].double() for name in tensors if (match := LAYER_SCALE.fullmatch(name))}
    folded = {name: tensor for name, tensor in tensors.items() if not LAYER_SCALE.fullmatch(name)}
    for match, gamma in gammas.items():
        layer = match[1] + BEFORE_SCALE[match[2]]
        folded[f"{layer}.weight"] = (gamma[:, None] * tensors[f"{layer}.weight"].double()).float()
        folded[f"{layer}.bias"] = (gamma * tensors[f"{layer}.bias"].double()).float()
    return folded


def to_mcmae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as MCMAE's code has them; its position table has no row for CLS, and ours there is zero."""
    renamed = {}
    for name, tensor in tensors.items():
        name = _MCMAE_DEPTHWISE.sub(r"\1attn.", name)
        renamed[_begin(name, [(here, there) for there, here in _MCMAE])] = tensor
    if renamed["pos_embed"][:, 0].any():
        raise RunError("The position of CLS is not zero, and MCMAE's layout has no place for it.")
    return renamed | {"pos_embed": renamed["pos_embed"][:, 1:]}


def from_mcmae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `to_mcmae` was given; of a file of MCMAE's authors, which may have no CLS token."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(("blocks1.", "blocks2.")):
            name = _MCMAE_DEPTHWISE.sub(r"\1depthwise.", name)
        for stage in ("1", "2"):
            name = name.replace(f"stage{stage}_output_decode.", f"fuse.{int(stage) - 1}.")
        renamed[_begin(name, _MCMAE)] = tensor
    if "pos_embed" in renamed:
        table = renamed["pos_embed"]
        renamed["pos_embed"] = torch.cat([table.new_zeros(1, 1, table.shape[-1]), table], dim=1)
    return renamed


def to_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as transformers' ViTModel has them."""
    in_layer = {here: there for there, here in _HF_IN_LAYER.items()}
    renamed = {}
    for name, tensor in tensors.items():
        match = _OURS_LAYER.fullmatch(name)
        if match and match[2] == "attn.qkv":
            for there, third in zip(_HF_QKV, tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{match[1]}.{there}.{match[3]}"] = third
        elif match:
            renamed[f"encoder.layer.{match[1]}.{in_layer[match[2]]}.{match[3]}"] = tensor
        else:
            renamed[_begin(name, [(here, there) for there, here in _HF])] = tensor
    return renamed


def from_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as our ViT has them. RunError for a layer without all of query, key and value."""
    renamed = {}
    for name, tensor in tensors.items():
        match = _HF_LAYER.fullmatch(name)
        if match and match[2] in _HF_QKV:
            thirds = [tensors.get(f"encoder.layer.{match[1]}.{part}.{match[3]}") for part in _HF_QKV]
            if any(third is None for third in thirds):
                raise RunError(f"Block {match[1]} has {name}, but not all of query, key and value.")
            renamed[f"blocks.{match[1]}.attn.qkv.{match[3]}"] = torch.cat(thirds)
        elif match and match[2] in _HF_IN_LAYER:
            renamed[f"blocks.{match[1]}.{_HF_IN_LAYER[match[2]]}.{match[3]}"] = tensor
        else:
            renamed[_begin(name, _HF)] = tensor
    return renamed


def _begin(name: str, pairs) -> str:
    """`name` with the beginning of the first pair that fits replaced."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
