"""A weights file in somebody else's names, read as one in the names of the model that is filled (schemes.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .parts import MOST_DEPTH
from .schemes import SCHEMES, Scheme

_PROJECTION = "visual_projection.weight"
"""Hugging Face's name of CLIP's projection, which stands beside the tower."""
_OPEN_CLIP = (
    ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), (_PROJECTION, "proj"),
    (r"patch_embed\.proj\.weight", "conv1.weight"), (r"norm_pre\.(.+)", r"ln_pre.\1"), (r"norm\.(.+)", r"ln_post.\1"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.+)", r"transformer.resblocks.\1.attn.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"blocks\.(\d+)\.norm([12])\.(.+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
)  # fmt: skip
"""timm's names -> open_clip's, of CLIP's image tower."""


@dataclass(frozen=True)
class Reading:
    """A file as `in_own_names` read it."""

    found: dict
    title: str = ""
    """Whose names it had; empty where it was left as it is."""
    ignore: tuple[str, ...] = ()
    """Further names that belong to no ViT, as shell patterns."""


def in_own_names(found: dict, own: dict[str, Tensor]) -> Reading:
    """The file with all dictionaries that a scheme knows renamed to the names of the model with the state dict `own`.

    The numbers are those of the file, except: queries, keys and values are joined to one matrix, DINOv3's masked key bias is left
    out, and where registers and CLS have no place in the model's table the CLS row of the file's is added to the CLS token.
    """
    used: list[Scheme] = []
    found = _read(found, own, used, set(), 0)
    ignored = dict.fromkeys(pattern for scheme in used for pattern in _ignored(scheme, own))
    return Reading(found, " and ".join(dict.fromkeys(scheme.title for scheme in used)), tuple(ignored))


def _read(found: dict, own: dict[str, Tensor], used: list[Scheme], seen: set[int], depth: int) -> dict:
    """A dictionary, and those within it, with the names renamed; itself where there are none to rename."""
    seen.add(id(found))
    for name, inner in dict.items(found):
        if isinstance(inner, dict) and depth < MOST_DEPTH and id(inner) not in seen:
            renamed = _read(inner, own, used, seen, depth + 1)
            found = found if renamed is inner else {**found, name: renamed}
    for scheme in SCHEMES:
        if prefixes := list(scheme.prefixes(set(map(str, dict.keys(found))))):
            used.append(scheme)
            for prefix in prefixes:
                found = _renamed(found, prefix, scheme, own)
            break
    return found


def _ignored(scheme: Scheme, own: dict[str, Tensor]) -> tuple[str, ...]:
    """What of a file of this scheme the model has no place for by its kind: heads that it was built without."""
    heads = () if any(name.startswith("attn_pool.") for name in own) else ("attn_pool.*",)
    return scheme.ignore + heads + (() if "proj" in own else (_PROJECTION,))


def _renamed(found: dict, prefix: str, scheme: Scheme, own: dict[str, Tensor]) -> dict:
    """The dictionary with the names behind `prefix` as the model has them, behind the same prefix."""
    names = {name: name.removeprefix(prefix) for name in map(str, dict.keys(found)) if name.startswith(prefix)}
    if scheme.within and prefix.endswith(scheme.within):
        prefix = prefix.removesuffix(scheme.within)
        names |= {prefix + beside: beside for beside in (_PROJECTION,) if prefix + beside in found}
    tensors = {rest: found[name] for name, rest in names.items() if isinstance(found.get(name), Tensor)}
    others = {name: value for name, value in dict.items(found) if names.get(str(name)) not in tensors}

    state = {scheme.renamed(name): tensor for name, tensor in tensors.items()}
    back = {scheme.renamed(name): name for name in tensors}
    state = _fold_cls_position(_with_own_bias(_joined(scheme.mend(state), back), own), own)
    if "conv1.weight" in own:
        state = {f"visual.{name}": tensor for name, tensor in _as_open_clip(state).items()}
    return {**others, **{prefix + name: tensor for name, tensor in state.items()}}


def _joined(state: dict[str, Tensor], back: dict[str, str]) -> dict[str, Tensor]:
    """Queries, keys and values of one block in one tensor; where one is missing, all under their names in the file."""
    joined = {name: tensor for name, tensor in state.items() if "|" not in name}
    for whole in dict.fromkeys(name.partition("|")[0] for name in state if "|" in name):
        parts = {slot: state[f"{whole}|{slot}"] for slot in range(3) if f"{whole}|{slot}" in state}
        if len(parts) == 3:
            joined[whole] = torch.cat([parts[slot] for slot in range(3)])
        else:
            joined |= {back.get(f"{whole}|{slot}", f"{whole}|{slot}"): tensor for slot, tensor in parts.items()}
    return joined


def _with_own_bias(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bias of queries, keys and values as an Eva has it: q_bias and v_bias, or none where those of the file are all zero."""
    biases = [name for name in state if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name)]
    if not biases or any(name in own for name in biases):
        return state
    without = {name: tensor for name, tensor in state.items() if name not in biases}
    if not any(name.endswith("attn.q_bias") for name in own):
        return state if any(state[name].any() for name in biases) else without
    for name in biases:
        query, key, value = state[name].chunk(3)
        if key.any():
            return state
        start = name.removesuffix("qkv.bias")
        without |= {f"{start}q_bias": query, f"{start}v_bias": value}
    return without


def _fold_cls_position(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """For a model whose table has no row for CLS: the file's row is added to the CLS token, as every forward pass would."""
    table, n_own = state.get("pos_embed"), len(own["pos_embed"][0]) if "pos_embed" in own else 0
    folds = "reg_token" in own and _is_square(n_own) and table is not None and table.ndim == 3 and "cls_token" in state
    if not folds or not _is_square(table.shape[1] - 1):
        return state
    return {**state, "cls_token": state["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}


def _is_square(n: int) -> bool:
    return n > 0 and round(n**0.5) ** 2 == n


def _as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a CLIP tower as open_clip's, whose CLS token and table have no batch axis."""
    renamed = {}
    for name, tensor in state.items():
        match = next(((match, own) for pattern, own in _OPEN_CLIP if (match := re.fullmatch(pattern, name))), None)
        own_name = match[0].expand(match[1]) if match else name
        shape = {"class_embedding": -1, "positional_embedding": tensor.shape[-2:]}.get(own_name)
        tensor = tensor.reshape(shape) if shape is not None else tensor.T if own_name == "proj" else tensor
        renamed[own_name] = tensor
    return renamed
