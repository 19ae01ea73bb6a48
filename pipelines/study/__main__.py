"""`python -m pipelines.study run | teacher | tables`: docs/study.md says what is asked and how."""

from __future__ import annotations

import time
from pathlib import Path

import click

from student.errors import StudentError
from teacher_cache.errors import TeacherCacheError, UsageError
from teacher_cache.files.durable import write_whole
from teacher_cache.terminal.command import one_line_errors, say

from . import records
from .cells import GROUPS, KINDS, Cell, cells_of
from .records import Scale

PATH = click.Path(path_type=Path)
DATA = click.option("--data", type=PATH, required=True, help="CIFAR-10 as images: an archive or folder with train/CLASS/*.jpg "
                    "and test/CLASS/*.jpg. Any other images so laid out do as well.")  # fmt: skip
OUT = click.option("--out", type=PATH, default=Path("study-out"), show_default=True, help="Folder of the study.")
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
SETTINGS = {"help_option_names": ["-h", "--help"]}
RESUME = "What is finished is kept; the same command goes on."


@click.group(context_settings=SETTINGS)
def study():
    """What students of one teacher learn, by method, views, and bits of a target.

    \b
    Example:
      python -m pipelines.study run --data cifar10.tar.gz --cells all --seeds 0,1 --budget 120
      python -m pipelines.study tables
    """


@study.command(context_settings=SETTINGS)
@DATA
@OUT
@click.option("--kind", type=click.Choice(KINDS), default="self", show_default=True, help="Without labels, or with them.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over train/. [default: 8 self, 4 supervised]")
@DEVICE
def teacher(data: Path, out: Path, kind: str, epochs: int | None, device: str):
    """Train a teacher on the images of train/, or go on; `run` does the same where one is missing."""
    with one_line_errors(RESUME, others=(StudentError,)):
        from dataclasses import replace

        from teacher_cache.device import pick_device

        from .cli.teaching import PLANS, train_teacher
        from .subset import unpack

        plan = PLANS[kind] if epochs is None else replace(PLANS[kind], epochs=epochs)
        train_teacher(plan, unpack(data, out) / "train", out / "teachers" / kind, pick_device(device, "fp32")[0])


@study.command(context_settings=SETTINGS)
@DATA
@OUT
@click.option("--cells", "group", default="all", show_default=True, help=", ".join(GROUPS))
@click.option("--seeds", default="0,1", show_default=True, help="Of the students, as 0,1,2.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="Minutes; no cell is begun that would end behind them. "
              "Teachers do not count.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), default=Scale.epochs, show_default=True, help="Of each student.")
@click.option("--batch-size", type=click.IntRange(1), default=Scale.batch_size, show_default=True, help="Of each student.")
@click.option("--images", type=click.IntRange(0), default=Scale.n_train, show_default=True, help="Of train/; 0: all.")
@click.option("--test-images", type=click.IntRange(0), default=Scale.n_test, show_default=True, help="Of test/; 0: all.")
@click.option("--dry-run", is_flag=True, help="Say which cells are done and which are not, and exit.")
@DEVICE
def run(data: Path, out: Path, group: str, seeds: str, budget: float | None, epochs: int, batch_size: int, images: int,
        test_images: int, dry_run: bool, device: str):  # fmt: skip
    """Run cells, one after the other, each once; interrupted, the same command goes on.

    Exit codes: 0 done, or the budget is; 1 a cell failed, and the others are done; 2 the command is at fault; 130 interrupted.
    """
    with one_line_errors(RESUME, others=(StudentError,)):
        cells = cells_of(group, _seeds(seeds))
        if dry_run:
            for cell in cells:
                click.echo(f"{'done' if records.record_path(out, cell.name).exists() else 'open'}  {cell.name}")
            return
        failed = _run_cells(_study(data, out, Scale(images, test_images, epochs, batch_size), device), cells, budget)
        if failed:
            say(*(f"failed   {name}: {why}" for name, why in failed.items()))
            raise SystemExit(1)


@study.command(context_settings=SETTINGS)
@OUT
@click.option("--page", type=PATH, help="Write the tables there. [default: OUT/tables.md, the picture beside it]")
def tables(out: Path, page: Path | None):
    """Tables, advice and the plot, from the records alone. Cells that are missing are named."""
    with one_line_errors("The same command starts again.", others=(StudentError,)):
        from .picture import draw
        from .tables import page_of

        found = records.read_all(out)
        page = page or out / "tables.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        picture = page.with_name("study.png")
        write_whole(page, page_of(found, picture.name if draw(found, picture) else None).encode())
        click.echo(page)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"--seeds {text}: give whole numbers with commas between them, as 0,1.") from error


def _study(data: Path, out: Path, scale: Scale, device: str):
    from teacher_cache.device import pick_device

    from .cli.running import Study
    from .subset import Subset, fingerprints, lay_out, unpack

    folder = unpack(data, out)
    prints = fingerprints(folder)
    records.require_same(out, scale, prints)
    images = lay_out(folder, out / "images", Subset(scale.n_train, scale.n_test), prints)
    about = records.begin(out, scale, prints)
    return Study(out, images, folder / "train", scale, about, pick_device(device, "fp32")[0])


def _run_cells(study, cells: list[Cell], budget: float | None) -> dict[str, str]:
    """Run those that are not done; {name: why} of those that failed."""
    failed: dict[str, str] = {}
    took: dict[str, float] = {}  # by method, of its longest cell
    spent = 0.0
    for number, cell in enumerate(cells, 1):
        if records.record_path(study.out, cell.name).exists():
            continue
        expected = took.get(cell.method, max(took.values(), default=0.0))
        if budget is not None and spent + expected > 60 * budget:
            left = sum(not records.record_path(study.out, other.name).exists() for other in cells)
            say(f"budget   {spent / 60:.1f} of {budget:g} minutes are spent; {left} cells are left. The same command goes on.")
            break
        if cell.needs_teacher or cell.method == "mae":
            study.weights(cell.kind)  # what it takes is apart from the budget
        say(f"\ncell     {number} of {len(cells)}: {cell.name}")
        began = time.monotonic()
        try:
            record = study.run(cell)
        except (TeacherCacheError, StudentError) as error:
            failed[cell.name] = str(error)
            say(f"failed   {cell.name}: {error}")
            continue
        finally:
            seconds = time.monotonic() - began
            spent += seconds
        took[cell.method] = max(seconds, took.get(cell.method, 0.0))
        say(f"done     {cell.name}: kNN {records.accuracy(record, 'knn'):.1%}, {seconds:.0f} s")
    return failed


if __name__ == "__main__":
    study(prog_name="python -m pipelines.study")
