"""student-eval finetune: the whole encoder learns to classify, by MAE's and BEiT's protocol."""

from __future__ import annotations

import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path

import click

from teacher_cache.errors import UsageError
from teacher_cache.files.claims import claimed
from teacher_cache.files.durable import make_folder
from teacher_cache.terminal.command import one_line_errors, say
from teacher_cache.terminal.progress import progress

from ...errors import StudentError
from ..options import COMMAND_AT_FAULT, PATH, pairs_of
from .job import Job, told_of_both
from .options import Options, measuring

LOCK = "finetune.lock"
RESUME = "The last epoch that ended is saved; the same command goes on behind it."


@click.command()
@measuring("Images that are learned from: a folder of class folders.", "Images that are judged: the same.", frozen=False)
@click.option("--out", type=PATH, required=True, help="Folder of its state, with which the same command goes on.")
@click.option(
    "--recipe", help="Whose settings: the beginning of a preset's name. [default: that of the run's preset, else mae-b]"
)
@click.option("--set", "overrides", multiple=True, help="Change a setting, as --set epochs=50; --show lists them.")
@click.option(
    "--seeds", "n_seeds", type=click.IntRange(1), default=1, show_default=True, help="So many runs: mean and deviation."
)
@click.option("--share", type=float, default=1.0, show_default=True, help="Share of the training images of each class.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Micro-batches a step and process.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode and augment. [default: one a processor]")
@click.option("--show", is_flag=True, help="Print the settings and where they come from, and exit.")
def finetune(options: Options, out: Path, recipe: str | None, overrides: tuple[str, ...], accumulate: int, workers: int | None,
             show: bool):  # fmt: skip
    """Accuracy of the whole encoder after it has learned to classify, by MAE's and BEiT's protocol.

    Layer decay, RandAugment, mixup and cutmix, erasing, label smoothing, drop path, AdamW, half a cosine; the settings are those
    of the paper of the run's method. Of one WHAT. The accuracy is that behind the last epoch. Under torchrun GPUs share a batch.

    \b
    Example:
      student-eval finetune runs/a --out runs/a-ft --train imagenet/train --val imagenet/val
      torchrun --no-python --nproc-per-node 8 student-eval finetune runs/a --out runs/a-ft --train in1k/train --val in1k/val
    """
    with one_line_errors(RESUME, COMMAND_AT_FAULT, (StudentError,)):
        from ...devices.distributed import processes, rank
        from ...evals.finetuning.settings import RECIPES, recipe_of

        if len(options.whats) != 1:
            raise UsageError(f"finetune takes one WHAT, {len(options.whats)} are given. Call it once for each.")
        with processes(options.device) as device:
            job = Job(dataclasses.replace(options, device=device))
            subject, began = next(job.subjects())
            name = recipe or recipe_of(subject.preset) or "mae-b"
            if name not in RECIPES:
                raise UsageError(f"--recipe {name}: there are {', '.join(RECIPES)}.")
            settings = RECIPES[name].settings.with_overrides(pairs_of("--set", overrides))
            if not subject.encoder.has_cls:
                settings = dataclasses.replace(settings, readout="mean")
            if rank() == 0:
                say(f"settings of {name} ({RECIPES[name].source}), {job.device}, {job.precision}")
            if show:
                for key, value in dataclasses.asdict(settings).items():
                    click.echo(f"{key} = {value}")
                return
            results, data, val = [], {}, None
            for seed in range(options.n_seeds):
                folder = out if options.n_seeds == 1 else out / f"seed-{seed}"
                epochs, data, val = _one(job, subject, settings, folder, seed, accumulate, workers)
                results.append({key: epochs[-1][key] for key in ("top1", "top5", "loss")})
            if rank() == 0:
                with job.showing():
                    _record(job, subject, name, settings, results, data, val, began)


def _one(job: Job, subject, settings, folder: Path, seed: int, accumulate: int, workers: int | None):
    """(what each epoch gave, the images as records have them, those of --val)."""
    from ...devices.distributed import barrier, local_processes, rank
    from ...evals.finetuning.classifier import Classifier
    from ...evals.finetuning.loop import FineTuning
    from ...evals.frozen.draws import balanced_share

    options = job.options
    train, val = job.images(options.train, subject), job.images(options.val, subject)
    n_classes = len(train.classes)
    train.only(val.classes)
    train.image(0)  # a cache has none, which is said now
    if options.share != 1:
        import torch

        train.take(balanced_share(torch.from_numpy(train.labels.copy()), options.share, seed).numpy())
    data = {**told_of_both(train, val, n_classes), "used": len(train)}
    identity = {
        "settings": dataclasses.asdict(settings),
        "weights": subject.weights,
        "train": data["train"]["fingerprint"],
        "val": data["val"]["fingerprint"],
        "seed": seed,
    }
    workers = max(1, (os.cpu_count() or 1) // local_processes()) if workers is None else workers
    if rank() == 0:
        make_folder(folder)
    barrier()
    with claimed(folder / LOCK, f"The fine-tuning {folder}") if rank() == 0 else nullcontext():
        run = FineTuning(
            Classifier(subject, len(val.classes), settings, seed), train, val, settings, len(val.classes), folder, identity, seed,
            job.device, job.precision, accumulate, workers, *((say, progress) if rank() == 0 else ()),
        )  # fmt: skip
        return run.run(), data, val


def _record(job: Job, subject, name: str, settings, results: list[dict], data: dict, val, began: float) -> None:
    from ...evals.records import summed_up

    values = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items())
    protocol = f"finetune (MAE, BEiT), settings of {name}: {values}; last epoch"
    job.add("finetune", protocol, "top1", subject, settings.readout, val.decoder, data, summed_up(results), ("loss",), began)
