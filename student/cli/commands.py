"""student-train, student-eval and student-report. The edge: parses, joins the rooms, prints."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import click

from teacher_cache.cache import Cache
from teacher_cache.errors import UnknownNameError, UsageError
from teacher_cache.files.claims import taking_over
from teacher_cache.store.manifest import store_file_name
from teacher_cache.store.reader import CHECKS, READERS
from teacher_cache.terminal.command import one_line_errors, say
from teacher_cache.words import human, quoted

from ..errors import ConfigError, RunMismatchError, StudentError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)
IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""
COMMAND_AT_FAULT = (ConfigError, RunMismatchError)


def _list_presets(as_json: bool) -> None:
    from pipelines.presets import PRESETS

    about = {name: inspect.getdoc(function).splitlines()[0] for name, function in PRESETS.items()}
    if as_json:
        click.echo(json.dumps(about, indent=1))
        return
    for name, line in about.items():
        click.echo(f"{name:<16} {line}")


def _pairs(option: str, pairs: tuple[str, ...]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    for key, sign, _ in split:
        if not sign or not key:
            raise UsageError(f"{option} {key}: give key=value, for example --set batch_size=32 or --change optim.base_lr=1e-4.")
    return {key: value for key, _, value in split}


@click.command(context_settings=SETTINGS)
@click.option("--cache", type=PATH, help="The cache: crops, labels and targets are in it.")
@click.option("--preset", help="The method and its settings (--list).")
@click.option("--out", type=PATH, help="Folder of the run. One that exists is resumed if it is the same run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting (--show lists them). Repeatable.")
@click.option("--change", "requests", multiple=True, metavar="KEY=VALUE", help="Change optim.* or objectives.N.weight in a run "
              "under way, from its next step on. Kept in the run. Repeatable.")  # fmt: skip
@click.option("--teacher", "teachers", multiple=True, help="Name of the store to learn from (with --live: of the teacher); "
              "one for each of the preset's teachers, in their order. [default: the preset's]")  # fmt: skip
@click.option("--views", type=click.IntRange(1), help="Use only the first views of the cache; of a run under way, from its "
              "next step on. [default: all there are when a run begins, then those]")  # fmt: skip
@click.option("--tiny", is_flag=True, help="The method in miniature, to see that everything works.")
@click.option("--accept-mismatch", is_flag=True, help="Train on crops or teachers other than the preset's, and record that.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop, with a checkpoint, when so many steps are done.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--micro-batch", type=click.IntRange(1), help="Crops a device holds at once; changes memory, not the run. "
              "[default: its share of a batch, or what --set accumulate=N leaves of that]")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Threads that decode and copy. [default: one a processor]")
@click.option(
    "--reader",
    type=click.Choice(READERS),
    help="How targets are read: mmap is the fastest; pread outlives a file that is cut short. [default: mmap]",
)
@click.option("--check", type=click.Choice(list(CHECKS)),
              help="When the checksum of a row of targets is compared. [default: first]")  # fmt: skip
@click.option("--live", is_flag=True, help="Run the teacher on the spot instead of reading its targets (slow; for comparison).")
@click.option("--weights", multiple=True, help="With --live: the weights of each teacher, as for teacher-cache extract.")
@click.option("--compile", "compiled", is_flag=True, help="Run the student through torch.compile: minutes first, then faster.")
@click.option("--checkpoint-every", type=click.IntRange(1), help="Steps between checkpoints, beside one an epoch.")
@click.option("--keep-checkpoints", type=click.IntRange(1), default=2, show_default=True, help="How many stay: the newest.")
@click.option("--take-over", is_flag=True, help="Say that whoever holds the run is gone: do not watch its claim for minutes "
              "first. A locked one is refused all the same.")  # fmt: skip
@click.option("--list", "list_presets", is_flag=True, help="List the presets and exit.")
@click.option("--show", is_flag=True, help="Print the preset's papers, deviations and settings, and exit.")
@click.option("--rates", is_flag=True, help="With --show: the learning rate of every step instead, on --cache's images or "
              "ImageNet-1K's 1,281,167.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="With --list or --show: machine-readable.")
def train(cache, preset, out, overrides, requests, teachers, views, tiny, accept_mismatch, max_steps, device, micro_batch,
          workers, reader, check, live, weights, compiled, checkpoint_every, keep_checkpoints, take_over, list_presets, show,
          rates, as_json):  # fmt: skip
    """Train a student from a cache, without its teacher.

    \b
    Example:
      student-train --cache CACHE --preset maskalign-b16 --out runs/a
      student-train --cache CACHE --preset mae-s16 --out runs/b --set batch_size=256 --set optim.base_lr=1e-4
      student-train --cache CACHE --preset maskalign-b16 --out runs/a --change optim.base_lr=1e-4
      torchrun --nproc-per-node 8 -m student --cache CACHE --preset milan-b16 --out runs/c

    Ctrl-C, SIGTERM (pre-emption) and any error save the last completed step; the same command goes on from there, with the very
    same batches. After kill -9 it goes on from the last checkpoint. An error also leaves failed-NNNNNNNN.json in the folder of
    the run: rows and random numbers of the step that failed. Exit codes: 0 done, 1 the data or the run is at fault, 2 the command
    is, 75 stopped by SIGTERM, 130 interrupted.
    """
    run = _Run()
    with one_line_errors(run.on_interrupt, COMMAND_AT_FAULT, (StudentError,)), taking_over(take_over):
        if list_presets:
            _list_presets(as_json)
            return
        if not preset:
            raise UsageError("--preset is missing; student-train --list shows the presets.")
        if rates and not show:
            raise UsageError("--rates goes with --show. Of a run, metrics.jsonl has the rate of each step.")
        if as_json and not show:
            raise UsageError("--json goes with --list or --show. Of a run, metrics.jsonl has a JSON line for each step.")

        from pipelines.presets import recipe
        from teacher_cache.device import pick_device

        from ..config import with_overrides
        from ..devices.distributed import processes, world_size
        from ..devices.micro_batches import micro_batches
        from ..files.begun import as_begun
        from ..files.run_directory import recorded_identity

        chosen, changes = recipe(preset), _pairs("--set", overrides)
        config = with_overrides((chosen.tiny() if tiny else chosen).config, changes)  # complains before anything is opened
        if show:
            _show_rates(preset, config, cache, as_json) if rates else _show(preset, config, as_json)
            return
        for name, value in (("cache", cache), ("out", out)):
            if value is None:
                raise UsageError(f"--{name} is missing: student-train --cache CACHE --preset {preset} --out RUN")
        _require_fitting_options(chosen, teachers, live, weights, reader, check)

        with processes(device) as device:
            device, precision = pick_device(device, config.precision)
            opened, names = Cache(cache), teachers or chosen.teachers
            if tiny and not live and not teachers:
                names = _only_store(opened, names)
            lesson = _live(names, weights, device, precision) if live else _stored(opened, names)
            if tiny:
                chosen = chosen.tiny(lesson.shapes, opened.plan.size)
            mismatches = [] if tiny else chosen.mismatches(opened.plan, [shape.name for shape in lesson.shapes])
            if mismatches and not accept_mismatch:
                raise UsageError(_mismatch_text(opened, chosen, mismatches))
            config = with_overrides(dataclasses.replace(chosen.config, teachers=lesson.names), changes)
            config, kept = as_begun(out, config, changes, chosen.former)
            requests = _pairs("--change", requests)
            if "views" in requests:
                raise UsageError("--change views: give --views N.")
            begun = recorded_identity(out)
            if begun is not None and begun.get("crops_id") == opened.crops_id:  # a run keeps its views, whatever has been added
                requests |= {"views": str(views)} if views else {}
                views = len(begun["views"]) if isinstance(begun.get("views"), list) and begun["views"] else views
            data = {"batch_size": config.batch_size, "accumulate": micro_batches(config, world_size(), micro_batch),
                    "seed": config.seed, "n_views": views, "workers": workers, "device": device}  # fmt: skip
            reading = {"reader": reader or "mmap", "check": check or "first"}
            options = {"changes": requests, "micro_batch": micro_batch, "checkpoint_every": checkpoint_every,
                       "keep_checkpoints": keep_checkpoints, "compiled": compiled}  # fmt: skip
            run.trainer = _trainer(config, opened, lesson, out, data, reading, mismatches, options)
            _tell(*(f"note     {line}" for line in kept))
            try:
                steps = run.trainer.fit(max_steps)
            except Exception as error:
                _tell(*getattr(error, "__notes__", ()))
                raise
            done = "finished" if steps >= run.trainer.total_steps else f"stopped at step {steps:,} of {run.trainer.total_steps:,}"
            _tell(f"{out}: {done}.")


def _require_fitting_options(chosen, teachers, live, weights, reader, check) -> None:
    if not chosen.teachers and (live or teachers):
        raise UsageError(f"{chosen.name} learns without a teacher: leave out --live and --teacher.")
    if weights and not live:
        raise UsageError("--weights goes with --live; without it the teacher is not loaded.")
    for option, given in (("--teacher", teachers), ("--weights", weights)):
        if given and len(given) != len(chosen.teachers):
            names = ", ".join(chosen.teachers)
            raise UsageError(
                f"{chosen.name} has {len(chosen.teachers)} teachers ({names}): give {option} as often, in their order."
            )
    if (reader or check) and (live or not chosen.teachers):
        raise UsageError(f"--{'reader' if reader else 'check'} is about stored targets, and this run reads none. Leave it out.")


class _Run:
    """What a run can say of itself when it is interrupted."""

    trainer = None

    def on_interrupt(self) -> str:
        if self.trainer is None:
            return "Nothing was changed; the same command starts again."
        if self.trainer.saved_step == 0:
            return "No step is saved yet; the same command starts again."
        return f"Step {self.trainer.saved_step:,} is saved; the same command goes on from there."


def _show(preset: str, config, as_json: bool) -> None:
    """What --show prints: a preset's docstring, and its settings as --set takes them."""
    from pipelines.presets import PRESETS

    from ..config import as_overrides

    if as_json:
        about = inspect.getdoc(PRESETS[preset])
        click.echo(json.dumps({"preset": preset, "about": about, "config": config.to_json()}, indent=1))
        return
    click.echo(inspect.getdoc(PRESETS[preset]))
    click.echo("\nSettings (change one with --set KEY=VALUE):")
    for key, value in as_overrides(config).items():
        click.echo(f"  {key}={value}")


def _show_rates(preset: str, config, cache: Path | None, as_json: bool) -> None:
    """What --show --rates prints: step as in metrics.jsonl, epochs done by then, learning rate; a line each."""
    from ..run.optim import learning_rates

    n_images = Cache(cache).n_images if cache else IMAGENET
    steps_per_epoch = n_images // config.batch_size
    if not steps_per_epoch:
        raise UsageError(f"batch_size={config.batch_size} is more than the {n_images:,} images: --set batch_size={n_images}.")
    rates = learning_rates(config, steps_per_epoch)
    if as_json:
        click.echo(json.dumps({"preset": preset, "n_images": n_images, "steps_per_epoch": steps_per_epoch, "rates": rates}))
        return
    lines = (f"{step} {step / steps_per_epoch:.6f} {rate!r}" for step, rate in enumerate(rates, 1))
    click.echo("\n".join(["step epoch rate", *lines]))


def _mismatch_text(cache: Cache, chosen, mismatches: list[str]) -> str:
    """Why a cache is not what a preset was made for, and what to do."""
    from teacher_cache.teachers import weights_option

    extract = " and ".join(
        f"teacher-cache extract --preset {chosen.name} --teacher {name}{weights_option(name)} --images DIR NEW"
        for name in chosen.teachers
    )
    make = extract or f"teacher-cache crop --preset {chosen.name} --images DIR NEW"
    return (
        f"{cache.path} is not what {chosen.name} was made for:\n  " + "\n  ".join(mismatches) +
        f"\nMake a cache that is: {make}; or train on this one all the same with --accept-mismatch, which is recorded in the run."
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Lesson:
    """Who teaches a run: what the student must know of them, and how its batches are made."""

    names: tuple[str, ...]
    shapes: tuple
    source: Callable
    """(cache, needs, reading options with the run's masks, other options) -> student.batch.BatchSource"""


def _stored(cache: Cache, teachers: tuple[str, ...]) -> _Lesson:
    """Targets from the cache, or none at all."""
    from pipelines.feed.source import CachedSource, CropSource, stored_shape

    names = tuple(_store(cache, name) for name in teachers)
    shapes = tuple(stored_shape(cache, name) for name in names)
    if not names:
        return _Lesson((), (), lambda cache, needs, reading, data: CropSource(cache, **data))
    return _Lesson(names, shapes, lambda cache, needs, reading, data: CachedSource(cache, names, needs, **reading, **data))


def _live(names: tuple[str, ...], weights: tuple[str, ...], device: str, precision: str) -> _Lesson:
    """Teachers run on the spot, by their names for `teacher-cache extract --teacher`."""
    from pipelines.feed.source import LiveSource, teacher_shape
    from teacher_cache.teachers import load_teacher

    given = weights or (None,) * len(names)
    loaded = [load_teacher(name, path, None, device, precision) for name, path in zip(names, given, strict=True)]
    shapes = tuple(teacher_shape(teacher.spec) for teacher in loaded)
    return _Lesson(tuple(names), shapes, lambda cache, needs, reading, data: LiveSource(cache, loaded, needs, **data))


def _trainer(config, cache, lesson, out, data, reading, mismatches, options):
    """The trainer of a run: teachers, student and source, joined; says what was found."""
    from teacher_cache.kernels import sigbus

    from ..devices.distributed import rank, world_size
    from ..modules.model import Student
    from ..run.trainer import Trainer

    size, stride = cache.plan.size, config.backbone.stride
    if size != config.backbone.image_size:
        change = f", or --set backbone.image_size={size}" if size % stride == 0 else f" ({size} is no multiple of {stride} px)"
        raise UsageError(
            f"The crops of {cache.path} are {size} px, {config.preset} takes {config.backbone.image_size} px. Use a cache of "
            f"that size{change}."
        )
    student = Student(config, lesson.shapes)
    reading = {**reading, "masks": student.masks_ahead(config)}
    source = lesson.source(cache, student.needs, reading, {**data, "rank": rank(), "world": world_size()})
    if mismatches:
        source.identity["accepted_mismatch"] = mismatches

    n_views, n_parameters = len(source.views), sum(p.numel() for p in student.parameters())
    sigbus.install()
    trainer = Trainer(config, student, source, out, data["device"], data_from=str(cache.path.resolve()), **options)
    n_processes = f", {world_size()} processes" if world_size() > 1 else ""
    _tell(
        f"student  {config.preset}: {n_parameters / 1e6:.1f} M parameters, {data['device']}{n_processes}",
        f"data     {cache.n_images:,} images, {n_views} view{'s' * (n_views > 1)}: each crop will be seen "
        f"{config.epochs / n_views:g} times in {config.epochs} epochs",
        f"steps    {source.steps_per_epoch:,} an epoch of {config.batch_size:,} crops, {trainer.total_steps:,} in all",
        *(f"note     {line} (accepted)" for line in mismatches),
    )
    _tell(*(f"changed  {change}" for change in trainer.changes))
    if trainer.directory and not trainer.is_new:
        _tell(f"resumed  at step {trainer.step:,}" + ("" if trainer.step else ": no checkpoint is there"))
    return trainer


def _tell(*lines: str) -> None:
    """Say it once, however many processes train."""
    from ..devices.distributed import rank

    if rank() == 0:
        say(*lines)


def _only_store(cache: Cache, names: tuple[str, ...]) -> tuple[str, ...]:
    """The one store that a cache has, in the place of the one teacher of a preset that it has not: a miniature takes any."""
    there = cache.finished_view(0).store_names()
    if len(there) != 1 or len(names) != 1 or store_file_name(names[0]) in there:
        return names
    _tell(f"teacher  {there[0]}, the only one in {cache.path}; the preset's is {names[0]}")
    return tuple(there)


def _store(cache: Cache, name: str) -> str:
    """The file name of the store called `name`, or UnknownNameError listing what is there."""
    names, store = cache.finished_view(0).store_names(), store_file_name(name)
    if store not in names:
        there = f"it has {', '.join(names)}" if names else "it has no targets at all"
        other = f" To learn from another: --teacher {names[0]}." if names else ""
        from teacher_cache.teachers import OPEN_CLIP_PREFIX, TEACHERS, TIMM_PREFIX, weights_option

        is_teacher = name in TEACHERS or name.startswith((TIMM_PREFIX, OPEN_CLIP_PREFIX))
        make = f"teacher-cache extract --teacher {name}{weights_option(name)} {quoted(cache.path)}"
        command = f" Make them: {make}" if is_teacher else ""
        raise UnknownNameError(f"{cache.path} has no targets of {name}; {there}.{other}{command}")
    return store


@click.group(context_settings=SETTINGS)
def evaluate():
    """Measure what a trained student has learned.

    \b
    Example:
      student-eval knn runs/a --train imagenet/train --val imagenet/val

    Exit codes: 0 done, 1 the data or the run is at fault, 2 the command is, 130 interrupted.
    """


@evaluate.command()
@click.argument("run", type=PATH)
@click.option("--train", "train_path", type=PATH, required=True, help="Images that vote: a folder of class folders, or a cache.")
@click.option("--val", "val_path", type=PATH, required=True, help="Images that are classified: the same.")
@click.option("--averaged", is_flag=True, help="Take the moving average of the weights (optim.ema), not the last ones.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def knn(run: Path, train_path: Path, val_path: Path, averaged: bool, device: str, as_json: bool):
    """k-nearest-neighbour accuracy of frozen features, by DINO's protocol (weighted votes, temperature .07).

    Folders are cut in the middle (short side resized to 8/7 of the student's size); of a cache, view 0 is read as it is. The
    classes of --val may be some of those of --train, by name (ImageNet-A, ImageNet-R): then only images of these vote.

    \b
    Example:
      student-eval knn runs/a --train imagenet/train --val imagenet/val
    """
    with one_line_errors("", COMMAND_AT_FAULT, (StudentError,)):
        from pipelines.feed.labelled import LabelledImages
        from teacher_cache.device import pick_device

        from ..evals import KNNEvaluator
        from ..files.checkpoint import latest_checkpoint, load_backbone

        device, _ = pick_device(device, "auto")
        checkpoint = latest_checkpoint(run)
        if checkpoint is None:
            raise UsageError(f"{run} holds no checkpoint. Give the --out folder of a student-train run.")
        backbone, config = load_backbone(checkpoint, averaged)
        size = config.backbone.image_size
        voters, asked = LabelledImages(train_path, size), LabelledImages(val_path, size)
        n_classes = len(voters.classes)
        voters.only(asked.classes)
        results = dict(KNNEvaluator(voters, asked, device=device).run(backbone.to(device)))
        if as_json:
            click.echo(
                json.dumps(
                    {
                        "checkpoint": str(checkpoint),
                        "n_train": len(voters),
                        "n_val": len(asked),
                        "n_classes": len(asked.classes),
                        "accuracy": results,
                    }
                )
            )
            return
        of = f" of the {len(asked.classes):,} of {n_classes:,} classes they have" if len(asked.classes) < n_classes else ""
        click.echo(f"{checkpoint}: {len(asked):,} images by {len(voters):,} neighbours{of}")
        for name, accuracy in results.items():
            _, readout, n = name.split("/")
            click.echo(f"  {readout:<5} k={n:<4} {accuracy:.2%}")


@click.command(context_settings=SETTINGS)
@click.argument("run", type=PATH)
@click.option("-o", "--out", type=PATH, help="The page: one HTML file. Needed unless --json is given.")
@click.option("--cache", type=PATH, help="Where the run's cache lies now. [default: where it was when the run began]")
@click.option("--crops", "n_crops", type=click.IntRange(1, 24), default=6, show_default=True, help="How many crops are shown.")
@click.option("--json", "as_json", is_flag=True, help="What the page says in numbers, machine-readable, on stdout.")
def report(run: Path, out: Path | None, cache: Path | None, n_crops: int, as_json: bool):
    """Make a page about a run: its curves, what its student predicts and attends to, its settings.

    One HTML file that loads nothing from anywhere. The pictures need the cache of the run; if that is gone, the page has
    everything else and says so. A run that goes on can be looked at while it does.

    \b
    Example:
      student-report runs/a -o a.html
      student-report runs/a -o a.html --cache /new/place/of/CACHE
    """
    with one_line_errors("Nothing was written.", COMMAND_AT_FAULT, (StudentError,)):
        if out is None and not as_json:
            raise UsageError(f"-o is missing: student-report {quoted(run)} -o run.html (or --json).")
        from pipelines.pages.of_run.facts import read_run

        facts = read_run(run)
        if as_json:
            click.echo(json.dumps(facts.to_json(), indent=1))
        if out is not None:
            from pipelines.pages.of_run.page import run_page
            from pipelines.pages.page import require_page, write_page

            data_from = facts.description.get("data_from")
            require_page(out, outside_of=cache or (Path(data_from) if isinstance(data_from, str) else None))
            html, missing = run_page(facts, cache, n_crops)
            n_bytes = write_page(out, html)
            say(*(f"note     {line}" for line in missing), f"{out}: {human(n_bytes)}")
