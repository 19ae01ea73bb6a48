"""The directory of one run: what it is, and a line for every step it took.

config.json                   written first: the config and the identity of the data; what a directory is checked by
metrics.jsonl                 one JSON object a step, in order, each step once however often the run was resumed
tensorboard/                  the same scalars
checkpoint-NNNNNNNN.safetensors
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import require_same
from .config import TrainConfig
from .errors import RunError


@dataclass(frozen=True)
class StepReport:
    """What is known of one step; a line of metrics.jsonl."""

    step: int  # completed steps, counted from 1
    epoch: float  # completed epochs
    loss: float
    parts: dict[str, float]  # the unweighted losses and their details
    lr: float
    images_per_s: float
    wait_share: float  # 0..1, share of the step's time spent waiting for data


class RunDirectory:
    """Creates `path`, or opens it again if it holds the same run; RunError if it holds anything else."""

    def __init__(self, path: Path, config: TrainConfig, identity: dict):
        self.path = Path(path)
        self._metrics = None
        self._tensorboard = None

        config_json = self.path / "config.json"
        if config_json.exists():
            try:
                there = json.loads(config_json.read_text())
                config_there, identity_there = there["config"], there["identity"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise RunError(
                    f"{config_json} cannot be read as the description of a run ({error}). Choose another directory."
                ) from error
            require_same(f"The directory {self.path}", "config", config_there, config.to_json())
            require_same(f"The directory {self.path}", "data", identity_there, identity)
            return

        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} is not empty and holds no run of a student. Choose another directory.")
        self.path.mkdir(parents=True, exist_ok=True)
        made_by = {"torch": torch.__version__, "timm": timm.__version__}
        description = {"config": config.to_json(), "identity": identity, "made_by": made_by}
        _write_whole(config_json, json.dumps(description, indent=2) + "\n")

    def open_logs(self, step: int) -> None:
        """Start logging behind `step`; lines of later steps, which a resumed run will take again, are cut off."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            _write_whole(metrics, "".join(_lines_up_to(step, metrics.read_text())))
        self._metrics = open(metrics, "a")  # noqa: SIM115  (open as long as the run)
        self._tensorboard = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    def write(self, report: StepReport) -> None:
        """Log one step."""
        self._metrics.write(json.dumps(dataclasses.asdict(report)) + "\n")
        self._metrics.flush()

        scalars = {
            "loss": report.loss,
            "lr": report.lr,
            "images_per_s": report.images_per_s,
            "wait_share": report.wait_share,
            **{f"parts/{n}": v for n, v in report.parts.items()},
        }
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, report.step)

    def sync(self) -> None:
        """Make the lines so far durable, before a checkpoint says that their steps are done."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._tensorboard.close()
            self._metrics = self._tensorboard = None


def _lines_up_to(step: int, text: str) -> list[str]:
    """The lines of steps up to `step`; a machine that died may have left a torn line behind them."""
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line)
    if len(kept) != step:
        warnings.warn(f"metrics.jsonl has lines for {len(kept)} of the {step} steps taken so far.", stacklevel=3)
    return kept


def _write_whole(path: Path, text: str) -> None:
    """Replace a small file in one go."""
    aside = path.with_suffix(".partial")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
