"""One safetensors file a checkpoint: weights, AdamW's moments, and in the header what run and data they belong to.

No generator state is kept, because every random number of a run is a function of (seed, step). No pickle, so a checkpoint
from a stranger is safe to open. A file is written aside, fsynced and renamed: there is no half checkpoint.

    model.<name of a parameter>                              float32, also loadable alone: see `load_backbone`
    optim.<name of a parameter>.{exp_avg,exp_avg_sq,step}    for every parameter that was ever updated
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .backbone import Backbone
from .config import TrainConfig
from .errors import RunError
from .model import Student

FORMAT = 1
PATTERN = "checkpoint-*.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself."""

    step: int  # completed steps
    samples_seen: int  # crops, over all steps
    config: dict  # TrainConfig.to_json()
    identity: dict  # of the data source


def latest_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint of the most steps in a run's directory, if there is any."""
    return max(Path(out_dir).glob(PATTERN), default=None)


def save_checkpoint(
    out_dir: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    identity: dict,
    keep: int = 2,
) -> Path:
    """Write the state after `step` completed steps and remove all but the newest `keep` checkpoints."""
    tensors = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{name}.{key}"] = value
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    info = {
        "format": FORMAT,
        "step": step,
        "samples_seen": step * config.batch_size,
        "config": config.to_json(),
        "identity": identity,
        "crc32": _crc32(tensors),
    }
    path = Path(out_dir) / f"checkpoint-{step:08d}.safetensors"
    aside = path.with_suffix(".partial")
    try:
        save_file(tensors, aside, metadata={"student": json.dumps(info)})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except SafetensorError as error:
        raise RunError(
            f"The checkpoint {path} could not be written: {error}. Free some space and start the same "
            f"command again; the checkpoint before it is untouched."
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    _fsync_directory(path.parent)

    for old in sorted(path.parent.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer, config: TrainConfig, identity: dict) -> int:
    """Put a run back to where `save_checkpoint` left it; the number of completed steps.

    Raises RunError, before anything is changed, if the file is damaged or belongs to another config or other data.
    """
    info, tensors = _read(path)
    require_same(f"The checkpoint {path}", "config", info.config, config.to_json())
    require_same(f"The checkpoint {path}", "data", info.identity, identity)

    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"The checkpoint {path} does not fit this student: {error}") from error

    # The optimizer numbers its parameters through all groups; load_state_dict brings each value to its device.
    names = {parameter: name for name, parameter in student.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, name in enumerate(ordered):
        values = {key: tensors.get(f"optim.{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if values["step"] is not None:  # a parameter no loss reaches has no state
            state[index] = values
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return info.step


def load_backbone(path: Path) -> tuple[Backbone, TrainConfig]:
    """The encoder of a checkpoint, on the CPU and in eval mode, and the config it was trained with.

    Needs neither data nor teacher. `backbone.state_dict()` loads into timm as it is.
    """
    info, tensors = _read(path)
    config = TrainConfig.from_json(info.config)
    prefix = "model.backbone."
    backbone = Backbone(config.backbone)
    backbone.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return backbone.eval(), config


def require_same(holder: str, what: str, there: dict, now: dict) -> None:
    """RunError naming every value in which two JSON objects differ."""
    there, now = _flat(there), _flat(json.loads(json.dumps(now)))
    differing = sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key))
    if differing:
        listed = "; ".join(f"{key} was {there.get(key)!r}, is now {now.get(key)!r}" for key in differing)
        raise RunError(
            f"{holder} belongs to a run with another {what}: {listed}. "
            f"Go on with the old values, or start a new run in another directory."
        )


def _read(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Header and tensors of a checkpoint, checked; RunError if there is anything wrong with the bytes."""
    damaged = f"The checkpoint {path} is damaged ({{}}). Delete it to go on from the one before it, or restore the file."
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["student"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError as error:
        raise RunError(f"There is no checkpoint {path}.") from error
    except SafetensorError as error:
        raise RunError(damaged.format(error)) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise RunError(f"{path} is no checkpoint of a student: its header has no readable `student` entry.") from error

    if info["format"] != FORMAT:
        raise RunError(f"The checkpoint {path} has format {info['format']}; this version reads {FORMAT}.")
    if _crc32(tensors) != info["crc32"]:
        raise RunError(damaged.format("its checksum does not match"))
    return CheckpointInfo(info["step"], info["samples_seen"], info["config"], info["identity"]), tensors


def _crc32(tensors: dict[str, Tensor]) -> int:
    """Over the bytes of all tensors, in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(value, prefix: str = "") -> dict:
    """Nested JSON as dotted name -> plain value, so that a difference can be named."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    flat = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
