"""What becomes of a run when something ends it: the last completed step is saved, and what is known of the failed one kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..devices.distributed import abandon, rank, tell_failure, world_size
from ..errors import NonFiniteLossError, PeerFailedError, RunError
from ..files.changes import to_json
from ..seeds import position_seed
from .failures import write_failure

if TYPE_CHECKING:
    from .trainer import Trainer

DEVICE_WAIT = 60.0
"""Seconds that a GPU has, after a failure, to be done with the last completed step."""


@dataclass
class StepState:
    """How far the step under way has come."""

    is_begun: bool = False
    """Whether it has begun and its update of the weights is not made."""
    is_torn: bool = False
    """Whether that update, with its line in the log, has begun and not ended."""
    known: dict = field(default_factory=dict)
    """What is known of it, for the record of its failure: see failures.py."""
    updated: torch.cuda.Event | None = None
    """When the device is done with the last completed step; None on a CPU."""


def rescue(trainer: Trainer, error: BaseException) -> None:
    """After a failure here or elsewhere: tell the others, save the last completed step, note on the error what is saved.

    This process's last step is one that all have completed: all gave their gradients to it before any took it.
    """
    if isinstance(error, KeyboardInterrupt) and world_size() == 1:
        trainer.save()
        return
    agreed = isinstance(error, NonFiniteLossError)  # raised in all processes, of numbers that all have
    if not agreed:
        tell_failure(str(error) or type(error).__name__)
    try:
        if trainer.state.is_torn:
            raise RunError("the update of the weights, or its line in the log, was under way")
        with _aside_of_stuck_work(trainer):
            trainer.save(only_finite=True)
        lost = ""
    except Exception as second:  # noqa: BLE001  (the first error is raised)
        lost = f" Step {trainer.step:,} could not be saved: {second}"
    if not agreed:
        abandon()
    if trainer.directory is None:
        return
    saved = "No step is saved."
    if trainer.saved_step:
        saved = f"Step {trainer.saved_step:,} is saved; the same command goes on from there."
    record = ""
    if isinstance(error, Exception) and trainer.state.is_begun:
        try:
            record = f" {_put_on_record(trainer, error)} says what is known of step {trainer.step + 1:,}."
        except Exception as third:  # noqa: BLE001
            record = f" What is known of step {trainer.step + 1:,} could not be written: {third}"
    error.add_note(saved + lost + record)


@contextlib.contextmanager
def _aside_of_stuck_work(trainer: Trainer) -> Iterator[None]:
    """Where a GPU waits for a process that will not come, the last completed step is read on a stream beside that."""
    updated = trainer.state.updated
    if updated is None:
        yield
        return
    deadline = time.monotonic() + DEVICE_WAIT
    while not updated.query():
        if time.monotonic() > deadline:
            raise RunError("the GPU did not end it")
        time.sleep(0.05)
    with torch.cuda.stream(torch.cuda.Stream(trainer.device)):
        yield


def _put_on_record(trainer: Trainer, error: Exception) -> Path:
    """Write failed-NNNNNNNN.json of the step under way."""
    config, step = trainer.config, trainer.step
    facts = {
        "error": f"{type(error).__name__}: {error}",
        "process": error.rank if isinstance(error, PeerFailedError) else rank(),
        "processes": world_size(),
        "micro_batches": trainer.accumulate,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "saved_step": trainer.saved_step,
        "changes": to_json(trainer.changes),
        "noise": {"generator_seed": position_seed("mask", config.seed, step)},
        "drops": {"generator_seed": position_seed("drop path", config.seed, step)},
    }
    if hasattr(trainer.source, "rows_of"):
        facts["view"], facts["rows"] = trainer.source.rows_of(step)
    return write_failure(trainer.directory.path, step + 1, facts | trainer.state.known)
