"""From a run to the files of an export, and onto the disk: whole or absent, and never over something else."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from teacher_cache.files import durable

from ..config import BackboneConfig, MCMAEConfig, TrainConfig
from ..config.section import to_json
from ..errors import ConfigError, RunError, RunMismatchError
from ..files.checkpoint import Description, describe_checkpoint, latest_checkpoint, load_backbone
from .layouts import exported, require_format
from .record import RECORD, ExportRecord, sha256_tensors
from .timm_names import timm_name
from .weight_files import HF_CONFIG, HF_WEIGHTS

SUFFIX = {"timm": ".safetensors", "torch": ".pth"}
"""How the name of a file ends; hf is a folder."""
HF_PIXELS = "preprocessor_config.json"


@dataclass(frozen=True)
class Export:
    """An encoder as it will be written."""

    record: ExportRecord
    tensors: dict[str, Tensor]
    norm_is_trained: bool
    """False: the gain of its final norm is 1 and its shift 0, as before the first step."""
    checkpoint: Path


def read_export(run: str | Path, layout: str, averaged: bool = False) -> Export:
    """The encoder of the newest checkpoint of the run in the folder `run`, or of that one file, in `layout`.

    averaged: the moving average of its weights instead of the last ones.
    Raises RunError for a folder without a checkpoint, or a damaged one; ConfigError for a layout that has no such network.
    """
    run = Path(run)
    if not run.exists():
        raise RunError(f"There is no {run}. Give the --out folder of a student-train run, or one of its checkpoints.")
    checkpoint = latest_checkpoint(run) if run.is_dir() else run
    if checkpoint is None:
        raise RunError(f"{run} holds no checkpoint. Give the --out folder of a student-train run, or one of its checkpoints.")
    backbone, config = load_backbone(checkpoint, averaged)
    require_format(config.backbone, layout)
    described, tensors = exported(config.backbone, backbone.state_dict(), layout)
    description = describe_checkpoint(checkpoint)
    record = ExportRecord(
        layout, described, description.pixels, timm_of(described, layout), sha256_tensors(tensors),
        facts_of(config, description, averaged),
    )  # fmt: skip
    norm = backbone.norm
    return Export(record, tensors, not (bool((norm.weight == 1).all()) and not bool(norm.bias.any())), checkpoint)


def timm_of(config: BackboneConfig, layout: str) -> dict:
    """With what `timm.create_model` reads the file; empty where it cannot. MAE's layout of a ViT is timm's under "model"."""
    if layout == "hf" or isinstance(config, MCMAEConfig):
        return {}
    name, kwargs = timm_name(config)
    return {"name": name, "kwargs": {key: to_json(value) for key, value in kwargs.items()}}


def facts_of(config: TrainConfig, description: Description, averaged: bool) -> dict:
    """Where the weights come from, as JSON values: what the checkpoint says of its run."""
    return {
        "preset": config.preset,
        "teachers": list(config.teachers),
        "objectives": [objective.name for objective in config.objectives],
        "mask": to_json(config.mask),
        "weights": f"moving average, decay {config.optim.ema}" if averaged else "last step",
        "step": description.step,
        "crops_seen": description.samples_seen,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "data": description.identity,
        "changes": description.changes,
        "init": description.init,
        "checkpoint_crc32": description.tensors_crc32,
    }


def files_of(export: Export) -> dict[str, bytes]:
    """Name -> bytes of the files of the export: one with the name "" for a file, several for a folder."""
    record, tensors = export.record, export.tensors
    if record.layout == "timm":
        return {"": safetensors.torch.save(tensors, metadata={RECORD: record.to_text()})}
    if record.layout == "torch":
        buffer = io.BytesIO()
        torch.save({"model": tensors, RECORD: record.to_text()}, buffer)
        return {"": buffer.getvalue()}
    files = {
        HF_CONFIG: _json(hf_config(record)),
        HF_WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),  # without it transformers refuses the file
    }
    return files | ({HF_PIXELS: _json(hf_pixels(record))} if record.pixels else {})


def hf_config(record: ExportRecord) -> dict:
    """What transformers' ViTConfig is made from."""
    config = record.config
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        RECORD: record.to_json(),
    }


def hf_pixels(record: ExportRecord) -> dict:
    """What transformers' image processor is made from: resized with bicubic interpolation, then normalised."""
    size = record.config.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": record.pixels["mean"],
        "image_std": record.pixels["std"],
    }


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def require_place(out: Path, layout: str) -> None:
    """Raise ConfigError unless `out` can be the name of an export in `layout`: asked before the work, not after it."""
    if not out.parent.is_dir():
        raise ConfigError(f"-o {out}: there is no folder {out.parent}. Make it first: mkdir -p {out.parent}")
    suffix = SUFFIX.get(layout)
    if suffix is None:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"-o {out}: is a file. The format {layout} is a folder: give the name of a new one.")
    elif out.is_dir():
        raise ConfigError(
            f"-o {out}: is a folder. The format {layout} is a file: give its name, such as {out / f'student{suffix}'}."
        )
    elif out.suffix != suffix:
        raise ConfigError(
            f"-o {out}: a file of the format {layout} must end in {suffix}, or its reader takes it for another kind."
        )


def write(out: Path, files: dict[str, bytes], card: str) -> bool:
    """Write the files of an export and its card, README.md in a folder, else the file's name with .md; whether anything was new.

    Each file, and a new folder, is whole or absent. Raises RunMismatchError, and writes nothing, if other files are there.
    """
    is_folder = "" not in files
    paths = {out / name if is_folder else out: data for name, data in files.items()}
    paths[out / "README.md" if is_folder else card_path(out)] = card.encode()
    present = [path for path in paths if path.exists()]
    odd = [path for path in present if path.read_bytes() != paths[path]]
    odd += sorted(set(out.iterdir()) - set(paths)) if is_folder and out.is_dir() else []
    if odd:
        raise RunMismatchError(f"{odd[0]} is there already and is not what would be written. Move it away, or give another -o.")
    if is_folder and not present:
        aside = durable.clear_aside(out)
        aside.mkdir()
        for path, data in paths.items():
            durable.write_whole(aside / path.name, data)
        durable.publish(aside, out)
        return True
    for path, data in paths.items():
        if path not in present:
            durable.write_whole(path, data)
    return len(present) < len(paths)


def card_path(out: Path) -> Path:
    """The model card beside the file `out`."""
    return out.with_name(out.name + ".md")
