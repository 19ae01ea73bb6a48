"""What a run says of every step: a line of metrics.jsonl, and the same scalars for TensorBoard.

Both are written in the thread of the training, so that a full disk is an error there and not the end of somebody else's thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from teacher_cache.files.durable import sync_folder

from ..errors import RunError
from .run_files import aside, publish, require_own

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
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


class StepLogs:
    """The logs of the run in `folder`, open behind `step`; lines of later steps, which are taken again, are cut off."""

    def __init__(self, folder: Path, step: int):
        self._path = folder / METRICS
        require_own(self._path)
        if self._path.exists():
            _cut_behind(step, self._path)
        # unbuffered: what could not be written must not be tried again when the file is closed
        self._metrics = open(self._path, "ab", buffering=0)  # noqa: SIM115  (open as long as the run)
        try:
            self._events = _EventFile(folder / EVENTS, step + 1)
        except BaseException:
            self._metrics.close()
            raise
        sync_folder(folder)

    def write(self, report: StepReport) -> None:
        """Log one step."""
        scalars = {name: getattr(report, name) for name in ("loss", "lr", "images_per_s", "wait_share")}
        try:
            self._metrics.write((json.dumps(dataclasses.asdict(report)) + "\n").encode())
            self._events.add(report.step, scalars | {f"parts/{name}": value for name, value in report.parts.items()})
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
        self._events.close()


class _EventFile:
    """A file of scalars as TensorBoard reads them. What earlier files hold from `first_step` on is void."""

    def __init__(self, folder: Path, first_step: int):
        require_own(folder)
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115  (open as long as the run)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


def _cut_behind(step: int, metrics: Path) -> None:
    """Keep the lines of steps up to `step`; a machine that died may have left a torn line behind them."""
    n_kept = 0
    with open(metrics, "rb") as lines, open(aside(metrics), "xb") as kept:
        while (line := lines.readline(LONGEST_LINE)) and _step_of(line) <= step:
            kept.write(line)
            n_kept += 1
    publish(metrics)
    if n_kept != step:
        warnings.warn(f"{metrics} has lines for {n_kept} of the {step} steps taken so far.", stacklevel=4)


def _step_of(line: bytes) -> float:
    """The step that a line is of; infinity if it is no line of ours."""
    try:
        step = json.loads(line)["step"]
        return step if line.endswith(b"\n") and isinstance(step, int) else float("inf")
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
