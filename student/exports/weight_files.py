"""Names and tensors of a file of weights, and what it says about itself. Nothing is unpickled but tensors and plain values."""

from __future__ import annotations

import argparse
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RunError
from ..files.run_files import LARGEST_JSON, refusal_explained
from .record import RECORD, ExportRecord

HF_CONFIG, HF_WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class WeightFile:
    """A file, or a folder of transformers, as it was found."""

    path: Path
    """The file that holds the tensors."""
    tensors: dict[str, Tensor]
    record: ExportRecord | None
    """None: it is no export of a student."""
    heads: int | tuple[int, ...] | None
    """Of its attention, of each stage of a Swin; None where nothing tells."""


def read_weights(path: str | Path) -> WeightFile:
    """What is in a .safetensors file, a torch file (a state dict, alone or under "model" or "state_dict") or a folder of
    transformers, on the CPU.

    Raises RunError for anything else, or what is damaged.
    """
    path = Path(path)
    with refusal_explained(path):
        if path.is_dir():
            return _read_folder(path)
        if not path.is_file():
            raise RunError(f"There is no file {path}. Give a file of weights: .safetensors or a torch file (.pth).")
        with open(path, "rb") as file:
            start = file.read(9)
    if start[8:] == b"{":  # eight bytes of length, then JSON
        tensors, metadata = _read_safetensors(path)
        text = metadata.get(RECORD)
        record = ExportRecord.from_text(text, path) if text is not None else None
    else:
        tensors, text = _read_torch(path)
        record = ExportRecord.from_text(text, path) if text is not None else None
    return WeightFile(path, tensors, record, record.config.heads if record else None)


def _read_folder(folder: Path) -> WeightFile:
    path = folder / HF_CONFIG
    if not path.is_file() or not (folder / HF_WEIGHTS).is_file():
        raise RunError(
            f"{folder} holds no {HF_CONFIG} with {HF_WEIGHTS}, as a folder of transformers does. Give a file of weights."
        )
    try:
        config = json.loads(path.read_bytes()[:LARGEST_JSON])
        kind, heads = config["model_type"], config.get("num_attention_heads")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as the configuration of a model ({error!r}).") from error
    if kind != "vit":
        raise RunError(f"{path} describes a {kind}; read is a plain ViT (model_type vit).")
    tensors, _ = _read_safetensors(folder / HF_WEIGHTS)
    record = ExportRecord.from_json(config[RECORD], path) if RECORD in config else None
    return WeightFile(folder / HF_WEIGHTS, tensors, record, heads if isinstance(heads, int) else None)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read as safetensors ({error}). It is damaged or cut short: get it again.") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors, and the text of the record if there is one."""
    try:
        # MAE's trainer keeps its command's arguments in a checkpoint
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = str(error).strip().split("\n")[0].split(". ")[0]
        raise RunError(
            f"{path} cannot be read as weights ({first}). Read are safetensors, and torch files of tensors and plain values "
            "alone; open another one where you trust it and save its state dict as safetensors."
        ) from error
    text = found.get(RECORD) if isinstance(found, dict) else None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        raise RunError(f"{path} holds no state dict: no names with tensors, neither alone nor under model or state_dict.")
    return tensors, text if isinstance(text, str) else None
