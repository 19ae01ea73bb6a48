"""Which rows of labelled data are used: shares and splits that keep the balance of the classes, by a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ...seeds import position_seed

# n rows


def balanced_share(labels: Tensor, share: float, seed: int) -> Tensor:
    """int64, ascending: rows of a share of every class, at least one of each, drawn by `seed`; all of them for a share of 1.

    labels: int64 [n].  share: above 0, at most 1; a class of n images gives round(share * n), as the 1 % and 10 % of
    few-shot protocols. Raises ConfigError for another share.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--share {share}: give a share of the training images above 0 and at most 1, as .01 for 1 %.")
    if share == 1:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(position_seed("share", seed, 0))
    chosen = []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        n = max(1, round(share * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:n]])
    return torch.cat(chosen).sort().values


def split(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """(rows to learn from, rows to choose by), both ascending; `held_out` of every class, at least one where a class has two.

    Raises ConfigError where no row could be held out: every class has a single image.
    """
    generator = torch.Generator().manual_seed(position_seed("split", seed, 0))
    learn, choose = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n = min(max(1, round(held_out * len(rows))), len(rows) - 1)
        choose.append(rows[:n])
        learn.append(rows[n:])
    if not sum(map(len, choose)):
        raise ConfigError("Every class has one training image, so none can be held out to choose a setting by. Give more.")
    return torch.cat(learn).sort().values, torch.cat(choose).sort().values
