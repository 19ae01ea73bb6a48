"""student-eval segment: what patch tokens tell of pixels."""

from __future__ import annotations

import click

from teacher_cache.terminal.progress import progress

from .job import Job, ending, told_of
from .options import Options, measuring

FOLDER = (
    "a folder with images/ and masks/, whose files have equal names but for their ends; values of masks are classes, 255 none."
)


@click.command()
@measuring(f"To learn from: {FOLDER}", "To be judged: the same.")
@click.option(
    "--seeds", "n_seeds", type=click.IntRange(1), default=1, show_default=True, help="So many runs: mean and deviation."
)
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True, help="Of training.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True, help="Of AdamW.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
def segment(options: Options, epochs: int, rate: float, batch_size: int):
    """mIoU of a linear layer on frozen patch tokens.

    Images and masks are cut in the middle. mIoU is that of ADE20K, Cityscapes and VOC: over all pixels, class by class.
    Patch tokens are kept as float16; they take 2 bytes x patches x width an image.

    \b
    Example:
      student-eval segment runs/a --train ade20k/training --val ade20k/validation
    """
    with ending():
        import torchmetrics  # noqa: F401  (named before hours of features)

        from pipelines.feed.labelled import SegmentedImages

        from ...evals import Segment
        from ...evals.frozen.segment import Segmented
        from ...evals.records import summed_up

        evaluator, job = Segment(epochs=epochs, rate=rate, batch_size=batch_size), Job(options)
        with job.showing():
            for subject, began in job.subjects():
                train, val = (
                    SegmentedImages(path, subject.image_size, mean=subject.mean, std=subject.std)
                    for path in (options.train, options.val)
                )
                masks = [images.masks() for images in (train, val)]
                sides = [
                    Segmented(job.features(subject, images, ("patches",))[0]["patches"], mask)
                    for images, mask in zip((train, val), masks, strict=True)
                ]
                by_seed = [
                    dict(evaluator.score(*sides, tuple(subject.encoder.grid), seed, progress, job.device))
                    for seed in range(options.n_seeds)
                ]
                data = {"train": told_of(train), "val": told_of(val)}
                job.add("segment", evaluator.protocol, evaluator.main, subject, "patches", val.decoder, data, summed_up(by_seed),
                        (), began)  # fmt: skip
