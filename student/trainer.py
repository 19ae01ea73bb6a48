"""The loop: batch -> mask -> forward -> loss -> backward -> step -> log. Nothing else happens here.

Everything random in a step is a function of (seed, step, micro-batch), so an interrupted run that is started again takes
the very steps it would have taken: on a CPU to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .batch import Batch, BatchSource
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .errors import ConfigError, NonFiniteLossError, RunError
from .interrupts import deferred_interrupts
from .masking import draw_noise
from .model import Student
from .optim import build_optimizer, learning_rate
from .progress import StepDisplay
from .run_directory import RunDirectory, StepReport
from .seeds import position_seed


class Trainer:
    """One run in one directory. A directory that holds the same run already is continued from its last checkpoint.

    step: completed steps so far.  total_steps: those of the whole run.
    Raises RunError if `out_dir` holds another run, other files or a damaged checkpoint, ConfigError if the
    device cannot do the precision.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        source: BatchSource,
        out_dir: Path,
        device: str | torch.device = "cpu",
        *,
        checkpoint_every: int | None = None,
        keep_checkpoints: int = 2,
        log_every: int = 50,
        on_step: Callable[[StepReport], None] | None = None,
    ):
        """
        checkpoint_every: steps between checkpoints, beside the one at the end of every epoch.
        log_every: steps between plain lines where there is no terminal; metrics.jsonl has every step.
        on_step: called after each step with its report; may raise KeyboardInterrupt to stop the run.
        """
        self.config = config
        self.device = torch.device(device)
        self.autocast = _autocasts(config.precision, self.device)
        self.student = student.to(self.device).train()
        self.optimizer = build_optimizer(self.student, config.optim)
        self.source = source
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.log_every = log_every
        self.on_step = on_step
        self.total_steps = config.epochs * source.steps_per_epoch

        self.directory = RunDirectory(out_dir, config, source.identity)
        self.step = self._saved_step = 0
        if checkpoint := latest_checkpoint(self.directory.path):
            self.step = self._saved_step = load_checkpoint(checkpoint, self.student, self.optimizer, config, source.identity)

    def fit(self, max_steps: int | None = None) -> int:
        """Train to the end of the run, or until `max_steps` steps of it are done; the number of completed steps.

        The last step is saved, also when KeyboardInterrupt stops the run, which is then raised again.
        Raises NonFiniteLossError, with the weights as they were before the step, and RunError if the data source
        gives other batches than promised.
        """
        last_step = self.total_steps if max_steps is None else min(max_steps, self.total_steps)
        if self.step >= last_step:
            return self.step

        batches = self.source.micro_batches(self.step, last_step)
        self.directory.open_logs(self.step)
        display = StepDisplay(self.step, last_step, self.log_every)
        try:
            while self.step < last_step:
                report = self._take_step(batches)
                display.show(report)
                if self.on_step is not None:
                    self.on_step(report)
                if self._checkpoint_is_due():
                    self.save()
            self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            display.close()
            self.directory.close()
            if hasattr(batches, "close"):
                batches.close()
        return self.step

    def save(self) -> None:
        """Write a checkpoint of the last completed step, unless there is one."""
        if self.step == self._saved_step:
            return
        self.directory.sync()
        save_checkpoint(
            self.directory.path, self.step, self.student, self.optimizer, self.config, self.source.identity, self.keep_checkpoints
        )
        self._saved_step = self.step

    def _take_step(self, batches: Iterator[Batch]) -> StepReport:
        started = time.perf_counter()
        waited = 0.0

        lr = learning_rate(self.step, self.source.steps_per_epoch, self.config.epochs, self.config.batch_size, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()

        # The masks of a step are drawn for all its crops at once, so they do not depend on how it is cut up.
        noise = draw_noise(self.config.seed, self.step, self.config.batch_size, self.student.n_patches)
        losses, rows, parts = [], [], {}
        for index, micro_noise in enumerate(noise.chunk(self.config.accumulate)):
            asked = time.perf_counter()
            batch = self._next(batches, len(micro_noise))
            waited += time.perf_counter() - asked

            torch.manual_seed(position_seed("drop path", self.config.seed, self.step, index))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss, micro_parts = self.student(batch, micro_noise.to(self.device))

            (loss / self.config.accumulate).backward()

            losses.append(loss.detach())
            rows.append(batch.rows)
            for name, value in micro_parts.items():
                parts.setdefault(name, []).append(value)

        # Only now does the host wait for the device: before the update, so that a broken loss never reaches a weight.
        losses = torch.stack(losses).tolist()
        parts = {name: torch.stack(values).mean().item() for name, values in parts.items()}
        self._require_finite(losses, rows, parts)

        if self.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.clip_grad)

        # Weights, counter and log line change together, or a checkpoint after Ctrl-C would not be what it says.
        with deferred_interrupts():
            self.optimizer.step()
            self.step += 1
            seconds = time.perf_counter() - started
            report = StepReport(
                step=self.step,
                epoch=self.step / self.source.steps_per_epoch,
                loss=sum(losses) / len(losses),
                parts=parts,
                lr=lr,
                images_per_s=self.config.batch_size / seconds,
                wait_share=waited / seconds,
            )
            self.directory.write(report)
        return report

    def _next(self, batches: Iterator[Batch], n_crops: int) -> Batch:
        batch = next(batches, None)
        if batch is None:
            raise RunError(
                f"The data source ended at step {self.step + 1} of {self.total_steps}: it must give "
                f"{self.config.accumulate} batches for each of {self.source.steps_per_epoch} steps an epoch."
            )
        if len(batch.images) != n_crops:
            raise RunError(
                f"The data source gave a batch of {len(batch.images)} crops at step {self.step + 1}; "
                f"batch_size={self.config.batch_size} and accumulate={self.config.accumulate} make "
                f"{n_crops}."
            )
        return batch

    def _require_finite(self, losses: list[float], rows: list[Tensor], parts: dict[str, float]) -> None:
        for loss, micro_rows in zip(losses, rows, strict=True):
            if not math.isfinite(loss):
                step, bad = self.step + 1, tuple(micro_rows.tolist())
                listed = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
                raise NonFiniteLossError(
                    f"The loss became {loss} at step {step} ({listed}). Rows of that batch: {list(bad)}. Look at "
                    f"their crops and targets; if they are sound, lower optim.base_lr or set optim.clip_grad.",
                    step,
                    bad,
                )

    def _checkpoint_is_due(self) -> bool:
        at_epoch_end = self.step % self.source.steps_per_epoch == 0
        return at_epoch_end or (self.checkpoint_every is not None and self.step % self.checkpoint_every == 0)


def _autocasts(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16 where that is safe."""
    if precision == "bf16" and device.type != "cuda":
        raise ConfigError(f"precision=bf16 needs a CUDA device; this run is on {device}. Use precision=auto or fp32.")
    return precision != "fp32" and device.type == "cuda"
