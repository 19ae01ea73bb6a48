"""A fine-tuning on disk: one safetensors file with weights, AdamW's moments, and what they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from teacher_cache.files.durable import crc32c

from ...errors import RunError, RunMismatchError
from ...files.run_files import aside, publish

NAME = "finetune.safetensors"
KEY = "finetune"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict, epochs: list[dict]) -> None:
    """Write the state behind the last of `epochs`; the file before it is there until the new one is whole."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, parameter in enumerate(_ordered(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{index}.{key}"] = value
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = {"identity": identity, "epochs": epochs, "crc32c": _checksum(tensors)}
    path = folder / NAME
    try:
        save_file(tensors, aside(path), metadata={KEY: json.dumps(said)})
        publish(path)
    except (SafetensorError, OSError) as error:
        aside(path)  # makes room
        raise RunError(f"{path} could not be written: {error}. The state of the epoch before is untouched.") from error


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict) -> list[dict]:
    """Put model and optimizer back to where `save` left them; the epochs so far, empty where there is nothing.

    Raises RunMismatchError for a fine-tuning of something else, RunError for a damaged file.
    """
    path = folder / NAME
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
        before, epochs, claimed = said["identity"], list(said["epochs"]), said["crc32c"]
        if claimed != _checksum(tensors):
            raise ValueError("its checksum does not match")
        flat = _flat(before), _flat(identity)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}). Restore it, or delete it to begin again.") from error
    if odd := sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name)):
        raise RunMismatchError(
            f"{folder} holds another fine-tuning: {odd[0]} is {flat[0].get(odd[0])} there, {flat[1].get(odd[0])} now. Give "
            "another --out."
        )
    try:
        model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    except RuntimeError as error:
        raise RunError(f"{path} does not fit this encoder. Delete it to begin again.") from error
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("optim."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return epochs


def _ordered(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _flat(value: dict, above: str = "") -> dict[str, object]:
    found = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{above}{key}.") if isinstance(inner, dict) else {f"{above}{key}": inner}
    return found


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = crc32c(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode(), crc)
        crc = crc32c(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
