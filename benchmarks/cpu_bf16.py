"""bfloat16 on a CPU that has it, against float32: crops/s of the bare teacher (clip-b16, five layers and attention), and of
training (maskalign-b16 on a batch that is there).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.teacher_values import teacher_shape
from student.modules.model import Student
from teacher_cache.device import cpu_bf16
from teacher_cache.teachers import load_teacher

from . import made_up, measure
from .cached_or_live import teacher_alone
from .student_step import Loop, Resident, config_of

PRECISIONS = ("fp32", "bf16")


@click.command()
@measure.options
def main(tiny: bool, rounds: int, scratch: Path | None):
    """Crops/s in bf16 over those in fp32, of the teacher and of training."""
    if cpu_bf16() is None:
        measure.not_run("cpu-bf16", "this processor has no bf16")
        return
    where = measure.environment()
    name, described, batch, n_steps = ("demo", made_up.SMALL, 4, 1) if tiny else ("clip-b16", made_up.VIT_B16, 16, 2)
    with measure.scratch_folder(scratch, 0 if tiny else 1 << 30) as folder:
        teachers = {p: load_teacher(name, "random:0", None, "cpu", p) for p in PRECISIONS}
        depth, side = teachers["fp32"].spec.depth, teachers["fp32"].spec.image_size
        images, layers = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8), tuple(range(depth - 4, depth + 1))
        runs = {f"teacher, {p}": lambda t=teachers[p]: teacher_alone(t, images, layers, n_steps) for p in PRECISIONS}

        cache = made_up.make_cache(folder, batch, described.image_size)
        made_up.add_targets(cache, described, shard_rows=batch)
        shapes = (teacher_shape(described),)
        config = config_of("maskalign-b16", tiny, shapes, described.image_size, batch)
        source = CachedSource(cache, [made_up.NAME], Student(config, shapes).needs, batch_size=batch)
        resident = Resident(next(source.micro_batches(0, 1)), source.steps_per_epoch)
        loops = {p: Loop(replace(config, precision=p), resident, shapes, "cpu", folder / p, False) for p in PRECISIONS}
        runs |= {f"training, {p}": lambda loop=loops[p]: loop.take(n_steps, 1) for p in PRECISIONS}
        found = measure.take_turns(runs, rounds)
        for loop in loops.values():
            loop.close()
    claims = [
        measure.claim(f"{what}: bf16 / fp32", found.over(f"{what}, bf16", f"{what}, fp32"), goal)
        for what, goal in (("teacher", 1.8), ("training", 1.5))
    ]
    conditions = [f"{cpu_bf16()}; {name} with random weights and maskalign-b16, batches of {batch}"]
    measure.report("cpu-bf16", claims, found.figures("crops/s"), conditions, where)


if __name__ == "__main__":
    main()
