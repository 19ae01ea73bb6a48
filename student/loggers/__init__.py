"""Loggers of a run, which follow metrics.jsonl: TensorBoard, Weights & Biases, MLflow, a table. None is imported unasked.

train/loss, train/lr, train/images_per_s, train/wait_share    of a step; train/mimic ..., its losses and their details
val/knn, val/knn_cls_20 ...                                   of a probe: the figure that counts, and all of them
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .follow import Logger

LOGGERS = {
    "tensorboard": ("to_tensorboard", "ToTensorBoard"),
    "wandb": ("to_wandb", "ToWandb"),
    "mlflow": ("to_mlflow", "ToMLflow"),
    "csv": ("to_csv", "ToCsv"),
}
"""Name -> where its class is."""


def loggers_of(names: Sequence[str]) -> list[type[Logger]]:
    """The classes of these loggers, each ready to be used.

    Raises ConfigError for an unknown name and where a logger lacks what it needs (a login), ModuleNotFoundError where its package
    is not installed.
    """
    found = []
    for name in dict.fromkeys(names):
        if name not in LOGGERS:
            raise ConfigError(f"There is no logger {name!r}; there are {', '.join(LOGGERS)}.")
        module, kind = LOGGERS[name]
        found.append(getattr(importlib.import_module(f".{module}", __name__), kind))
        found[-1].require()
    return found
