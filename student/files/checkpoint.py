"""One safetensors file a checkpoint: weights, AdamW's moments, and in the header what run and data they belong to.

No generator state is kept, because every random number of a run is a function of (seed, step). No pickle, and nothing is built
from a header before the sizes it promises are those of the file, so a checkpoint from a stranger is safe to open. A file is
written aside, fsynced and renamed: there is no half checkpoint.

    model.<name of a parameter>                              float32, also loadable alone: see `load_backbone`
    optim.<name of a parameter>.{exp_avg,exp_avg_sq,step}    for every parameter that was ever updated
    average.<name of a parameter>                            if the run keeps a moving average of its weights (optim.ema)
    metadata "student"                                       JSON: Description, and "crc32" of all that JSON
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..batch import TeacherShape
from ..config import TrainConfig
from ..errors import ConfigError, RunError
from ..modules.average import WeightAverage
from ..modules.backbones import build_backbone
from ..modules.model import Student
from ..modules.pixels import PIXELS
from . import changes as history
from .provenance import require_same, require_same_config
from .run_files import LARGEST_JSON, aside, publish, refusal_explained, remove, require_own, require_readable

FORMAT = 3
"""3 says what the encoder began from, in older files random weights; 2 what was changed under way and what pixels were normalised
by, in files of format 1 nothing and ImageNet's."""
CHECKPOINT = re.compile(r"checkpoint-([0-9]{8,16})\.safetensors")
"""Name of a checkpoint; the number is its completed steps."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about itself."""

    format: int
    step: int  # completed steps
    samples_seen: int  # crops, over all steps
    config: dict  # TrainConfig.to_json(), as the run was begun
    identity: dict  # of the data source, as the run was begun
    tensors_crc32: int  # over names, shapes and bytes of all tensors, in the order of the names
    changes: list  # of both before this step: changes.to_json()
    pixels: dict  # {"mean": [3], "std": [3]}: what the images were normalised by, of 0..1; empty where the source did not tell
    init: dict  # what the encoder began from: the record of exports.initial.begin; empty: random weights

    def known_changes(self, path: Path) -> tuple[history.Change, ...]:
        """`changes`, read. Raises RunError if they cannot be."""
        return history.from_json(self.changes, f"The checkpoint {path}")


class _Damage(Exception):
    """What is wrong with a file, in words without its path."""


def checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints in a run's directory, the one of the most steps last."""
    out_dir = Path(out_dir)
    with refusal_explained(out_dir):  # glob would find nothing where one may not look
        entries = list(out_dir.iterdir()) if out_dir.is_dir() else []
    return sorted((path for path in entries if CHECKPOINT.fullmatch(path.name)), key=_step_in_name)


def latest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint of the most steps in a run's directory, if there is any."""
    return (checkpoints(out_dir) or [None])[-1]


def _step_in_name(path: Path) -> int:
    return int(CHECKPOINT.fullmatch(path.name)[1])


def save_checkpoint(
    out_dir: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    identity: dict,
    average: WeightAverage | None = None,
    keep: int = 2,
    changes: Sequence[history.Change] = (),
    pixels: dict | None = None,
    only_finite: bool = False,
    init: dict | None = None,
) -> Path:
    """Write the state after `step` completed steps and remove all but the newest `keep` checkpoints.

    changes: of config and data before this step.  pixels, init: see Description.
    Raises RunError if it cannot be written, or with `only_finite` if a number of it is not finite; the checkpoints before it are
    untouched then.
    """
    tensors = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{name}.{key}"] = value
    for name, tensor in (average.tensors if average else {}).items():
        tensors[f"average.{name}"] = tensor
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if only_finite and (broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]):
        raise RunError(f"{len(broken)} of its {len(tensors)} tensors are not finite: {', '.join(broken[:3])}.")

    description = Description(
        FORMAT,
        step,
        step * config.batch_size,
        config.to_json(),
        identity,
        _crc32(tensors),
        history.to_json(changes),
        pixels or {},
        init or {},
    )
    path = Path(out_dir) / f"checkpoint-{step:08d}.safetensors"
    try:
        save_file(tensors, aside(path), metadata={"student": _seal(dataclasses.asdict(description))})
        publish(path)
    except (SafetensorError, OSError) as error:
        aside(path)  # makes room
        raise RunError(
            f"The checkpoint {path} could not be written: {error}. Mend that and give the same command again; the checkpoint "
            "before it is untouched."
        ) from error

    for old in checkpoints(path.parent)[:-keep]:
        remove(old)
    return path


def load_checkpoint(
    path: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    identity: dict,
    average: WeightAverage | None = None,
) -> Description:
    """Put a run back to where `save_checkpoint` left it; what the checkpoint says of itself.

    Raises, before anything is changed, RunError if the file is damaged, RunMismatchError if it belongs to another config or other
    data.
    """
    description, tensors = _read(path)
    require_same_config(f"The checkpoint {path}", description.config, config)
    require_same(f"The checkpoint {path}", "data", description.identity, identity)
    parameters = dict(student.named_parameters())
    updated = [name for name in parameters if f"optim.{name}.step" in tensors]  # one that no loss reaches has no moments
    shapes = {f"model.{name}": value.shape for name, value in student.state_dict().items()}
    for name in updated:
        shape = parameters[name].shape
        shapes |= {f"optim.{name}.step": (), f"optim.{name}.exp_avg": shape, f"optim.{name}.exp_avg_sq": shape}
    shapes |= {f"average.{name}": tensor.shape for name, tensor in (average.tensors if average else {}).items()}
    _require_shapes(path, tensors, shapes)

    if average:
        average.load({name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")})
    student.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    # The optimizer numbers its parameters through all groups. Clones, because it would go on in the mapped file itself.
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {key: tensors[f"optim.{name}.{key}"].clone() for key in MOMENTS}
        for index, name in enumerate(ordered)
        if name in updated
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return description


def describe_checkpoint(path: str | Path) -> Description:
    """What a checkpoint says about itself, once all of it has proved sound: pixels, changes, config, data.

    Raises RunError for a damaged file, a folder, or what is no checkpoint.
    """
    return _read(path)[0]


def recorded_description(path: str | Path) -> Description | None:
    """The header of a checkpoint; None where it cannot be read, of which loading says more."""
    try:
        path = _file(path)
        require_own(path)
        with safe_open(path, framework="pt") as file:
            return _unseal((file.metadata() or {}).get("student", ""))
    except (_Damage, RunError, OSError, SafetensorError):
        return None


def recorded_config(path: str | Path) -> dict | None:
    """The configuration in the header of a checkpoint, as JSON; None where it cannot be read, of which loading says more."""
    description = recorded_description(path)
    return description and description.config


def load_student(path: str | Path, teachers: tuple[TeacherShape, ...]) -> tuple[Student, TrainConfig, int]:
    """The whole student of a checkpoint with its heads and predictors, on the CPU and in eval mode; its config; its steps.

    path: of one file, see `latest_checkpoint`.  teachers: those it was trained under. Raises RunError for a damaged file, or one
    that does not fit them.
    """
    description, tensors = _read(path)
    try:
        config = TrainConfig.from_json(description.config)
        student = Student(config, teachers)
    except ConfigError as error:
        raise RunError(f"The checkpoint {path} has a configuration that this version cannot build: {error}") from error
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    _require_shapes(path, weights, {f"model.{name}": value.shape for name, value in student.state_dict().items()})
    student.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return student.eval(), config, description.step


def load_backbone(path: str | Path, averaged: bool = False) -> tuple[nn.Module, TrainConfig]:
    """The encoder of a checkpoint, on the CPU and in eval mode, and the config it was trained with.

    path: of one file, see `latest_checkpoint`; `describe_checkpoint` says by which mean and deviation its pixels are normalised.
    averaged: the moving average of its weights instead of the last ones. Needs neither data nor teacher.
    `backbone.state_dict()` loads into timm as it is. Raises RunError for a damaged file, or one without an average.
    """
    description, tensors = _read(path)
    try:
        config = TrainConfig.from_json(description.config)
    except ConfigError as error:
        raise RunError(f"The checkpoint {path} has a configuration that this version cannot build: {error}") from error
    prefix = "model.backbone."
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if averaged:
        means = {f"model.{name.removeprefix('average.')}": t for name, t in tensors.items() if name.startswith("average.")}
        if not means:
            raise RunError(
                f"The checkpoint {path} holds no average of its weights: the run was not told to keep one (optim.ema)."
            )
        weights |= {name: tensor for name, tensor in means.items() if name.startswith(prefix)}
    with torch.device("meta"):  # takes no memory, whatever the config says
        expected = build_backbone(config.backbone).state_dict()
    _require_shapes(path, weights, {f"{prefix}{name}": value.shape for name, value in expected.items()})
    backbone = build_backbone(config.backbone)
    backbone.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    return backbone.eval(), config


def _file(path: str | Path) -> Path:
    """`path`, if it can be a checkpoint. RunError for a folder, which says what to give."""
    path = Path(path)
    if path.is_dir():
        newest = latest_checkpoint(path)
        instead = f"Give its newest checkpoint: {newest}." if newest else "It holds no checkpoint either."
        raise RunError(f"The checkpoint {path} cannot be read: it is a folder. {instead}")
    return path


def _read(path: str | Path) -> tuple[Description, dict[str, Tensor]]:
    """Description and tensors of a checkpoint, the latter as views of the mapped file: they take no memory.

    Raises RunError if there is anything wrong with the bytes, saying which older checkpoint is sound: to go on from that one
    loses steps, and is for a person to decide.
    """
    path = _file(path)
    try:
        return _read_sound(path)
    except _Damage as damage:
        raise RunError(f"The checkpoint {path} is damaged ({damage}). {_way_out(path)}") from damage


def _read_sound(path: Path) -> tuple[Description, dict[str, Tensor]]:
    require_own(path)
    try:
        require_readable(path)
        with safe_open(path, framework="pt") as file:
            description = _unseal((file.metadata() or {}).get("student", ""))
            tensors = {}
            for name in file.keys():  # noqa: SIM118  (not a dict)
                promised = file.get_slice(name)
                if promised.get_dtype() not in ("F32", "I64") or 0 in promised.get_shape():
                    raise _Damage(f"{name} is no float32 or int64 tensor with anything in it")
                tensors[name] = file.get_tensor(name)
    except FileNotFoundError as error:
        raise RunError(f"There is no checkpoint {path}.") from error
    except OSError as error:
        raise RunError(f"The checkpoint {path} cannot be read: {error}.") from error
    except SafetensorError as error:
        raise _Damage(error) from error
    if not 1 <= description.format <= FORMAT:
        raise RunError(f"The checkpoint {path} has format {description.format}; this version reads 1 to {FORMAT}.")
    if _crc32(tensors) != description.tensors_crc32:
        raise _Damage("its checksum does not match")
    if CHECKPOINT.fullmatch(path.name) and _step_in_name(path) != description.step:
        raise _Damage(f"it holds step {description.step}")
    return description, tensors


def _way_out(path: Path) -> str:
    """What to do about a damaged checkpoint, or about a file that is none."""
    if not CHECKPOINT.fullmatch(path.name):
        return "If it is to be a checkpoint of student-train, restore it; they are called checkpoint-NNNNNNNN.safetensors."
    there = checkpoints(path.parent)
    for older in reversed(there[: there.index(path)] if path in there else []):
        try:
            step = _read_sound(older)[0].step
        except (_Damage, RunError):
            continue
        return f"Restore it; or delete it, and the same command goes on from step {step:,}: {older.name} is sound."
    return f"Restore it: no older one in {path.parent} is sound. Or start a new run in another directory."


def _require_shapes(path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple]) -> None:
    """RunError unless exactly these tensors are there, in these shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(shape) for name, shape in expected.items()}
    odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if odd:
        sides = [f"{values.get(odd[0], 'nothing')}" for values in (found, expected)]
        raise RunError(
            f"The checkpoint {path} does not fit this student in {len(odd)} tensors: {odd[0]} is {sides[0]} in the file, "
            f"{sides[1]} in the student."
        )


def _seal(description: dict) -> str:
    """A description as JSON that carries the CRC-32 of its own content."""
    return json.dumps({**description, "crc32": zlib.crc32(json.dumps(description, sort_keys=True).encode())})


def _unseal(text: str) -> Description:
    """The description that `_seal` wrote."""
    try:
        value = json.loads(text[:LARGEST_JSON])
        crc32 = value.pop("crc32")
        if zlib.crc32(json.dumps(value, sort_keys=True).encode()) != crc32:
            raise _Damage("the checksum of its description does not match")
        if value.get("format") == 1:
            value |= {"changes": [], "pixels": PIXELS}
        if value.get("format") in (1, 2):
            value |= {"init": {}}
        description = Description(**value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damage("its header holds no readable description of a student") from error
    for name, hint in typing.get_type_hints(Description).items():
        number = getattr(description, name)
        if type(number) is not hint or hint is int and not 0 <= number < 2**63:
            raise _Damage(f"{name} in its header is wrong")
    return description


def _crc32(tensors: dict[str, Tensor]) -> int:
    """Over name, shape and bytes of all tensors, in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(f"{name} {tuple(tensors[name].shape)}".encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc
