"""student-train and student-eval. The edge: parses, joins the rooms, prints."""

from __future__ import annotations

import inspect
import json
import signal
import sys
from pathlib import Path

import click

from student.errors import ConfigError, StudentError
from teacher_cache.command import one_line_errors, say
from teacher_cache.errors import BadInputError, UnknownNameError, UsageError

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
    with one_line_errors("The last step is saved; the same command goes on from there.", (ConfigError,), (StudentError,)):
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
        if show:
            click.echo(inspect.getdoc(PRESETS[preset]))
            click.echo("\nSettings (change one with --set KEY=VALUE):")
            for key, value in _flat(config.to_json()).items():
                click.echo(f"  {key} = {value}")
            return
        if cache is None or out is None:
            raise UsageError(
                f"--{'cache' if cache is None else 'out'} is missing: student-train --cache CACHE --preset {preset} --out RUN"
            )
        _stop_on_sigterm()
        _train(config, cache, out, teacher or chosen.teacher, views, max_steps, device, workers, check, route, live, weights,
               checkpoint_every)  # fmt: skip


def _train(config, cache_path, out, store_name, views, max_steps, device, workers, check, route, live, weights, checkpoint_every):
    from teacher_cache.cache import Cache
    from teacher_cache.device import pick_device

    device, _ = pick_device(device, "auto")
    cache = Cache(cache_path)
    size = cache.plan.size
    if size != config.backbone.image_size:
        raise UsageError(
            f"The crops of {cache_path} are {size} px, {config.preset} takes {config.backbone.image_size} px. Use a cache of "
            f"that size, or --set backbone.image_size={size}."
        )
    options = {"batch_size": config.batch_size, "accumulate": config.accumulate, "seed": config.seed, "device": device,
               "n_views": views, "workers": workers}  # fmt: skip
    from pipelines.source import CachedSource, CropSource, LiveSource, store_spec, teacher_shape

    from .model import Student

    if not config.teacher:
        student, source = Student(config), CropSource(cache, **options)
    elif live:
        from teacher_cache.teachers import load_teacher

        loaded = load_teacher(store_name, weights, None, device, "bf16" if device.startswith("cuda") else "fp32")
        student = Student(config, teacher_shape(loaded.spec))
        source = LiveSource(cache, loaded, student.needs, **options)
    else:
        name = _store(cache, store_name)
        student = Student(config, teacher_shape(store_spec(cache, name)))
        source = CachedSource(cache, name, student.needs, route=route, check=check, **options)

    from .trainer import Trainer

    n_views, n_parameters = len(source.views), sum(p.numel() for p in student.parameters())
    say(
        f"student  {config.preset}: {n_parameters / 1e6:.1f} M parameters, {device}",
        f"data     {cache.n_images:,} images, {n_views} view{'s' * (n_views > 1)}: each crop will be seen "
        f"{config.epochs / n_views:g} times in {config.epochs} epochs",
        f"steps    {source.steps_per_epoch:,} an epoch of {config.batch_size:,} crops, "
        f"{config.epochs * source.steps_per_epoch:,} in all",
    )
    trainer = Trainer(config, student, source, out, device, checkpoint_every=checkpoint_every)
    if trainer.step:
        say(f"resumed  at step {trainer.step:,}")
    steps = trainer.fit(max_steps)
    done = "finished" if steps >= trainer.total_steps else f"stopped at step {steps:,} of {trainer.total_steps:,}"
    say(f"{out}: {done}.")


def _store(cache, name: str) -> str:
    """The store called `name`, or NotInCacheError (raised by the source) / UnknownNameError listing what is there."""
    names = cache.finished_view(0).store_names()
    cleaned = name.replace(":", "_").replace("/", "_")
    if cleaned not in names:
        there = f"it has {', '.join(names)}" if names else "it has no targets at all"
        other = f" To learn from another teacher: --teacher {names[0]}." if names else ""
        raise UnknownNameError(
            f"{cache.path} has no targets of {name}; {there}. "
            f"Make them: teacher-cache extract --teacher {name} {cache.path}.{other}"
        )
    return cleaned


def _flat(value, prefix: str = "") -> dict:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list) and prefix == "objectives."
        else None
    )
    if items is None:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, item in items for key, leaf in _flat(item, f"{prefix}{name}.").items()}


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
