"""teacher-cache estimate: what a cache will cost and whether it will pay."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import UsageError
from ..terminal.command import one_line_errors
from .options import CROP_FORMAT, CROP_SIZE, JSON, SIDE, Dtype, TokenChoice


@click.command()
@click.argument("cache", type=click.Path(path_type=Path), required=False)
@click.option("--teacher", help="clip-b16, demo, timm:NAME ... [default: the preset's]")
@click.option("--images", type=click.Path(path_type=Path), help="The originals: they are counted, and a few crops are cut to "
              "measure their bytes.")  # fmt: skip
@click.option("--n-images", type=click.IntRange(1), help="How many there will be, where they are not at hand.")
@click.option("--views", type=click.IntRange(1), help="Passes over the images. [default: 1, or what the cache has]")
@click.option("--layers", help="Blocks to keep: last5, last, or numbers from 1: 8,10,12. [default: last5]")
@click.option("--dtype", type=Dtype(), help="klt: coded by a transform, BITS a value on average, 1 to 6; klt alone is klt:3.2. "
              "[default: int8]")  # fmt: skip
@click.option("--tokens", "visible", type=TokenChoice(), help="all, or visible:K, as for extract. [default: all]")
@click.option("--shard-rows", type=click.IntRange(1, 1 << 20), help="Crops a shard. [default: 2048]")
@click.option("--image-size", type=SIDE, help="Side of the teacher's input, pixels. [default: its own]")
@CROP_SIZE
@CROP_FORMAT
@click.option("--preset", help="What is to be trained: gives crop plan, epochs and what a step reads (student-train --list).")
@click.option("--epochs", type=click.IntRange(1), help="Of one run. [default: the preset's]")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Trainings from this cache.")
@click.option("--gpu-rate", type=click.FloatRange(0, min_open=True), help="Crops a second through the teacher on your GPU.")
@click.option("--student-rate", type=click.FloatRange(0, min_open=True), help="Crops a second that your GPU trains, without the "
              "teacher, never waiting.")  # fmt: skip
@click.option("--measure", is_flag=True, help="Measure here what is not given: teacher, extraction, the preset's student, and "
              "the disk of CACHE. Takes about a minute, and up to 2 GB of disk for that time.")  # fmt: skip
@click.option("--weights", help="With --measure: the teacher's weights. [default: random ones, which take as long]")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--device", default="auto", show_default=True, help="With --measure: auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@JSON
def estimate(cache: Path | None, as_json: bool, **options):
    """Say what a cache will cost and whether it will pay, before anything of it is written.

    Bytes, hours of extraction, bytes a second that training reads; and, for so many epochs and runs, hours from the cache against
    hours with the teacher in every step, all on one device. What is not known is not made up: the output says which option gives
    it. CACHE is where the cache shall lie (its disk is looked at) or one that is there, whose crops are then counted.
    [default: the current folder]

    \b
    Example:
      teacher-cache estimate --teacher clip-b16 --images imagenet/train --views 2 /data/cache
      teacher-cache estimate --preset milan-b16 --n-images 1281167 --gpu-rate 2500 --student-rate 1800
      teacher-cache estimate --preset maskalign-b16 --images imagenet/train --measure /data/cache
    """
    with one_line_errors("Nothing was written.", as_json=as_json):
        from ..estimating.estimate import Question, answer, in_words

        preset = options.pop("preset")
        answered = answer(Question(folder=cache or Path(), **options), _student_of(preset, options["teacher"]))
        click.echo(json.dumps(answered, indent=1) if as_json else in_words(answered))


def _student_of(preset: str | None, teacher: str | None):
    """What a preset says to an estimate (estimating.PresetFacts); None without one."""
    if preset is None:
        return None
    from pipelines.presets import recipe
    from pipelines.presets.student_rate import layers_read, student_of, student_rate

    from ..estimating.estimate import PresetFacts

    chosen = recipe(preset)
    if not chosen.teachers and teacher is None:
        raise UsageError(f"{preset} learns without a teacher: there is nothing to extract. Give --teacher, or another --preset.")

    def read(spec, visible):
        return layers_read(student_of(chosen.config, spec, visible or None), spec)

    def rate(spec, device):
        return student_rate(chosen.config, student_of(chosen.config, spec), spec, device)

    return PresetFacts(preset, chosen.plan, next(iter(chosen.teachers), teacher), chosen.config.epochs, read, rate,
                   max(1, len(chosen.teachers)))  # fmt: skip
