"""Batches of MaskAlign (five layers, 30 % of the patches visible), ready for the student: where a run's masks are drawn before
its tokens are read, against reading, sending and dequantising the tokens of all patches. With the share of bytes that travel.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.teacher_values import teacher_shape
from pipelines.presets import recipe
from student.modules.model import Student
from teacher_cache.device import pick_device

from . import made_up, measure


def require_equal(sources: dict[str, CachedSource], student: Student) -> None:
    """End the program unless the first batches hold the same targets of visible patches."""
    visible, whole = (next(sources[name].micro_batches(0, 1)) for name in ("visible", "whole"))
    keep = visible.mask.keep
    same = [torch.equal(visible.targets[0].visible(which, keep), whole.targets[0].visible(which, keep))
            for which in student.needs[0].layers]  # fmt: skip
    if not all(same) or not torch.equal(visible.images, whole.images):
        raise click.ClickException("The two ways give other targets.")


@click.command()
@click.option("--preset", default="maskalign-b16", show_default=True)
@click.option("--device", default="auto", show_default=True)
@measure.options
def main(preset: str, device: str, tiny: bool, rounds: int, scratch: Path | None):
    """Crops/s of the source alone, with masks drawn ahead / without."""
    where, (device, _) = measure.environment(), pick_device(device, "auto")
    teacher, n_rows, batch = (made_up.SMALL, 32, 8) if tiny else (made_up.VIT_B16, 1024, 64)
    with measure.scratch_folder(scratch, 0 if tiny else 1 << 30) as folder:
        cache = made_up.make_cache(folder, n_rows, teacher.image_size)
        made_up.add_targets(cache, teacher, shard_rows=n_rows // 4)
        shapes = (teacher_shape(teacher),)
        made = recipe(preset)
        config = replace(made.tiny(shapes, teacher.image_size).config if tiny else made.config, batch_size=batch, accumulate=1)
        student = Student(config, shapes)
        sources = {
            name: CachedSource(cache, [made_up.NAME], student.needs, batch_size=batch, device=device, masks=masks)
            for name, masks in (("visible", student.masks_ahead(config)), ("whole", None))
        }
        require_equal(sources, student)
        n_bytes = {name: source._loader.record_bytes for name, source in sources.items()}

        def consume(source: CachedSource) -> int:
            n_rows = sum(len(made.rows) for made in source.micro_batches(0, 2 * source.steps_per_epoch))
            if device == "cuda":
                torch.cuda.synchronize()
            return n_rows

        found = measure.take_turns({name: lambda source=source: consume(source) for name, source in sources.items()}, rounds)
    n_keep = config.mask.n_keep(config.backbone)
    claims = [
        measure.claim(f"visible tokens / whole rows, {preset}", found.over("visible", "whole"), 1),
        measure.claim("bytes of targets, visible / whole", [n_bytes["visible"] / n_bytes["whole"]], None),
    ]
    conditions = [
        f"{device}, {n_rows} crops of {teacher.image_size} px (JPEG), layers {student.needs[0].layers}, {n_keep} of "
        f"{teacher.n_patches} patches visible, batches of {batch}, decoded, read, normalised and dequantised; no student",
        "warm page cache, crc first (rows were checked in the first round's warm-up); targets compared for equality before",
    ]
    measure.report("visible-tokens", claims, found.figures("crops/s"), conditions, where)


if __name__ == "__main__":
    main()
