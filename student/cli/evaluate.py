"""student-eval: what a trained student has learned."""

from __future__ import annotations

import json
from pathlib import Path

import click

from teacher_cache.errors import UsageError
from teacher_cache.terminal.command import one_line_errors

from ..errors import StudentError
from .options import COMMAND_AT_FAULT, PATH, SETTINGS


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
