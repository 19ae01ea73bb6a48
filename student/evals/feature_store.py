"""Features of frozen encoders, kept in files: computed once for all evaluations of the same weights on the same images.

One safetensors file a readout, `<first 32 digits of the SHA-256 of its key>.safetensors`:

    features    float32 [n, D], or float16 [n, N, D] of patches
    labels      int64 [n]
    metadata    "key": the FeatureKey as JSON; "crc32c": of the bytes of both tensors

A file is written aside and renamed: it is whole or absent. One that is damaged is made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teacher_cache.files.durable import ASIDE, crc32c, make_folder, publish, settle

from ..errors import ConfigError
from .features import extract_features
from .subject import LAYER, Subject
from .watch import Watch, unwatched

ABANDONED_S = 3600
"""Age of a file written aside at which its writer is taken for dead, seconds."""


class Images(Protocol):
    """What features are made of: iterates (normalised images [B, 3, H, W], labels [B])."""

    size: int
    decoder: str

    def __len__(self) -> int: ...
    def state(self) -> str: ...
    def __iter__(self): ...


@dataclass(frozen=True)
class FeatureKey:
    """All that features depend on, but for rounding."""

    weights: str
    """Subject.weights"""
    data: str
    """Images.state()"""
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoder: str
    """How files become pixels."""
    layer: str
    readout: str
    precision: str
    seen: str = "all patches"
    """Which patches the encoder got."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def file_name(self) -> str:
        return f"{hashlib.sha256(self.to_json().encode()).hexdigest()[:32]}.safetensors"


class FeatureStore:
    """Features by key in `folder`, which is made when something is kept. folder None: nothing is kept.

    say: told a line when a damaged file is made again.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None] = lambda line: None):
        self.folder, self._say = folder, say

    def get(self, key: FeatureKey, n: int) -> tuple[Tensor, Tensor] | None:
        """(features, labels) of `n` images; None if they are not here, or not sound."""
        path = self.folder and self.folder / key.file_name
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key.to_json():
                    raise ValueError("its key is not the one its name says")
                features, labels = file.get_tensor("features"), file.get_tensor("labels")
            if len(features) != n or labels.shape != (n,) or labels.dtype != torch.int64:
                raise ValueError(f"it holds {len(features)} rows, not {n}")
            if metadata.get("crc32c") != _checksum(features, labels):
                raise ValueError("its checksum does not match")
            return features, labels
        except (SafetensorError, OSError, ValueError) as error:
            self._say(f"features {path}: damaged ({error}); they are computed again")
            return None

    def put(self, key: FeatureKey, features: Tensor, labels: Tensor) -> None:
        """Keep features. Raises OSError if they cannot be written; nothing of them is left then."""
        if self.folder is None:
            return
        make_folder(self.folder)
        path = self.folder / key.file_name
        for left in self.folder.glob(f"{key.file_name}.*{ASIDE}"):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                left.unlink(missing_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{ASIDE}")  # others may write the same
        tensors = {"features": features.contiguous(), "labels": labels.contiguous()}
        try:
            save_file(tensors, aside, metadata={"key": key.to_json(), "crc32c": _checksum(features, labels)})
            settle(aside)
            publish(aside, path)
        except SafetensorError as error:
            raise OSError(None, f"the features could not be written ({error}). Give another --features DIR", str(path)) from error
        finally:
            aside.unlink(missing_ok=True)


def frozen_features(
    subject: Subject,
    images: Images,
    store: FeatureStore,
    readouts: Sequence[str],
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    watch: Watch = unwatched,
    encode: Callable[[Tensor], Tensor] | None = None,
    seen: str = "all patches",
) -> tuple[dict[str, Tensor], Tensor]:
    """Features {readout: [n, D]} and labels int64 [n] of `subject`, from the store or computed and kept there.

    encode, seen: another way from images to tokens, and what it is called in the key.
    Raises ConfigError for features that are not finite.
    """
    state, mean, std = images.state(), tuple(subject.mean), tuple(subject.std)
    keys = {
        name: FeatureKey(subject.weights, state, images.size, mean, std, images.decoder, LAYER, name, precision, seen)
        for name in readouts
    }
    found, labels, missing = {}, None, []
    for name, key in keys.items():
        kept = store.get(key, len(images))
        if kept is None:
            missing.append(name)
        else:
            found[name], labels = kept
    if missing:
        model = subject.encoder
        if encode is not None:
            model = _Encode(encode, subject.encoder.has_cls)
        computed, labels = extract_features(model, images, tuple(missing), device, precision, watch)
        for name, features in computed.items():
            if not features.isfinite().all():
                n_odd = int((~features.isfinite().flatten(1).all(1)).sum())
                advice = "Its weights are broken" if precision == "fp32" else "Give --precision fp32"
                raise ConfigError(
                    f"The features of {subject.name} are not finite for {n_odd:,} of {len(features):,} images. {advice}."
                )
            store.put(keys[name], features, labels)
        found |= computed
    return {name: found[name] for name in readouts}, labels


@dataclass(frozen=True)
class _Encode:
    encode_all: Callable[[Tensor], Tensor]
    has_cls: bool


def _checksum(features: Tensor, labels: Tensor) -> str:
    crc = 0
    for tensor in (features, labels):
        crc = crc32c(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
