"""The loop: batch -> mask -> forward -> loss -> backward -> step -> log. Nothing else happens here.

Everything random in a step is a function of (seed, step, micro-batch), so an interrupted run that is started again takes
the very steps it would have taken: on a CPU to the bit. Several processes (torch.distributed) share each step: a process takes
its slice of the rows and of the masks, and they stop, fail and go on together.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .average import WeightAverage
from .batch import Batch, BatchSource
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .distributed import any_of, barrier, gathered, rank, world_size
from .errors import ConfigError, NonFiniteLossError, RunError
from .interrupts import deferred_interrupts
from .logs import StepReport
from .masking import Mask, draw_noise
from .model import Student
from .optim import build_optimizer, learning_rate
from .progress import StepDisplay
from .run_directory import RunDirectory
from .seeds import position_seed


class Trainer:
    """One run in one directory. A directory that holds the same run already is continued from its last checkpoint.

    The directory belongs to this trainer until `fit` is done, or to its process; then another can be made to go on.

    step: completed steps so far.  saved_step: those that a checkpoint holds.  total_steps: those of the whole run.
    is_new: the directory held no run before.
    Raises RunMismatchError if `out_dir` holds another run or other files or is in use, RunError if its newest checkpoint is
    damaged, ConfigError if the device cannot do the precision.
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
        compiled: bool = False,
        log_every: int = 50,
        on_step: Callable[[StepReport], None] | None = None,
        data_from: str = "",
    ):
        """
        checkpoint_every: steps between checkpoints, beside the one at the end of every epoch.
        keep_checkpoints: how many of them stay, the newest ones; at least 1.
        compiled: run the forward pass through torch.compile, as one graph.
        log_every: steps between plain lines where there is no terminal; metrics.jsonl has every step.
        on_step: called after each step with its report; may raise KeyboardInterrupt to stop the run.
        data_from: where the data lies, written into config.json for people; it may have moved when the run goes on.
        """
        self.n_places = config.accumulate * world_size()  # micro-batches of a step, over all processes
        if config.batch_size % self.n_places:
            raise ConfigError(
                f"batch_size={config.batch_size} cannot be cut into equal parts for accumulate={config.accumulate} and "
                f"{world_size()} processes. Take a multiple of {self.n_places}."
            )
        self.config = config
        self.device = torch.device(device)
        self.autocast = _autocasts(config.precision, self.device)
        self.student = student.to(self.device).train()
        self.optimizer = build_optimizer(self.student, config.optim)
        self.average = WeightAverage(self.student, config.optim.ema) if config.optim.ema else None
        if compiled:
            self.student.compile(fullgraph=True)
        self.forward = self.student
        if world_size() > 1:
            self.forward = DistributedDataParallel(self.student, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.source = source
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.log_every = log_every
        self.on_step = on_step
        self.total_steps = config.epochs * source.steps_per_epoch

        self.directory = RunDirectory(out_dir, config, source.identity) if rank() == 0 else None
        try:
            barrier()  # the directory is this run's before any other process looks into it
            self.step = self.saved_step = 0
            if checkpoint := latest_checkpoint(out_dir):
                self.step = self.saved_step = load_checkpoint(
                    checkpoint, student, self.optimizer, config, source.identity, self.average
                )
            self._require_equal_steps(out_dir)
            self.is_new = self.directory.describe(data_from) if self.directory else False
        except BaseException:
            self._close_directory()
            raise

    def fit(self, max_steps: int | None = None) -> int:
        """Train to the end of the run, or until `max_steps` steps of it are done; the number of completed steps.

        The last step is saved, also when KeyboardInterrupt stops the run, which is then raised again.
        Raises NonFiniteLossError, with the weights as they were before the step, and RunError if the data source
        gives other batches than promised.
        """
        last_step = self.total_steps if max_steps is None else min(max_steps, self.total_steps)
        try:
            if self.step < last_step:
                if world_size() == 1:
                    self._train_to(last_step)
                else:
                    with deferred_interrupts() as arrived:
                        stopped = self._train_to(last_step, arrived)
                    if stopped:  # by a signal to another process; one to this process has been delivered
                        raise KeyboardInterrupt
        finally:
            self._close_directory()
        return self.step

    def _train_to(self, last_step: int, signals: Sequence[int] = ()) -> bool:
        """Whether it stopped early because there are `signals`, in this process or another: they stop at the same step."""
        batches = self.source.micro_batches(self.step, last_step)
        display = StepDisplay(self.step, last_step, self.log_every) if self.directory else None
        try:
            if self.directory:
                self.directory.open_logs(self.step)
            stopped = False
            while self.step < last_step and not stopped:
                report = self._take_step(batches)
                if display:
                    display.show(report)
                if self.on_step is not None:
                    self.on_step(report)
                if self._checkpoint_is_due():
                    self.save()
                stopped = world_size() > 1 and any_of(bool(signals), self.device)
            self.save()
            return stopped
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            if display:
                display.close()
            if hasattr(batches, "close"):
                batches.close()

    def _close_directory(self) -> None:
        if self.directory:
            self.directory.close()

    def _require_equal_steps(self, out_dir: Path) -> None:
        steps = gathered(torch.tensor([self.step], device=self.device)).tolist()
        if len(set(steps)) > 1:
            raise RunError(
                f"The processes of this run see checkpoints of different steps in {out_dir}: {steps}. Put the directory on a "
                "disk that all of them share."
            )

    def save(self) -> None:
        """Write a checkpoint of the last completed step, unless there is one. Ctrl-C and SIGTERM wait until it is written."""
        if self.step == self.saved_step:
            return
        with deferred_interrupts():
            if self.directory:
                self.directory.sync()
                save_checkpoint(
                    self.directory.path, self.step, self.student, self.optimizer, self.config, self.source.identity,
                    self.average, self.keep_checkpoints,
                )  # fmt: skip
            self.saved_step = self.step

    def _take_step(self, batches: Iterator[Batch]) -> StepReport:
        started = time.perf_counter()
        waited = 0.0

        lr = learning_rate(self.step, self.source.steps_per_epoch, self.config.epochs, self.config.batch_size, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()

        losses, rows, parts = [], [], {}
        for index in range(self.config.accumulate):
            asked = time.perf_counter()
            batch = self._next(batches, self.config.batch_size // self.n_places)
            waited += time.perf_counter() - asked

            place = rank() * self.config.accumulate + index  # among the micro-batches of the step, over all processes
            mask = batch.mask or self._draw_mask(batch, place)
            torch.manual_seed(position_seed("drop path", self.config.seed, self.step, place))
            with self._gradients_shared(index == self.config.accumulate - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss, micro_parts = self.forward(batch, mask)

                (loss / self.config.accumulate).backward()
            self.student.after_batch()

            losses.append(loss.detach())
            rows.append(batch.rows)
            for name, value in micro_parts.items():
                parts.setdefault(name, []).append(value)

        parameters = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])

        # Only now does the host wait for the device: before the update, so that nothing broken ever reaches a weight.
        losses = gathered(torch.stack(losses)).tolist()
        parts = dict(zip(parts, gathered(torch.stack([torch.stack(v).mean() for v in parts.values()])[None]).mean(0).tolist(),
                         strict=True))  # fmt: skip
        self._require_finite(losses, rows, parts, norm.item())

        if self.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_grad, norm)

        # Weights, counter and log line change together, or a checkpoint after Ctrl-C would not be what it says.
        with deferred_interrupts():
            self.optimizer.step()
            self.step += 1
            self.student.after_step(self.step, self.total_steps)
            if self.average:
                self.average.update()
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
            if self.directory:
                self.directory.write(report)
        return report

    def _draw_mask(self, batch: Batch, place: int) -> Mask:
        # The masks of a step are drawn for all its crops at once, so they do not depend on how it is cut up.
        noise = draw_noise(self.config.seed, self.step, self.config.batch_size, self.student.n_patches)
        return self.student.draw_mask(batch, noise.chunk(self.n_places)[place])

    def _gradients_shared(self, last: bool):
        """Between processes gradients are exchanged in the last backward pass of a step."""
        return contextlib.nullcontext() if last or world_size() == 1 else self.forward.no_sync()

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

    def _require_finite(self, losses: list[float], rows: list[Tensor], parts: dict[str, float], norm: float) -> None:
        """norm: of the whole gradient, which can overflow where no loss does."""
        broken = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if not broken and math.isfinite(norm):
            return
        rows = gathered(torch.stack(rows).to(self.device)).tolist()  # every process comes here, or none
        if broken:
            what, bad = f"loss became {losses[broken[0]]}", rows[broken[0]]
        else:
            what, bad = f"norm of the gradient became {norm}, under finite losses,", sum(rows, [])
        step = self.step + 1
        listed = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        raise NonFiniteLossError(
            f"The {what} at step {step} ({listed}). Rows of that batch: {bad}. Look at their crops and targets; if they are "
            "sound, lower optim.base_lr or set optim.clip_grad. The run is as its last checkpoint left it.",
            step,
            tuple(bad),
        )

    def _checkpoint_is_due(self) -> bool:
        at_epoch_end = self.step % self.source.steps_per_epoch == 0
        return at_epoch_end or (self.checkpoint_every is not None and self.step % self.checkpoint_every == 0)


def _autocasts(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16 where that is safe."""
    if precision == "bf16" and device.type != "cuda":
        raise ConfigError(f"precision=bf16 needs a CUDA device; this run is on {device}. Use precision=auto or fp32.")
    return precision != "fp32" and device.type == "cuda"
