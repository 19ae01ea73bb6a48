"""What a run says of itself: its settings, its steps, its checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from student.config import TrainConfig
from student.errors import ConfigError, RunError
from student.files.changes import Change, from_json, to_json, total_epochs
from student.files.checkpoint import checkpoints
from student.files.logs import LONGEST_LINE, METRICS
from student.files.run_directory import read_description

WARM_UP_STEPS = 5
"""The first steps compile and fill queues: the speed of a run is that of the others, if it has others."""


@dataclass(frozen=True)
class RunFacts:
    """A run as it lies on disk."""

    path: Path
    config: TrainConfig
    description: dict
    """Of config.json, see student.files.run_directory.read_description."""
    changes: tuple[Change, ...]
    """What was changed under way."""
    steps: dict[str, np.ndarray]
    """float64 [n_steps]: step, epoch, loss, lr, images_per_s, wait_share; by name."""
    parts: dict[str, np.ndarray]
    """The unweighted losses and their details, float64 [n_steps], NaN where a step has none."""
    probes: tuple[dict, ...]
    """What probes found, in order: ProbeReport as JSON."""
    n_torn: int
    """Lines of metrics.jsonl that cannot be read."""
    checkpoints: dict[Path, int]
    """Their bytes, the newest last."""

    @property
    def n_steps(self) -> int:
        return int(self.steps["step"][-1]) if len(self.steps["step"]) else 0

    @property
    def total_steps(self) -> int | None:
        """Of the whole run; None before its first step."""
        return round(self.n_steps / self.steps["epoch"][-1] * self.epochs) if self.n_steps else None

    @property
    def epochs(self) -> int:
        """Of the whole run, with those that were added."""
        return total_epochs(self.config, self.changes)

    @property
    def begun_from(self) -> str | None:
        """The weights that the encoder began with, in words; None for random ones."""
        init = self.description.get("init")
        return f"{init.get('from')}, sha256 {str(init.get('sha256'))[:12]}" if isinstance(init, dict) else None

    @property
    def teachers(self) -> list[str]:
        """The targets of each teacher, in words."""
        return [_targets(one) for one in self.description["identity"].get("teachers", [])]

    @property
    def seconds(self) -> np.ndarray:
        """What each step took."""
        return self.config.batch_size / self.steps["images_per_s"]

    @property
    def settled(self) -> slice:
        """The steps whose speed counts."""
        return slice(WARM_UP_STEPS if len(self.steps["step"]) > 2 * WARM_UP_STEPS else 0, None)

    @property
    def images_per_s(self) -> float | None:
        seconds = self.seconds[self.settled]
        return float(len(seconds) * self.config.batch_size / seconds.sum()) if len(seconds) else None

    @property
    def wait_share(self) -> float | None:
        """0..1, of the time of the settled steps."""
        seconds = self.seconds[self.settled]
        return float((self.steps["wait_share"][self.settled] * seconds).sum() / seconds.sum()) if len(seconds) else None

    def to_json(self) -> dict:
        last = {name: float(values[-1]) for name, values in self.steps.items() if len(values)}
        return {
            "run": str(self.path), "preset": self.config.preset, "steps": self.n_steps, "total_steps": self.total_steps,
            "finished": self.n_steps == self.total_steps, "hours": float(self.seconds.sum()) / 3600,
            "images_per_s": self.images_per_s, "wait_share": self.wait_share, "last": last,
            "parts": {name: float(values[-1]) for name, values in self.parts.items() if math.isfinite(values[-1])},
            "probes": list(self.probes),
            "unreadable_log_lines": self.n_torn, "checkpoints": [path.name for path in self.checkpoints],
            "changes": to_json(self.changes),
            **{key: self.description.get(key) for key in ("config", "identity", "made_by", "pixels", "data_from")},
        }  # fmt: skip


def read_run(path: Path) -> RunFacts:
    """The run in the folder `path`. Raises RunError if there is none, or its config.json cannot be read."""
    description = read_description(path)
    try:
        config = TrainConfig.from_json(description["config"])
    except ConfigError as error:
        raise RunError(f"{path} has a configuration that this version cannot read: {error}") from error
    changes = from_json(description.get("changes", []), str(path))
    reports, probes, n_torn = _read_metrics(path / METRICS)
    names = ("step", "epoch", "loss", "lr", "images_per_s", "wait_share")
    steps = {name: np.array([report[name] for report in reports], "float64") for name in names}
    part_names = list(dict.fromkeys(name for report in reports for name in report["parts"]))
    parts = {name: np.array([report["parts"].get(name, math.nan) for report in reports], "float64") for name in part_names}
    sizes = {}
    for checkpoint in checkpoints(path):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on removes its old ones
            sizes[checkpoint] = checkpoint.stat().st_size
    return RunFacts(Path(path), config, description, changes, steps, parts, tuple(probes), n_torn, sizes)


def _targets(identity: dict) -> str:
    weights = f"weights {identity['weights_sha256'][:12]}"
    if "live" in identity:
        return f"{identity['live']}, {weights}, run live" + (", not whitened" if identity.get("raw") else "")
    return f"{identity['store']}, {weights}, {identity['dtype']}"


def _read_metrics(path: Path) -> tuple[list[dict], list[dict], int]:
    """The reports of a run's steps and of its probes, and how many lines are none: a machine that died may have torn the last."""
    reports, probes, n_torn = [], [], 0
    if not path.exists():
        return reports, probes, n_torn
    with open(path, "rb") as lines:
        while line := lines.readline(LONGEST_LINE):
            try:
                report = json.loads(line)
                if "probe" in report:
                    numbers = [report["step"], report["epoch"], *report["probe"]["values"].values()]
                    names = [report["probe"][name] for name in ("name", "protocol", "main")]
                    names += [report["probe"][side]["fingerprint"] for side in ("train", "val")]
                    if not all(isinstance(name, str) for name in names) or names[2] not in report["probe"]["values"]:
                        raise ValueError("not names")
                else:
                    numbers = [report[name] for name in ("step", "epoch", "loss", "lr", "images_per_s", "wait_share")]
                    numbers += report["parts"].values()
                    if report["images_per_s"] <= 0:
                        raise ValueError("not a speed")
                if not all(isinstance(number, int | float) for number in numbers):
                    raise ValueError("not numbers")
                (probes if "probe" in report else reports).append(report)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                n_torn += 1
    return reports, probes, n_torn
