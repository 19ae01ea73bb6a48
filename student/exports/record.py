"""What an exported file says about itself: one JSON text, with which it can be read without the run it came from.

A file of layout `timm` has it in its safetensors header under RECORD, one of layout `torch` beside "model", a folder of layout
`hf` in its config.json. Equal exports are equal files: one text under one key, no times, no paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import BackboneConfig
from ..config.section import completed, from_json, to_json
from ..errors import RunError

RECORD = "student_export"
FORMAT = 1


@dataclass(frozen=True)
class ExportRecord:
    """An encoder, what its pixels are normalised by, and where its weights come from."""

    layout: str
    """timm, torch or hf: see layouts.py."""
    config: BackboneConfig
    """The encoder that the file holds. The number of heads, which no shape tells, is in it."""
    pixels: dict
    """{"mean": [3], "std": [3]}, of RGB in 0..1; empty where the data source of the run did not tell."""
    timm: dict
    """{"name": ..., "kwargs": {...}} of `timm.create_model`; empty for another layout."""
    weights_sha256: str
    """Of the tensors in the file: `sha256_tensors`."""
    made_from: dict
    """Preset, objectives, teachers, data and progress of the run, as JSON values: see `writing.facts_of`."""

    def to_json(self) -> dict:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "config"}
        return {"format": FORMAT, "backbone": to_json(self.config), **fields}

    def to_text(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)

    @classmethod
    def from_json(cls, value, path: Path) -> ExportRecord:
        """The record that `to_json` gave. Raises RunError, naming the file, for anything else."""
        try:
            value = dict(value)
            number = value.pop("format")
            if number != FORMAT:
                raise RunError(f"{path} is an export of format {number}; this version reads {FORMAT}. Export the run again.")
            config = from_json(completed(value.pop("backbone"), BackboneConfig), BackboneConfig, "backbone")
            record = cls(config=config, **value)
        except RunError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} has a record of its export that cannot be read ({error}). Export the run again.") from error
        kinds = {"layout": str, "pixels": dict, "timm": dict, "weights_sha256": str, "made_from": dict}
        if not all(isinstance(getattr(record, name), kind) for name, kind in kinds.items()):
            raise RunError(f"{path} has a record of its export with values of the wrong kind. Export the run again.")
        return record

    @classmethod
    def from_text(cls, text: str, path: Path) -> ExportRecord:
        """As `from_json`."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path} has a record of its export that is no JSON ({error}). Export the run again.") from error
        return cls.from_json(value, path)


def sha256_tensors(tensors: dict[str, Tensor]) -> str:
    """Over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
