"""An exported encoder back from its file alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError, RunError
from ..modules.backbones import build_backbone
from .layouts import ours
from .record import ExportRecord, sha256_tensors
from .weight_files import read_weights

MASK_TOKEN = "mask_token"


def load_exported(path: str | Path) -> tuple[nn.Module, ExportRecord]:
    """The encoder that `student-export` wrote to `path`, on the CPU and in eval mode, and what the file says of itself.

    path: a file of layout timm or torch, or a folder of layout hf.
    `backbone.encode_all(images)` gives tokens float32 [B, C+N, D] behind the final norm, C = 1 where `backbone.has_cls`, of
    images float32 [B, 3, H, W] of `record.config.image_size` pixels, normalised by `record.pixels`.
    Raises RunError for a damaged file, or one that is no export of a student.
    """
    found = read_weights(path)
    record = found.record
    if record is None:
        raise RunError(f"{path} holds weights, but not what student-export says of them. Give a file that it wrote.")
    if sha256_tensors(found.tensors) != record.weights_sha256:
        raise RunError(f"{path} is damaged: its weights are not those that were exported. Export the run again.")
    try:
        with torch.device("meta"):  # takes no memory, whatever the record says
            expected = build_backbone(record.config).state_dict()
        tensors = ours(found.tensors)
        mask_token = expected.pop(MASK_TOKEN, None)  # a Swin has it always, an export never
        odd = [name for name in expected.keys() | tensors.keys() if name not in tensors or name not in expected
               or tensors[name].shape != expected[name].shape]  # fmt: skip
        if odd:
            raise RunError(
                f"{path} does not hold the encoder that its record describes: {min(odd)} is amiss. Export the run again."
            )
        backbone = build_backbone(record.config)
    except ConfigError as error:
        raise RunError(f"{path} describes an encoder that this version cannot build: {error}") from error
    backbone.load_state_dict(tensors if mask_token is None else tensors | {MASK_TOKEN: torch.zeros(mask_token.shape)})
    return backbone.eval(), record
