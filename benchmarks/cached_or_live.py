"""Training from a cache against training with the teacher run on the spot, and how near the gain comes to what is possible:

    ceiling = (t_teacher + t_student) / t_student

t_teacher: the bare teacher on a batch that is on the device. t_student: a step of the student on such a batch.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.live_source import LiveSource
from pipelines.feed.teacher_values import teacher_shape
from student.modules.model import Student
from teacher_cache.device import pick_device
from teacher_cache.extraction.extract import extract_view
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.teachers import load_teacher

from . import made_up, measure
from .student_step import Loop, Resident, config_of

TEACHER_OF = {"maskalign-b16": "clip-b16", "mr-mae-b16": "clip-b16", "milan-b16": "clip-b16", "cae-v2-b16": "clip-b16",
              "mimco-b16": "moco-v3-b16"}  # fmt: skip


def teacher_alone(teacher, images_u8: torch.Tensor, layers: tuple[int, ...], n_times: int) -> int:
    """The teacher over one batch, again and again; returns crops."""
    for _ in range(n_times):
        teacher(images_u8, layers)
    if images_u8.device.type == "cuda":
        torch.cuda.synchronize(images_u8.device)
    return n_times * len(images_u8)


@click.command()
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(TEACHER_OF)), help="[default: all of these]")
@click.option("--device", default="auto", show_default=True, help="Without a GPU it is not run, unless this is cpu.")
@click.option("--batch", type=click.IntRange(1), help="[default: 256; on a CPU, and with --tiny, 8]")
@measure.options
def main(presets, device: str, batch: int | None, tiny: bool, rounds: int, scratch: Path | None):
    """Speed-up of cached over live training, as a share of the ceiling, method by method. On a CPU, where a step of 8 crops takes
    seconds, 2 rounds of 2 steps at most."""
    if device == "auto" and measure.gpu_name() is None:
        measure.not_run("cached-or-live", "no GPU here")
        return
    where, (device, precision) = measure.environment(), pick_device(device, "auto")
    on_cpu = device == "cpu"
    n_rows, batch, n_steps, n_before = (32, batch or 8, 2, 1) if tiny or on_cpu else (2048, batch or 256, 30, 2)
    rounds = min(rounds, 2) if on_cpu else rounds
    claims, figures = [], {}
    conditions = [f"{device}, {precision}, batches of {batch}, {rounds} rounds of {n_steps} steps, random weights"]
    with measure.scratch_folder(scratch, 0 if tiny else 4 << 30) as folder:
        for preset in presets or TEACHER_OF:
            name = "demo" if tiny else TEACHER_OF[preset]
            teacher = load_teacher(name, None if tiny else "random:0", None, device, precision)
            size, shapes = teacher.spec.image_size, (teacher_shape(teacher.spec),)
            config = config_of(preset, tiny, shapes, size, batch)
            student = Student(config, shapes)
            needs = student.needs
            layers = tuple(teacher.spec.depth + 1 + offset for offset in needs[0].layers) or (teacher.spec.depth,)
            cache = made_up.make_cache(folder / preset, n_rows, size, plan=CropPlan(size=size, scale=(0.2, 1.0)))
            plan = ExtractPlan(",".join(map(str, layers)), shard_rows=n_rows // 4, batch_size=batch)
            extract_view(cache.view(0), name, teacher, plan)

            options = {"batch_size": batch, "device": device}
            sources = {
                "cached": CachedSource(cache, [name], needs, masks=student.masks_ahead(config), **options),
                "live": LiveSource(cache, [teacher], needs, **options),
            }
            first = next(sources["cached"].micro_batches(0, 1))
            sources["resident"] = Resident(first, sources["cached"].steps_per_epoch)
            side = teacher.spec.image_size
            images_u8 = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device)
            loops = {
                key: Loop(config, source, shapes, device, folder / f"{preset}-{key}", False) for key, source in sources.items()
            }
            runs = {key: lambda loop=loop: loop.take(n_steps, n_before) for key, loop in loops.items()}
            runs["teacher"] = lambda t=teacher, i=images_u8, n=layers: teacher_alone(t, i, n, n_steps)
            found = measure.take_turns(runs, rounds)
            for loop in loops.values():
                loop.close()

            ceilings = found.each(lambda rate: (1 / rate["teacher"] + 1 / rate["resident"]) * rate["resident"])
            gains = found.over("cached", "live")
            shares = [gain / ceiling for gain, ceiling in zip(gains, ceilings, strict=True)]
            claims.append(measure.claim(f"speed-up / ceiling, {preset}", shares, 0.9))
            claims.append(measure.claim(f"cached / live, {preset}", gains, None))
            figures |= {f"{preset}: {key}": rate for key, rate in found.figures("crops/s").items()}
            conditions.append(f"{preset}: teacher {name}, layers {', '.join(map(str, layers))}")
    measure.report("cached-or-live", claims, figures, conditions, where)


if __name__ == "__main__":
    main()
