"""What a run says of every step, a line of metrics.jsonl; and a line for each probe. Loggers (student/loggers) follow this file.

    {"step": 7, "epoch": 1.4, "loss": ..., "parts": {...}, "lr": ..., "images_per_s": ..., "wait_share": ...}    StepReport
    {"step": 10, "epoch": 2.0, "probe": {...}}                                                                   ProbeReport

A probe's line stands behind that of its step; of step 0, the weights that the run began with, there is only a probe.
It is written in the thread of the training, so that a full disk is an error there and not the end of somebody else's thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.files.durable import sync_folder

from ..errors import RunError
from .run_files import aside, publish, require_own

METRICS = "metrics.jsonl"
LONGEST_LINE = 1 << 20
"""Bytes of a line of metrics.jsonl; a longer one is no line of ours."""


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


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found in the weights of one step; a line of metrics.jsonl."""

    step: int  # completed steps
    epoch: float  # completed epochs
    probe: dict
    """name, protocol, main (name of the value that counts), values (name -> share of 1), train and val (the images), seconds"""


class StepLogs:
    """The logs of the run in `folder`, open behind `step`; lines of later steps, which are taken again, are cut off.

    probed: the last step that a line of a probe is of; None without one.
    """

    def __init__(self, folder: Path, step: int):
        self._path = folder / METRICS
        require_own(self._path)
        self.probed = _cut_behind(step, self._path) if self._path.exists() else None
        # unbuffered: what could not be written must not be tried again when the file is closed
        self._metrics = open(self._path, "ab", buffering=0)  # noqa: SIM115  (open as long as the run)
        sync_folder(folder)

    def write(self, report: StepReport) -> None:
        """Log one step."""
        self._add(report)

    def write_probe(self, report: ProbeReport) -> None:
        """Log what a probe found, durably: its step may be saved already."""
        self._add(report)
        self.sync()
        self.probed = report.step

    def _add(self, report: StepReport | ProbeReport) -> None:
        try:
            self._metrics.write((json.dumps(dataclasses.asdict(report)) + "\n").encode())
        except OSError as error:
            raise RunError(
                f"Step {report.step} could not be logged in {self._path.parent}: {error.strerror}. Mend that and give the same "
                "command again; it goes on from the last checkpoint."
            ) from error

    def sync(self) -> None:
        """Make the lines so far durable, before a checkpoint says that their steps are done."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        self._metrics.close()


def _cut_behind(step: int, metrics: Path) -> int | None:
    """Keep the lines of steps up to `step`, and give the last that a probe's line is of.

    A machine that died may have left a torn line behind them.
    """
    n_kept, probed = 0, None
    with open(metrics, "rb") as lines, open(aside(metrics), "xb") as kept:
        while (line := lines.readline(LONGEST_LINE)) and (found := read_line(line)) and found["step"] <= step:
            kept.write(line)
            if "probe" in found:
                probed = found["step"]
            else:
                n_kept += 1
    publish(metrics)
    if n_kept != step:
        warnings.warn(f"{metrics} has lines for {n_kept} of the {step} steps taken so far.", stacklevel=4)
    return probed


def read_line(line: bytes) -> dict | None:
    """The JSON of a line, which has a `step`; None if it is no line of ours, or torn."""
    try:
        found = json.loads(line)
        return found if line.endswith(b"\n") and type(found["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
