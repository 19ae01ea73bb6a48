"""student-train and student-eval. The edge: parses, joins the rooms, prints."""

from __future__ import annotations

import dataclasses
import inspect
import json
import signal
import sys
from pathlib import Path

import click

from student.errors import ConfigError, StudentError
from teacher_cache.cache import Cache
from teacher_cache.command import one_line_errors, say
from teacher_cache.errors import BadInputError, UnknownNameError, UsageError
from teacher_cache.store import store_file_name

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)


def _list_presets() -> None:
    from pipelines.presets import PRESETS

    for name, function in PRESETS.items():
        click.echo(f"{name:<16} {inspect.getdoc(function).splitlines()[0]}")


def _overrides(pairs: tuple[str, ...]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    for key, sign, _ in split:
        if not sign or not key:
            raise UsageError(f"--set {key}: give key=value, for example --set batch_size=32 or --set optim.base_lr=1e-4.")
    return {key: value for key, _, value in split}


def _stop_on_sigterm() -> None:
    """Pre-emption ends a run as Ctrl-C does: the last step is saved."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@click.command(context_settings=SETTINGS)
@click.option("--cache", type=PATH, help="The cache: crops, labels and targets are in it.")
@click.option("--preset", help="The method and its settings (--list).")
@click.option("--out", type=PATH, help="Folder of the run. One that exists is resumed if it is the same run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting (--show lists them). Repeatable.")
@click.option("--teacher", help="Name of the store to learn from. [default: the preset's teacher]")
@click.option("--views", type=click.IntRange(1), help="Use only the first views of the cache. [default: all]")
@click.option("--tiny", is_flag=True, help="The method in miniature, to see that everything works.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop, with a checkpoint, when so many steps are done.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--workers", type=click.IntRange(1), help="Threads that decode and copy. [default: one a processor]")
@click.option("--check", type=click.Choice(["first", "always", "never"]), default="first", show_default=True,
              help="When the checksum of a row of targets is compared.")  # fmt: skip
@click.option("--route", type=click.Choice(["direct", "zarr"]), default="direct", show_default=True, help="How targets are read.")
@click.option("--live", is_flag=True, help="Run the teacher on the spot instead of reading its targets (slow; for comparison).")
@click.option("--weights", help="With --live: the teacher's weights, as for teacher-cache extract.")
@click.option("--checkpoint-every", type=click.IntRange(1), help="Steps between checkpoints, beside one an epoch.")
@click.option("--list", "list_presets", is_flag=True, help="List the presets and exit.")
@click.option("--show", is_flag=True, help="Print the preset's papers, deviations and settings, and exit.")
def train(cache, preset, out, overrides, teacher, views, tiny, max_steps, device, workers, check, route, live, weights,
          checkpoint_every, list_presets, show):  # fmt: skip
    """Train a student from a cache, without its teacher.

    \b
    Example:
      student-train --cache CACHE --preset maskalign-b16 --out runs/a
      student-train --cache CACHE --preset mae-s16 --out runs/b --set batch_size=256 --set optim.base_lr=1e-4

    Ctrl-C saves the last step; the same command goes on from there, with the very same batches. Exit codes: 0 done, 1 the data or
    the run is at fault, 2 the command is, 130 interrupted.
    """
    run = _Run()
    with one_line_errors(run.on_interrupt, (ConfigError,), (StudentError,)):
        if list_presets:
            _list_presets()
            return
        if not preset:
            raise UsageError("--preset is missing; student-train --list shows the presets.")

        from pipelines.presets import PRESETS, recipe

        from .config import with_overrides

        chosen = recipe(preset)
        chosen = chosen.tiny() if tiny else chosen
        config = with_overrides(chosen.config, _overrides(overrides))
        if teacher:
            config = dataclasses.replace(config, teacher=teacher)
        if show:
            click.echo(inspect.getdoc(PRESETS[preset]))
            click.echo("\nSettings (change one with --set KEY=VALUE):")
            for key, value in _flat(config.to_json()).items():
                click.echo(f"  {key}={value}")
            return
        for name, value in (("cache", cache), ("out", out)):
            if value is None:
                raise UsageError(f"--{name} is missing: student-train --cache CACHE --preset {preset} --out RUN")
        if not chosen.teacher and (live or teacher):
            raise UsageError(f"{preset} learns without a teacher: leave out --live and --teacher.")
        if weights and not live:
            raise UsageError("--weights goes with --live; without it the teacher is not loaded.")

        _stop_on_sigterm()
        opened = Cache(cache)
        _say_differing_plan(opened, chosen)
        options = {"batch_size": config.batch_size, "accumulate": config.accumulate, "seed": config.seed, "n_views": views,
                   "workers": workers}  # fmt: skip
        reading = {"route": route, "check": check}
        run.trainer = _trainer(config, opened, out, device, live, weights, checkpoint_every, options, reading)
        steps = run.trainer.fit(max_steps)
        done = "finished" if steps >= run.trainer.total_steps else f"stopped at step {steps:,} of {run.trainer.total_steps:,}"
        say(f"{out}: {done}.")


class _Run:
    """What a run can say of itself when it is interrupted."""

    trainer = None

    def on_interrupt(self) -> str:
        if self.trainer is None or self.trainer.step == 0:
            return "No step was taken yet."
        return f"Step {self.trainer.step:,} is saved; the same command goes on from there."


def _say_differing_plan(cache: Cache, chosen) -> None:
    """Crops drawn by another plan than the preset's train as well, but not what the paper trained: say so."""
    here, expected = cache.plan.to_json(), chosen.plan.to_json()
    differing = [
        f"{key} {here[key]} (the preset: {expected[key]})" for key in here if key != "seed" and here[key] != expected[key]
    ]
    if differing:
        say(f"note     the crops of {cache.path} are drawn otherwise than {chosen.name} expects: {', '.join(differing)}")


def _trainer(config, cache, out, device, live, weights, checkpoint_every, options, reading):
    """The trainer of a run: teacher or cache, student and source, joined; says what was found."""
    from pipelines.source import CachedSource, CropSource, LiveSource, teacher_shape, teacher_spec
    from teacher_cache.device import pick_device

    from .model import Student
    from .trainer import Trainer

    device, precision = pick_device(device, config.precision)
    options["device"] = device
    if cache.plan.size != config.backbone.image_size:
        raise UsageError(
            f"The crops of {cache.path} are {cache.plan.size} px, {config.preset} takes {config.backbone.image_size} px. Use a "
            f"cache of that size, or --set backbone.image_size={cache.plan.size}."
        )
    if not config.teacher:
        student, source = Student(config), CropSource(cache, **options)
    elif live:
        from teacher_cache.teachers import load_teacher

        loaded = load_teacher(config.teacher, weights, None, device, precision)
        student = Student(config, teacher_shape(loaded.spec))
        source = LiveSource(cache, loaded, student.needs, **options)
    else:
        name = _store(cache, config.teacher)
        student = Student(config, teacher_shape(teacher_spec(cache, name)))
        source = CachedSource(cache, name, student.needs, **reading, **options)

    n_views, n_parameters = len(source.views), sum(p.numel() for p in student.parameters())
    trainer = Trainer(config, student, source, out, device, checkpoint_every=checkpoint_every)
    say(
        f"student  {config.preset}: {n_parameters / 1e6:.1f} M parameters, {device}",
        f"data     {cache.n_images:,} images, {n_views} view{'s' * (n_views > 1)}: each crop will be seen "
        f"{config.epochs / n_views:g} times in {config.epochs} epochs",
        f"steps    {source.steps_per_epoch:,} an epoch of {config.batch_size:,} crops, {trainer.total_steps:,} in all",
    )
    if trainer.step:
        say(f"resumed  at step {trainer.step:,}")
    return trainer


def _store(cache: Cache, name: str) -> str:
    """The file name of the store called `name`, or UnknownNameError listing what is there."""
    names, store = cache.finished_view(0).store_names(), store_file_name(name)
    if store not in names:
        there = f"it has {', '.join(names)}" if names else "it has no targets at all"
        other = f" To learn from another: --teacher {names[0]}." if names else ""
        command = f"teacher-cache extract --teacher {name} {cache.path}"
        raise UnknownNameError(f"{cache.path} has no targets of {name}; {there}. Make them: {command}.{other}")
    return store


def _flat(value, prefix: str = "") -> dict[str, str]:
    """Settings as `--set` takes them: dotted names, tuples with commas, none, true and false."""
    if isinstance(value, list) and prefix == "objectives.":
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, dict):
        return {key: text for name, item in value.items() if name != "kind" or prefix == "mask."
                for key, text in _flat(item, f"{prefix}{name}.").items()}  # fmt: skip
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return {prefix.rstrip("."): text.lower() if value is None or isinstance(value, bool) else text}


@click.group(context_settings=SETTINGS)
def evaluate():
    """Measure what a trained student has learned.

    \b
    Example:
      student-eval knn runs/a --train imagenet/train --val imagenet/val
    """


@evaluate.command()
@click.argument("run", type=PATH)
@click.option("--train", "train_path", type=PATH, required=True, help="Images that vote: a folder of class folders, or a cache.")
@click.option("--val", "val_path", type=PATH, required=True, help="Images that are classified: the same.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def knn(run: Path, train_path: Path, val_path: Path, device: str, as_json: bool):
    """k-nearest-neighbour accuracy of frozen features, by DINO's protocol (weighted votes, temperature .07).

    Folders are cut in the middle (short side resized to 8/7 of the student's size); of a cache, view 0 is read as it is.

    \b
    Example:
      student-eval knn runs/a --train imagenet/train --val imagenet/val
    """
    with one_line_errors("", (ConfigError,), (StudentError,)):
        from pipelines.labelled import LabelledImages, require_same_classes
        from teacher_cache.device import pick_device

        from .checkpoint import latest_checkpoint, load_backbone
        from .evals import KNNEvaluator

        device, _ = pick_device(device, "auto")
        checkpoint = latest_checkpoint(run)
        if checkpoint is None:
            raise BadInputError(f"{run} holds no checkpoint. Give the --out folder of a student-train run.")
        backbone, config = load_backbone(checkpoint)
        size = config.backbone.image_size
        voters, asked = LabelledImages(train_path, size), LabelledImages(val_path, size)
        require_same_classes(voters, asked)
        results = dict(KNNEvaluator(voters, asked, device=device).run(backbone.to(device)))
        if as_json:
            click.echo(
                json.dumps({"checkpoint": str(checkpoint), "n_train": len(voters), "n_val": len(asked), "accuracy": results})
            )
            return
        click.echo(f"{checkpoint}: {len(asked):,} images by {len(voters):,} neighbours")
        for name, accuracy in results.items():
            _, readout, n = name.split("/")
            click.echo(f"  {readout:<5} k={n:<4} {accuracy:.2%}")


if __name__ == "__main__":
    sys.exit(train())
