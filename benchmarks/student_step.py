"""Training from a cache against training on one batch that is already on the device, over and over: what the data costs a step.

The trainer, the student and the step are those of `student-train`; only the source differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.teacher_values import teacher_shape
from pipelines.presets import recipe
from student.batch import Batch
from student.modules.model import Student
from student.run.trainer import Trainer
from teacher_cache.device import pick_device

from . import made_up, measure


class Resident:
    """A source that gives the same batch for ever."""

    def __init__(self, batch: Batch, steps_per_epoch: int):
        self.batch, self.steps_per_epoch, self.identity = batch, steps_per_epoch, {"resident": True}

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        for _ in range(first_step, last_step):
            yield self.batch


class Loop:
    """A trainer without its folder: each call takes some steps more. Compiled or not, as `student-train --compile`."""

    def __init__(self, config, source, shapes, device: str, folder: Path, compiled: bool):
        self.trainer = Trainer(config, Student(config, shapes), source, folder, device, compiled=compiled)
        self.trainer.directory.open_logs(0)
        self.batches = source.micro_batches(0, self.trainer.total_steps)
        self.device = torch.device(device)

    def take(self, n_steps: int, n_before: int = 2) -> float:
        """Crops/s, negative (measure.take_turns), of `n_steps` after `n_before` that are not timed."""
        for _ in range(n_before):
            self.trainer._take_step(self.batches, ())
        self._wait()
        started = time.perf_counter()
        for _ in range(n_steps):
            self.trainer._take_step(self.batches, ())
        self._wait()
        return -n_steps * self.trainer.config.batch_size / (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        if hasattr(self.batches, "close"):
            self.batches.close()
        self.trainer._close_directory()


def config_of(preset: str, tiny: bool, shapes, image_size: int, batch: int):
    """The preset's configuration with `batch` crops a step in one piece, and enough epochs to go on for ever.

    The learning rate ends at 0: that of the preset may be above the peak of so small a batch.
    """
    made = recipe(preset)
    config = made.tiny(shapes, image_size).config if tiny else made.config
    return replace(config, batch_size=batch, accumulate=1, epochs=100_000, optim=replace(config.optim, min_lr=0.0))


@click.command()
@click.option("--preset", "presets", multiple=True, default=("maskalign-b16", "mr-mae-b16"), show_default=True)
@click.option("--device", default="auto", show_default=True, help="Without a GPU it is not run, unless this is cpu.")
@click.option("--batch", type=click.IntRange(1), help="[default: 256; with --tiny 8]")
@click.option("--rows", type=click.IntRange(1), help="Of the cache. [default: 8192; with --tiny 32]")
@click.option("--compile", "compiled", is_flag=True, help="As student-train --compile.")
@measure.options
def main(presets, device: str, batch, rows, compiled: bool, tiny: bool, rounds: int, scratch: Path | None):
    """Steps/s from the cache over steps/s on a batch that is on the device."""
    if device == "auto" and measure.gpu_name() is None:
        measure.not_run("student-step", "no GPU here")
        return
    where, (device, _) = measure.environment(), pick_device(device, "auto")
    teacher, n_rows, batch, n_steps = (made_up.SMALL, 32, batch or 8, 2) if tiny else (made_up.VIT_B16, 8192, batch or 256, 30)
    n_rows = rows or n_rows
    claims, figures, conditions = [], {}, [f"{device}, batches of {batch}" + ", compiled" * compiled]
    with measure.scratch_folder(scratch, 0 if tiny else n_rows * 1_200_000) as folder:
        cache = made_up.make_cache(folder, n_rows, teacher.image_size)
        store = made_up.add_targets(cache, teacher, shard_rows=max(8, n_rows // 8))
        shapes = (teacher_shape(teacher),)
        for preset in presets:
            config = config_of(preset, tiny, shapes, teacher.image_size, batch)
            student = Student(config, shapes)
            needs, masks = student.needs, student.masks_ahead(config)
            source = CachedSource(cache, [made_up.NAME], needs, batch_size=batch, device=device, masks=masks)
            resident = Resident(next(source.micro_batches(0, 1)), source.steps_per_epoch)
            loops = {
                f"{preset}: {name}": Loop(config, given, shapes, device, folder / f"{preset}-{name}", compiled)
                for name, given in (("cached", source), ("resident", resident))
            }
            found = measure.take_turns({name: lambda loop=loop: loop.take(n_steps) for name, loop in loops.items()}, rounds)
            for loop in loops.values():
                loop.close()
            ratios = found.over(f"{preset}: cached", f"{preset}: resident")
            claims.append(measure.claim(f"from the cache / resident batch, {preset}", ratios, 0.97))
            figures |= found.figures("crops/s")
            conditions.append(f"{preset}: layers {needs[0].layers}, {n_steps} steps a round, store {store.name}")
    measure.report("student-step", claims, figures, conditions, where)


if __name__ == "__main__":
    main()
