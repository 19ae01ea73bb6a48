"""student-eval: what a trained student, or any other encoder, has learned."""

from __future__ import annotations

import click

from .evaluating.dense import segment
from .evaluating.finetune import finetune
from .evaluating.frozen import knn, linear, logreg, retrieval
from .evaluating.maps import attention, rank, semantic_probe
from .evaluating.table import table
from .options import SETTINGS


@click.group(context_settings=SETTINGS)
def evaluate():
    """Measure what a trained student has learned, beside its teacher, models of timm and random weights.

    \b
    Example:
      student-eval knn runs/a --train imagenet/train --val imagenet/val

    Exit codes: 0 done, 1 the data or the run is at fault, 2 the command is, 130 interrupted.
    """


for command in (knn, linear, logreg, finetune, semantic_probe, segment, retrieval, attention, rank, table):
    evaluate.add_command(command)
