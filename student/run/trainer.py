"""The loop: batch -> mask -> forward -> loss -> backward -> step -> log. Nothing else happens here.

Everything random in a step is a function of (seed, step, row), so an interrupted run that is started again takes the very steps
it would have taken: on a CPU to the bit. Several processes (torch.distributed) share each step: a process takes its slice of the
rows, of the masks and of what is dropped, and they stop, fail and go on together. Whatever ends a run, the last step that all of
them completed is saved.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..batch import Batch, BatchSource, Mask
from ..config import TrainConfig
from ..devices.distributed import any_of, barrier, gathered, rank, sharing_gradients, world_size
from ..devices.micro_batches import micro_batches, number_in_step
from ..errors import ConfigError, NonFiniteLossError, RunError, RunMismatchError
from ..files.changes import VIEWS, Change, config_at, extended, schedule_at, total_epochs
from ..files.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ..files.logs import ProbeReport, StepReport
from ..files.run_directory import RunDirectory, recorded_changes
from ..loggers.follow import Ended, Followers, RunToLog
from ..masking import draw_noise
from ..modules.average import WeightAverage
from ..modules.model import Student
from ..seeds import position_seed
from .interrupts import deferred_interrupts
from .optim import build_optimizer, set_hyperparameters
from .probing import Probe, sentence
from .progress import StepDisplay
from .rates import learning_rate
from .rescue import StepState, rescue


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
        changes: Mapping[str, str] | None = None,
        micro_batch: int | None = None,
        checkpoint_every: int | None = None,
        keep_checkpoints: int = 2,
        compiled: bool = False,
        log_every: int = 50,
        on_step: Callable[[StepReport], None] | None = None,
        data_from: str = "",
        init: dict | None = None,
        probe: Probe | None = None,
        followers: Followers | None = None,
    ):
        """
        config: what the run was begun with.
        changes: settings that have other values from the next step on, "optim.base_lr" -> "1e-4"; see `changes.extended`. They
            are kept: the run goes on with them when it is started again, given again or not.
        micro_batch: crops that a device holds at once; by default what `config.accumulate` leaves of its share. The source must
            give batches of that size.
        checkpoint_every: steps between checkpoints, beside the one at the end of every epoch.
        keep_checkpoints: how many of them stay, the newest ones; at least 1.
        compiled: run the forward pass through torch.compile, as one graph.
        log_every: steps between plain lines where there is no terminal; metrics.jsonl has every step.
        on_step: called after each step with its report; may raise KeyboardInterrupt to stop the run.
        data_from: where the data lies, written into config.json for people; it may have moved when the run goes on.
        init: what the encoder of `student` began from, kept in the run: the record of exports.initial.begin.
        probe: what is asked of the encoder while the run goes on. Process 0 alone asks; the others go on to their next step, and
            wait for it there.
        followers: loggers that are sent what metrics.jsonl says, by process 0.
        """
        self.accumulate = micro_batches(config, world_size(), micro_batch)
        self.n_micro_batches = self.accumulate * world_size()  # of a step, over all processes
        self.config = config
        self.device = torch.device(device)
        self.autocast = _autocasts(config.precision, self.device)
        self.student = student.to(self.device).train()
        self.optimizer = build_optimizer(self.student, config.optim)
        self.average = WeightAverage(self.student, config.optim.ema) if config.optim.ema else None
        if compiled:
            self.student.compile(fullgraph=True)
        self.forward = sharing_gradients(self.student, self.device)
        self.source = source
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.log_every = log_every
        self.on_step = on_step
        self.probe = probe if rank() == 0 else None
        self.followers = followers if rank() == 0 else None

        self.state = StepState()
        self.directory = RunDirectory(out_dir, config, source.identity) if rank() == 0 else None
        try:
            self._resume(out_dir, changes or {}, data_from, init or {})
        except BaseException:
            self._close_directory()
            raise

    def fit(self, max_steps: int | None = None) -> int:
        """Train to the end of the run, or until `max_steps` steps of it are done; the number of completed steps.

        The last completed step is saved, whatever ends the run; what ended it is raised again, with a note that says which step
        is saved. Of an error, failures.py says what else is kept. Raises NonFiniteLossError, with the weights as they were
        before the step, RunError if the data source gives other batches than promised, PeerFailedError where another process
        has failed.
        """
        last_step = self.total_steps if max_steps is None else min(max_steps, self.total_steps)
        ended: Ended = "failed"
        try:
            if self.step < last_step:
                if world_size() == 1:
                    self._train_to(last_step)
                else:
                    with deferred_interrupts() as arrived:
                        try:
                            stopped = self._train_to(last_step, arrived)
                        except Exception:
                            arrived.clear()  # a launcher ends all when one fails; what went wrong is to be heard, not that
                            raise
                    if stopped:  # by a signal to another process; one to this process has been delivered
                        raise KeyboardInterrupt
            elif self.probe or self.followers:  # interrupted behind its last step, or a logger lacks something
                with contextlib.closing(StepDisplay(self.step, self.step, self.log_every)) as display:
                    self._open_logs(display)
            ended = "finished" if self.step >= self.total_steps else "stopped"
        except KeyboardInterrupt:
            ended = "stopped"
            raise
        finally:
            try:
                if self.followers:
                    self.followers.close(ended, whole=not self._probe_is_missing())
            finally:
                self._close_directory()
        return self.step

    def _train_to(self, last_step: int, signals: Sequence[int] = ()) -> bool:
        """Whether it stopped early because there are `signals`, in this process or another: they stop at the same step."""
        batches = self.source.micro_batches(self.step, last_step)
        display = StepDisplay(self.step, last_step, self.log_every) if self.directory else None
        try:
            self._open_logs(display)
            stopped = False
            while self.step < last_step and not stopped:
                report, stopped = self._take_step(batches, signals)
                if display:
                    display.show(report)
                if self.on_step is not None:
                    self.on_step(report)
                if self._checkpoint_is_due():
                    self.save()
                    self._ask_probe(display)
            self.save()
            return stopped
        except BaseException as error:
            rescue(self, error)
            raise
        finally:
            if display:
                display.close()
            if hasattr(batches, "close"):
                batches.close()

    def _open_logs(self, display: StepDisplay | None) -> None:
        """Open the logs behind the last step, and ask the probe that is still missing there."""
        if self.directory:
            self.directory.open_logs(self.step)
        if self.followers:
            self.followers.open(RunToLog(self.directory.path, self.config, self.source.identity, self.step))
        self._ask_probe(display)

    def _probe_is_missing(self) -> bool:
        """Whether the probe of the weights of this step is due, and the log does not have it."""
        if self.probe is None or self.directory.probed == self.step:
            return False
        return self.probe.is_due(self.step, self.source.steps_per_epoch, self.total_steps)

    def _ask_probe(self, display: StepDisplay | None) -> None:
        """Ask the probe of the weights that were saved just now, unless the log has it."""
        if self._probe_is_missing():
            found, epoch = self.probe.ask(self.student.backbone, self.device), self.step / self.source.steps_per_epoch
            self.directory.write_probe(ProbeReport(self.step, epoch, found))
            display.say(sentence(epoch, found))

    def _take_step(self, batches: Iterator[Batch], signals: Sequence[int]) -> tuple[StepReport, bool]:
        """The report of one step, and whether the processes have agreed to stop behind it."""
        started = time.perf_counter()
        waited = 0.0
        self.state.is_begun = True
        if self.step in self._boundaries:
            self._use_settings()
        optim = self.settings.optim

        begin, end = (epoch * self.source.steps_per_epoch for epoch in self._schedule)
        epochs = self._schedule[1] - self._schedule[0]
        lr = learning_rate(self.step - begin, self.source.steps_per_epoch, epochs, self.config.batch_size, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()

        self.state.known = {"learning_rate": lr}
        losses, rows, parts = [], [], {}
        for index in range(self.accumulate):
            asked = time.perf_counter()
            batch = self._next(batches, self.config.batch_size // self.n_micro_batches)
            waited += time.perf_counter() - asked

            number = number_in_step(index, rank(), world_size())
            mask = batch.mask or self._draw_mask(batch, number)
            drops = self._draw_drops(number)
            with self._gradients_shared(index == self.accumulate - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss, micro_parts = self.forward(batch, mask, drops)

                (loss / self.accumulate).backward()
            self.student.after_batch()

            losses.append(loss.detach())
            rows.append(batch.rows)
            for name, value in micro_parts.items():
                parts.setdefault(name, []).append(value)

        parameters = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])

        # Here every process has given its device all there is to do. Only now does the host wait for the device: before the
        # update, so that nothing broken ever reaches a weight.
        stopped = world_size() > 1 and any_of(bool(signals))
        values = torch.stack([*losses, norm, *(torch.stack(value).mean() for value in parts.values())]).tolist()
        by_process = gathered(torch.tensor(values, dtype=torch.float64)[None])  # [world, accumulate + 1 + parts]
        losses = by_process[:, : self.accumulate].T.flatten().tolist()  # in the order of the step
        norms = by_process[:, self.accumulate].tolist()
        parts = dict(zip(parts, by_process[:, self.accumulate + 1 :].mean(0).tolist(), strict=True))
        self.state.known |= {"losses": losses, "parts": parts, "gradient_norm": norms[0]}
        self._require_finite(losses, rows, parts, norms)

        if optim.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip_grad, norm)

        # Weights, counter and log line change together, or a checkpoint after Ctrl-C would not be what it says.
        with deferred_interrupts():
            self.state.is_torn = True
            self.optimizer.step()
            self.step += 1
            self.state.is_begun = False
            self.student.after_step(self.step - begin, end - begin)
            if self.average:
                self.average.update()
            if self.device.type == "cuda":
                self.state.updated = torch.cuda.current_stream(self.device).record_event()
            self.state.known = {}
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
            self.state.is_torn = False
        return report, stopped

    def _draw_mask(self, batch: Batch, number: int) -> Mask:
        # The masks of a step are drawn for all its crops at once, so they do not depend on how it is cut up.
        noise = draw_noise(self.config.seed, self.step, self.config.batch_size, self.student.n_patches)
        return self.student.draw_mask(batch, noise.chunk(self.n_micro_batches)[number])

    def _draw_drops(self, number: int) -> Tensor | None:
        """What is dropped of micro-batch `number` of the step, drawn as its masks are: float32 [B, S] on the device."""
        if self.config.drops == "micro-batches":  # a run of before: torch's generator draws in the forward pass
            torch.manual_seed(position_seed("drop path", self.config.seed, self.step, number))
            return None
        pinned = self.device.type == "cuda"
        drops = self.student.draw_drops(self.config.seed, self.step, self.config.batch_size, pinned)
        return None if drops is None else drops.chunk(self.n_micro_batches)[number].to(self.device, non_blocking=pinned)

    def _gradients_shared(self, last: bool) -> contextlib.AbstractContextManager:
        """Between processes gradients are exchanged in the last backward pass of a step."""
        return contextlib.nullcontext() if last or world_size() == 1 else self.forward.no_sync()

    def _next(self, batches: Iterator[Batch], n_crops: int) -> Batch:
        batch = next(batches, None)
        if batch is None:
            raise RunError(
                f"The data source ended at step {self.step + 1} of {self.total_steps}: it must give "
                f"{self.accumulate} batches for each of {self.source.steps_per_epoch} steps an epoch."
            )
        if len(batch.images) != n_crops:
            raise RunError(
                f"The data source gave a batch of {len(batch.images)} crops at step {self.step + 1}; "
                f"batch_size={self.config.batch_size}, cut into {self.n_micro_batches}, makes {n_crops}."
            )
        return batch

    def _require_finite(self, losses: list[float], rows: list[Tensor], parts: dict[str, float], norms: list[float]) -> None:
        """losses: of all micro-batches.  norms: of the whole gradient, by process; it can overflow where no loss does."""
        broken = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        odd = [norm for norm in norms if not math.isfinite(norm)]
        if not broken and not odd:
            return
        rows = gathered(torch.stack(rows)).unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1).tolist()  # in order
        if broken:
            what, bad = f"loss became {losses[broken[0]]}", rows[broken[0]]
        else:
            what, bad = f"norm of the gradient became {odd[0]}, under finite losses,", sum(rows, [])
        self.state.known["rows"] = sum(rows, [])
        step = self.step + 1
        listed = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        raise NonFiniteLossError(
            f"The {what} at step {step} ({listed}). Rows of that batch: {bad}. Look at their crops and targets; if they are "
            "sound, lower the rate or clip the gradient and go on: --change optim.base_lr=..., --change optim.clip_grad=...",
            step,
            tuple(bad),
        )

    def _checkpoint_is_due(self) -> bool:
        at_epoch_end = self.step % self.source.steps_per_epoch == 0
        return at_epoch_end or (self.checkpoint_every is not None and self.step % self.checkpoint_every == 0)

    def save(self, only_finite: bool = False) -> None:
        """Write a checkpoint of the last completed step, unless there is one. Ctrl-C and SIGTERM wait until it is written.

        only_finite: raise RunError instead where a weight or a moment is not.
        """
        if self.step == self.saved_step:
            return
        with deferred_interrupts():
            if self.directory:
                self.directory.sync()
                changes = [change for change in self.changes if change.step < self.step]
                save_checkpoint(
                    self.directory.path, self.step, self.student, self.optimizer, self.config, self.source.identity,
                    self.average, self.keep_checkpoints, changes, getattr(self.source, "pixels", None), only_finite, self.init,
                )  # fmt: skip
            self.saved_step = self.step

    def _use_settings(self) -> None:
        """Take the settings of the next step: the configuration is a function of the step."""
        self.settings = config_at(self.config, self.changes, self.step)
        self._schedule = schedule_at(self.config, self.changes, self.step)
        set_hyperparameters(self.optimizer, self.student, self.settings.optim)
        self.student.weights = {objective.name: objective.weight for objective in self.settings.objectives}
        if self.average:
            self.average.decay = self.settings.optim.ema
        self._boundaries = {change.step for change in self.changes}

    def _resume(self, out_dir: Path, changes: Mapping[str, str], data_from: str, init: dict) -> None:
        """Go to where the run in `out_dir` is: weights, step and changes of its newest checkpoint, if it has one."""
        barrier()  # the directory is this run's before any other process looks into it
        self.step = self.saved_step = 0
        self.init = init
        recorded, led_here = recorded_changes(out_dir), ()
        if checkpoint := latest_checkpoint(out_dir):
            there = load_checkpoint(checkpoint, self.student, self.optimizer, self.config, self.source.identity, self.average)
            self.step = self.saved_step = there.step
            self.init = there.init
            led_here = there.known_changes(checkpoint)
            recorded = led_here if recorded is None else recorded
            _require_same_history(checkpoint, led_here, [change for change in recorded if change.step < self.step])
        self._require_equal_steps(out_dir)
        if changes and recorded is None:
            raise ConfigError(f"{out_dir} holds no run that could be changed. Begin one with these values: --set, --views.")
        views = self.source.identity.get("views", ())
        views_of = getattr(self.source, "views_of", None)
        per_epoch = self.source.steps_per_epoch
        self.changes = extended(self.config, recorded or (), changes, self.step, views, views_of, per_epoch)
        self.total_steps = total_epochs(self.config, self.changes) * per_epoch
        if any(change.key == VIEWS for change in self.changes):
            self.source.change_views([(change.step, change.new) for change in self.changes if change.key == VIEWS])
        self._use_settings()
        self.is_new = False
        if self.directory:
            self.is_new = self.directory.describe(data_from, self.changes, getattr(self.source, "pixels", None), self.init)

    def _require_equal_steps(self, out_dir: Path) -> None:
        steps = gathered(torch.tensor([self.step])).tolist()
        if len(set(steps)) > 1:
            raise RunError(
                f"The processes of this run see checkpoints of different steps in {out_dir}: {steps}. Put the directory on a "
                "disk that all of them share."
            )

    def _close_directory(self) -> None:
        if self.directory:
            self.directory.close()


def _autocasts(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16 where that is safe. `auto` is float32 on a CPU."""
    return precision == "bf16" or precision == "auto" and device.type == "cuda"


def _require_same_history(checkpoint: Path, led_here: Sequence[Change], recorded: Sequence[Change]) -> None:
    if list(led_here) != list(recorded):
        sides = ["; ".join(map(str, changes)) or "nothing" for changes in (led_here, recorded)]
        raise RunMismatchError(
            f"The checkpoint {checkpoint} was made with {sides[0]} changed, config.json beside it says {sides[1]}. Restore what "
            "belongs together, or delete config.json: the same command writes it again from the checkpoint."
        )
