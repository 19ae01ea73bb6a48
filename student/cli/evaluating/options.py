"""Options that the commands of student-eval have in common, as values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from teacher_cache.errors import UsageError
from teacher_cache.files.durable import make_folder, user_cache_folder
from teacher_cache.format.layout import CACHE_JSON
from teacher_cache.terminal.command import say

from ..options import PATH

FEATURES = "STUDENT_FEATURES"
"""Environment variable: the folder of --features."""


@dataclass(frozen=True)
class Options:
    """What was asked for, whichever the evaluator."""

    whats: tuple[str, ...]
    val: Path
    train: Path | None = None
    readouts: tuple[str, ...] = ()
    share: float = 1.0
    n_seeds: int = 1
    weights: tuple[str, ...] = ()
    like: str | None = None
    averaged: bool = False
    device: str = "auto"
    precision: str = "fp32"
    features: Path | None = None
    no_features: bool = False
    record: Path | None = None
    as_json: bool = False


def measuring(train: str = "", val: str = "", readouts: bool = False, draws: bool = False, frozen: bool = True) -> Callable:
    """A decorator: WHAT and the common options; the command is called with an Options and with options of its own.

    train, val: help of --train (none without it) and --val.  readouts: whether --readout is one.  draws: whether --share and
    --seeds are.  frozen: whether features are kept, in fp32 unless told otherwise.
    """
    options = [click.argument("whats", metavar="WHAT...", nargs=-1, required=True)]
    if train:
        options.append(click.option("--train", type=PATH, required=True, help=train))
    options.append(click.option("--val", type=PATH, required=True, help=val))
    if readouts:
        options += [
            click.option("--readout", "readouts", multiple=True, type=click.Choice(["cls", "mean"]),
                         help="The CLS token, or the mean of the patches. [default: both, where there is a CLS token]"),
        ]  # fmt: skip
    if draws:
        options += [
            click.option("--share", type=float, default=1.0, show_default=True,
                         help="Share of the training images of each class, as .01 for 1 %; drawn by the seed."),
            click.option("--seeds", "n_seeds", type=click.IntRange(1), default=1, show_default=True,
                         help="So many runs with seeds 0, 1 ...: mean and deviation."),
        ]  # fmt: skip
    default = "fp32" if frozen else "auto"
    options += [
        click.option("--precision", type=click.Choice(["fp32", "bf16", "auto"]), default=default, show_default=True,
                     help="Of the encoder; auto is bf16 on a GPU."),
    ]  # fmt: skip
    if frozen:
        options += [
            click.option("--features", type=PATH, envvar=FEATURES, help="Folder that features of encoders are kept in. [default: "
                         "teacher-cache/features in the user's cache folder]"),
            click.option("--no-features", is_flag=True, help="Keep no features."),
        ]  # fmt: skip
    options += [
        click.option("--weights", multiple=True, help="PATH or random:SEED of a teacher's weights, as for teacher-cache extract; "
                     "NAME=PATH where several teachers are asked for."),
        click.option("--like", help="Architecture of `random`: a preset, a run, or timm:NAME. [default: that of the first run]"),
        click.option("--averaged", is_flag=True, help="Of runs, the moving average of the weights (optim.ema)."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--record", type=PATH, help="Append the results to this file, a JSON line each: see student-eval table."),
        click.option("--json", "as_json", is_flag=True, help="Machine-readable."),
    ]  # fmt: skip

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def command(**given):
            common = {name: given.pop(name) for name in list(given) if name in Options.__dataclass_fields__}
            return function(Options(**common), **given)

        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def numbers(option: str, text: str, kind: type) -> tuple:
    """Numbers from `a,b,c`. UsageError for anything else."""
    try:
        found = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found:
        raise UsageError(f"{option} {text}: give numbers with commas between them, as 10,20,100.")
    return found


def features_folder(options: Options) -> Path | None:
    """The folder that features are kept in, made if need be; None for --no-features, or where the default cannot be made.

    Raises UsageError for one inside a cache or a run, or that cannot be made.
    """
    from ...files.run_directory import CONFIG, recorded_identity

    if options.no_features:
        return None
    try:
        folder = options.features or user_cache_folder() / "teacher-cache" / "features"
        for above in [folder.absolute(), *folder.absolute().parents]:
            is_run = (above / CONFIG).exists() and recorded_identity(above) is not None
            if is_run or (above / CACHE_JSON).exists():
                what = "a run" if is_run else "a cache"
                raise UsageError(f"--features {folder}: {above} is {what}, which holds nothing else. Give another folder.")
        make_folder(folder)
    except OSError as error:
        if options.features:
            raise UsageError(
                f"--features {options.features}: cannot be made ({error.strerror}). Give a folder that can be written to."
            ) from error
        say(f"features: no folder for them can be made ({error.strerror}); none are kept. Give --features DIR to keep them.")
        return None
    return folder
