"""Retrieval by class: for each query, how early the images of its class come when all others are ordered by cosine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..watch import Watch, unwatched
from .protocol import Labelled

# n queries, m gallery


def average_precisions(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> Tensor:
    """float32 [n]: average precision of each query, the mean of the precisions at the ranks of the gallery's images of its class.

    Features [n, D] and [m, D] are compared by cosine; NaN for a query whose class the gallery lacks.
    """
    cosine = F.normalize(queries.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T
    order = cosine.argsort(dim=1, descending=True, stable=True)  # [n, m]
    relevant = (gallery_labels[order] == query_labels[:, None]).float()
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    precision = relevant.cumsum(1) / ranks
    return (precision * relevant).sum(1) / relevant.sum(1)


@dataclass(frozen=True)
class Retrieval:
    """Mean average precision: of the queries of each class, then over the classes."""

    most_numbers: int = 1 << 26
    """Queries times gallery at once."""
    name: ClassVar[str] = "retrieval"
    main: ClassVar[str] = "map"
    draws: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ()

    @property
    def protocol(self) -> str:
        return "retrieval: val asks train, cosine, mean average precision over classes"

    def score(self, train: Labelled, val: Labelled, seed: int = 0, watch: Watch = unwatched) -> Iterator[tuple[str, float]]:
        """Yields "map", over classes, and "map_queries", over all queries alike; both in 0..1."""
        chunk = max(1, self.most_numbers // len(train))
        found = []
        with watch("queries", len(val), "images") as advance:
            for rows in torch.arange(len(val)).split(chunk):
                asked = val.rows(rows)
                found.append(average_precisions(asked.features, asked.labels, train.features, train.labels))
                advance(len(rows))
        precisions = torch.cat(found)
        by_class = [precisions[val.labels == label].mean() for label in val.labels.unique()]
        yield "map", float(torch.stack(by_class).nanmean())
        yield "map_queries", float(precisions.nanmean())
