"""student-eval knn, linear, logreg, retrieval: what frozen features tell of classes."""

from __future__ import annotations

import click

from .job import Job, ending
from .options import Options, measuring, numbers

TRAIN = "Images that are learned from: a folder of class folders, or a cache."
VAL = "Images that are judged: the same. Their classes may be some of those of --train, by name."


@click.command()
@measuring("Images that vote: a folder of class folders, or a cache.", VAL, readouts=True, draws=True)
@click.option("--neighbours", default="10,20,100,200", show_default=True, help="Numbers of neighbours that vote.")
def knn(options: Options, neighbours: str):
    """k-nearest-neighbour accuracy of frozen features, by DINO's protocol (weighted votes, temperature .07).

    WHAT is a run, an exported file, timm:NAME, a teacher, or random; several make one table. Folders are cut in the middle (short
    side resized to 8/7 of the encoder's size); of a cache, view 0 is read as it is. The classes of --val may be some of those of
    --train, by name (ImageNet-A, ImageNet-R): then only images of these vote.

    \b
    Example:
      student-eval knn runs/a --train imagenet/train --val imagenet/val
      student-eval knn runs/a runs/b clip-b16 random --weights ViT-B-16.pt --train imagenet/train --val imagenet/val
    """
    with ending():
        from ...evals import KNN

        Job(options).measure_frozen(KNN(numbers("--neighbours", neighbours, int)))


@click.command()
@measuring(TRAIN, VAL, readouts=True, draws=True)
@click.option("--rates", help="Base learning rates, for a batch of 256. [default: 13 from .0125 to 100]")
@click.option("--epochs", type=click.IntRange(1), default=90, show_default=True, help="Of training.")
@click.option("--warmup-epochs", type=click.FloatRange(0), default=10, show_default=True, help="Of linear warm-up.")
@click.option("--batch-size", type=click.IntRange(1), default=16384, show_default=True, help="The training set at most.")
def linear(options: Options, rates: str | None, epochs: int, warmup_epochs: float, batch_size: int):
    """A linear classifier on frozen features, by MAE's protocol (LARS, batch norm without affine).

    All rates are tried at once, and reported with --json; which one counts is chosen on a tenth of --train, never on --val.
    Features are those of one middle crop an image, computed once.

    \b
    Example:
      student-eval linear runs/a --train imagenet/train --val imagenet/val
      student-eval linear runs/a --share .01 --seeds 3 --train imagenet/train --val imagenet/val
    """
    with ending():
        from ...evals import LinearProbe

        settings = {"rates": numbers("--rates", rates, float)} if rates else {}
        probe = LinearProbe(epochs=epochs, warmup_epochs=warmup_epochs, batch_size=batch_size, **settings)
        Job(options).measure_frozen(probe)


@click.command()
@measuring(TRAIN, VAL, readouts=True, draws=True)
@click.option("--strengths", help="Values of C, the inverse of the penalty. [default: DINOv2's 45 from 1e-6 to 1e5]")
def logreg(options: Options, strengths: str | None):
    """Logistic regression on frozen features, by DINOv2's protocol (L2 penalty, C from a grid).

    C is chosen on a tenth of --train, never on --val.

    \b
    Example:
      student-eval logreg runs/a --train imagenet/train --val imagenet/val
    """
    with ending():
        import sklearn.linear_model  # noqa: F401  (named before hours of features)

        from ...evals import LogisticRegression

        settings = {"strengths": numbers("--strengths", strengths, float)} if strengths else {}
        Job(options).measure_frozen(LogisticRegression(**settings))


@click.command()
@measuring(
    "Images that are found: a folder of class folders, or a cache.", "Images that ask: the same.", readouts=True, draws=True
)
def retrieval(options: Options):
    """Mean average precision of finding images of the same class by cosine of frozen features.

    \b
    Example:
      student-eval retrieval runs/a --train imagenet/train --val imagenet/val
    """
    with ending():
        from ...evals import Retrieval

        Job(options).measure_frozen(Retrieval())
