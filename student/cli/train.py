"""student-train: from options to a trainer, and what it says of itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from teacher_cache.errors import UsageError
from teacher_cache.files.claims import taking_over
from teacher_cache.store.choices import CHECKS, READERS
from teacher_cache.terminal.command import one_line_errors, say

from ..errors import RunError, StudentError
from .lesson import Lesson, any_store, live_lesson, stored_lesson
from .options import COMMAND_AT_FAULT, PATH, SETTINGS, pairs_of
from .probe import probe_of
from .show import print_preset, print_presets, print_rates

if TYPE_CHECKING:
    from teacher_cache.cache import Cache


@click.command(context_settings=SETTINGS)
@click.option("--cache", type=PATH, help="The cache: crops, labels and targets are in it.")
@click.option("--preset", help="The method and its settings (--list).")
@click.option("--out", type=PATH, help="Folder of the run. One that exists is resumed if it is the same run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting (--show lists them). Repeatable.")
@click.option("--change", "requests", multiple=True, metavar="KEY=VALUE", help="Change optim.* or objectives.N.weight in a run "
              "under way, from its next step on. Kept in the run. Repeatable.")  # fmt: skip
@click.option("--extend-epochs", type=click.IntRange(1), help="Let a finished run go on to so many epochs; those added have a "
              "warm-up and a cosine of their own, by what --change says. Kept in the run.")  # fmt: skip
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
@click.option("--init", metavar="FILE|RUN|timm:NAME", help="Begin the encoder from weights that are there: MAE's or MCMAE's "
              ".pth, a file of timm or student-export, a folder of transformers' ViT, another run, a model of timm.")  # fmt: skip
@click.option("--probe", metavar="knn:DIR", help="Behind every epoch say the kNN accuracy of labelled images: DIR has train/ and "
              "val/, folders of class folders. In metrics.jsonl, too; the run itself stays the same.")  # fmt: skip
@click.option("--probe-every", type=click.IntRange(1), help="Epochs between two probes. [default: 1]")
@click.option("--log", "loggers", metavar="NAME,...", help="Loggers beside metrics.jsonl: tensorboard, wandb, mlflow, csv. Each "
              "has every step once, also of a run that was killed; one that is added later catches up.")  # fmt: skip
@click.option("--live", is_flag=True, help="Run the teacher on the spot instead of reading its targets (slow; for comparison).")
@click.option("--weights", multiple=True, help="With --live: the weights of each teacher, as for teacher-cache extract.")
@click.option("--raw-targets", is_flag=True, help="With --live: learn from the teacher's blocks as they are, not whitened; an "
              "ablation that no store can serve.")  # fmt: skip
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
def train(cache, preset, out, overrides, requests, extend_epochs, teachers, views, tiny, accept_mismatch, max_steps, device,
          micro_batch, workers, reader, check, init, probe, probe_every, loggers, live, weights, raw_targets, compiled,
          checkpoint_every, keep_checkpoints, take_over, list_presets, show, rates, as_json):  # fmt: skip
    """Train a student from a cache, without its teacher.

    \b
    Example:
      student-train --cache CACHE --preset maskalign-b16 --out runs/a
      student-train --cache CACHE --preset mae-s16 --out runs/b --set batch_size=256 --set optim.base_lr=1e-4
      student-train --cache CACHE --preset maskalign-b16 --out runs/a --change optim.base_lr=1e-4
      student-train --cache CACHE --preset maskalign-b16 --out runs/a --extend-epochs 400 --change optim.base_lr=1e-4
      student-train --cache CACHE --preset maskalign-b16 --out runs/d --init mae_pretrain_vit_base.pth
      student-train --cache CACHE --preset maskalign-b16 --out runs/a --probe knn:small --log tensorboard,csv
      torchrun --nproc-per-node 8 -m student --cache CACHE --preset milan-b16 --out runs/c

    Ctrl-C, SIGTERM (pre-emption) and any error save the last completed step; the same command goes on from there, with the very
    same batches. After kill -9 it goes on from the last checkpoint. An error also leaves failed-NNNNNNNN.json in the folder of
    the run: rows and random numbers of the step that failed. Exit codes: 0 done, 1 the data or the run is at fault, 2 the command
    is, 75 stopped by SIGTERM, 130 interrupted.
    """
    run = _Run()
    with one_line_errors(run.on_interrupt, COMMAND_AT_FAULT, (StudentError,)), taking_over(take_over):
        if list_presets:
            print_presets(as_json)
            return
        if not preset:
            raise UsageError("--preset is missing; student-train --list shows the presets.")
        if rates and not show:
            raise UsageError("--rates goes with --show. Of a run, metrics.jsonl has the rate of each step.")
        if as_json and not show:
            raise UsageError("--json goes with --list or --show. Of a run, metrics.jsonl has a JSON line for each step.")

        from pipelines.presets import recipe

        from ..config import with_overrides

        chosen, changes = recipe(preset), pairs_of("--set", overrides)
        config = with_overrides((chosen.tiny() if tiny else chosen).config, changes)  # complains before anything is opened
        if show:
            print_rates(preset, config, cache, as_json) if rates else print_preset(preset, config, as_json)
            return
        for name, value in (("cache", cache), ("out", out)):
            if value is None:
                raise UsageError(f"--{name} is missing: student-train --cache CACHE --preset {preset} --out RUN")
        _require_fitting_options(chosen, teachers, live, weights, reader, check, raw_targets)
        if probe_every and not probe:
            raise UsageError("--probe-every goes with --probe knn:DIR.")

        from teacher_cache.cache import Cache
        from teacher_cache.device import pick_device

        from ..devices.distributed import processes, rank, world_size
        from ..devices.micro_batches import micro_batches
        from ..files.begun import as_begun

        with processes(device) as device:
            device, precision = pick_device(device, config.precision)
            opened, names = Cache(cache), teachers or chosen.teachers
            if tiny and not live and not teachers:
                names = any_store(opened, chosen.teachers)
                if names != chosen.teachers:
                    _tell(f"teacher  {names[0]}, the only one in {opened.path}; the preset's is {chosen.teachers[0]}")
            grid = None if tiny else config.backbone.grid
            lesson = (
                live_lesson(names, weights, device, precision, grid, raw_targets) if live else stored_lesson(opened, names, grid)
            )
            if tiny:
                chosen = chosen.tiny(lesson.shapes, opened.plan.size)
            mismatches = [] if tiny else chosen.mismatches(opened.plan, [shape.name for shape in lesson.shapes])
            if mismatches and not accept_mismatch:
                raise UsageError(_mismatch_text(opened, chosen, mismatches))
            config = with_overrides(dataclasses.replace(chosen.config, teachers=lesson.names), changes)
            config, kept = as_begun(out, config, changes, chosen.former)
            requests, views = _changes_and_views(out, opened, pairs_of("--change", requests), extend_epochs, views)
            data = {"batch_size": config.batch_size, "accumulate": micro_batches(config, world_size(), micro_batch),
                    "seed": config.seed, "n_views": views, "workers": workers, "device": device}  # fmt: skip
            reading = {"reader": reader or "mmap", "check": check or "first"}
            options = {"changes": requests, "micro_batch": micro_batch, "checkpoint_every": checkpoint_every,
                       "keep_checkpoints": keep_checkpoints, "compiled": compiled}  # fmt: skip
            if loggers and rank() == 0:
                options["followers"] = followers_of(loggers)
            if probe and rank() == 0:
                options["probe"] = probe_of(probe, probe_every or 1, config.backbone.image_size, device)
            run.trainer = _trainer(config, opened, lesson, out, data, reading, mismatches, options, init)
            _tell(*(f"note     {line}" for line in kept))
            try:
                steps = run.trainer.fit(max_steps)
            except Exception as error:
                _tell(*getattr(error, "__notes__", ()), *run.unsent)
                raise
            done = "finished" if steps >= run.trainer.total_steps else f"stopped at step {steps:,} of {run.trainer.total_steps:,}"
            _tell(f"{out}: {done}.")
            if run.unsent:
                raise RunError("\n".join(run.unsent))


def _changes_and_views(
    out: Path, cache: Cache, requests: dict[str, str], extend_epochs: int | None, views: int | None
) -> tuple[dict[str, str], int | None]:
    """What is to be changed in the run in `out`, and the number of views that it was, or is, begun with; None: all there are.

    requests: of --change.  extend_epochs, views: of the options of these names; of a run that is there they are changes, too.
    """
    from ..files.run_directory import recorded_identity

    if "views" in requests:
        raise UsageError("--change views: give --views N.")
    if "epochs" in requests:
        raise UsageError(
            "--change epochs: epochs cannot be changed in a run under way. A finished one goes on with --extend-epochs N."
        )
    requests |= {"epochs": str(extend_epochs)} if extend_epochs else {}
    begun = recorded_identity(out)
    if begun is None or begun.get("crops_id") != cache.crops_id:
        return requests, views
    requests |= {"views": str(views)} if views else {}
    recorded = begun.get("views")
    return requests, len(recorded) if isinstance(recorded, list) and recorded else views  # whatever has been added since


def _require_fitting_options(chosen, teachers, live, weights, reader, check, raw_targets) -> None:
    if not chosen.teachers and (live or teachers):
        raise UsageError(f"{chosen.name} learns without a teacher: leave out --live and --teacher.")
    if weights and not live:
        raise UsageError("--weights goes with --live; without it the teacher is not loaded.")
    if raw_targets and not live:
        raise UsageError("--raw-targets goes with --live: stores keep whitened targets alone.")
    outputs = [objective.name for objective in chosen.config.objectives if objective.kind in ("cosine", "contrast")]
    if raw_targets and outputs:
        raise UsageError(
            f"--raw-targets: {chosen.name} learns from the teacher's final norm ({', '.join(outputs)}), not from its blocks. "
            "Leave it out, or take a preset that mimics or aligns blocks."
        )
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

    @property
    def unsent(self) -> list[str]:
        """Of loggers that lack something behind the end of training, a sentence each."""
        return self.trainer.followers.unsent if self.trainer and self.trainer.followers else []

    def on_interrupt(self) -> str:
        if self.trainer is None:
            return "Nothing was changed; the same command starts again."
        if self.trainer.saved_step == 0:
            saved = "No step is saved yet; the same command starts again."
        else:
            saved = f"Step {self.trainer.saved_step:,} is saved; the same command goes on from there."
        return "\n".join([saved, *self.unsent])


def _mismatch_text(cache: Cache, chosen, mismatches: list[str]) -> str:
    """Why a cache is not what a preset was made for, and what to do."""
    from teacher_cache.teachers.families import options_for

    grid = chosen.config.backbone.grid
    extract = " and ".join(
        f"teacher-cache extract --preset {chosen.name} --teacher {name}{options_for(name, grid)} --images DIR NEW"
        for name in chosen.teachers
    )
    make = extract or f"teacher-cache crop --preset {chosen.name} --images DIR NEW"
    return (
        f"{cache.path} is not what {chosen.name} was made for:\n  " + "\n  ".join(mismatches) +
        f"\nMake a cache that is: {make}; or train on this one all the same with --accept-mismatch, which is recorded in the run."
    )  # fmt: skip


def _trainer(config, cache: Cache, lesson: Lesson, out: Path, data, reading, mismatches: list[str], options, init):
    """The trainer of a run: teachers, student and source, joined; says what was found."""
    from teacher_cache.kernels import sigbus

    from ..devices.distributed import rank, world_size
    from ..exports.initial import begin
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
    began, lines = begin(init, student.backbone, config.backbone, out)
    reading = {**reading, "masks": student.masks_ahead(config)}
    source = lesson.source(cache, student.needs, reading, {**data, "rank": rank(), "world": world_size()})
    if mismatches:
        source.identity["accepted_mismatch"] = mismatches

    n_views, n_parameters = len(source.views), sum(p.numel() for p in student.parameters())
    sigbus.install()
    trainer = Trainer(config, student, source, out, data["device"], data_from=str(cache.path.resolve()), init=began, **options)
    epochs = trainer.total_steps // source.steps_per_epoch
    n_processes = f", {world_size()} processes" if world_size() > 1 else ""
    _tell(
        f"student  {config.preset}: {n_parameters / 1e6:.1f} M parameters, {data['device']}{n_processes}",
        f"data     {cache.n_images:,} images, {n_views} view{'s' * (n_views > 1)}: each crop will be seen "
        f"{epochs / n_views:g} times in {epochs} epochs",
        f"steps    {source.steps_per_epoch:,} an epoch of {config.batch_size:,} crops, {trainer.total_steps:,} in all",
        *(f"note     {line} (accepted)" for line in mismatches),
        *_bf16_offered(trainer),
    )
    _tell(*(f"init     {line}" for line in lines))
    _tell(*(f"changed  {change}" for change in trainer.changes))
    if trainer.directory and not trainer.is_new:
        _tell(f"resumed  at step {trainer.step:,}" + ("" if trainer.step else ": no checkpoint is there"))
    return trainer


def followers_of(names: str):
    """The loggers of --log, all that can be missing found before anything is written."""
    from ..errors import ConfigError
    from ..loggers import LOGGERS, loggers_of
    from ..loggers.follow import Followers

    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not asked:
        raise UsageError(f"--log {names!r}: give one or more of {', '.join(LOGGERS)}, with commas between them.")
    try:
        return Followers(loggers_of(asked), say)
    except ConfigError as error:
        raise UsageError(f"--log {names}: {error}") from error


def _bf16_offered(trainer) -> list[str]:
    """Of a new run on a CPU, that it could be faster."""
    from teacher_cache.device import cpu_bf16

    on_cpu = trainer.device.type == "cpu" and trainer.config.precision == "auto"
    if not (on_cpu and trainer.is_new and (instruction := cpu_bf16())):
        return []
    return [f"note     this processor has {instruction}: --set precision=bf16 makes a run on it faster"]


def _tell(*lines: str) -> None:
    """Say it once, however many processes train."""
    from ..devices.distributed import rank

    if rank() == 0:
        say(*lines)
