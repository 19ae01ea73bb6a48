"""The parts of the page that show crops: the worst rows, neighbours, the map."""

from __future__ import annotations

import numpy as np

from teacher_cache.cache import View
from teacher_cache.crops.beton import CropReader
from teacher_cache.store.reader import StoreReader

from . import charts
from .fidelity import measured_errors
from .neighbours import agreement, nearest, on_a_plane
from .sample import Gathered
from .thumbnails import sprite, thumbnail

MEASURED_ROWS = 64
"""Rows that the teacher is run on again."""
N_WORST, N_QUERIES, N_NEIGHBOURS = 6, 6, 6
PICTURE_SIDE = 96
MAP_POINTS, MAP_SIDE = 1000, 64
"""Points of the map; side of their pictures, pixels."""
COLOURED_CLASSES = 20
"""So many classes have colours and shapes that differ enough; of more, one at a time is picked out."""


class Album:
    """The crops of a view with their names, classes and pictures."""

    def __init__(self, view: View):
        self.reader, self.images = CropReader(view.path), view.cache.images()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    def about(self, row: int) -> dict:
        """Row, name, label (-1: none) and class ("": none)."""
        label = int(self.images.labels[row])
        return {
            "row": int(row),
            "name": self.images.names[row],
            "label": label,
            "class": self.classes[label] if label >= 0 else "",
        }

    def pictured(self, row: int) -> dict:
        """`about` with a `picture`."""
        return {**self.about(row), "picture": thumbnail(self.reader, int(row), min(PICTURE_SIDE, self.reader.size))}


def fidelity(view: View, store: StoreReader, gathered: Gathered, album: Album, teacher, seed: int) -> dict:
    """What is recorded, what was measured now (teacher is not None), and the rows that storing is worst for."""
    recorded, rows, errors, measured = store.manifest.fidelity, gathered.rows, gathered.expected_errors, None
    if teacher is not None:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MEASURED_ROWS])
        medians, errors = measured_errors(view, store, teacher, rows)
        measured = tuple(float(value) for value in np.median(medians, 1))
    table = []
    for i, layer in enumerate(recorded):
        line = [str(layer.layer), *map(_percent, (layer.median, layer.p99, layer.worst)), f"{layer.n_tokens:,}"]
        table.append(line + ([_percent(measured[i]), _percent(errors[i].max())] if measured else []))
        if layer.cls is not None:
            table.append([f"{layer.layer} CLS", *map(_percent, layer.cls), "", *([""] * 2 if measured else [])])
    return {
        "table": table,
        "chart": charts.fidelity_chart(recorded, measured) if recorded else None,
        "worst": [] if errors is None else _worst(rows, errors, store.spec.layers, album),
        "measured": measured is not None,
        "n": len(rows),
        "dtype": store.spec.dtype,
    }


def _worst(rows: np.ndarray, errors: np.ndarray, layers: tuple[int, ...], album: Album) -> list[dict]:
    """The rows with the largest of `errors` [L, n] in any layer."""
    layer_of, error_of = errors.argmax(0), errors.max(0)  # [n]
    return [
        {**album.pictured(rows[i]), "error": _percent(error_of[i]), "layer": layers[layer_of[i]]}
        for i in np.argsort(-error_of, kind="stable")[:N_WORST]
    ]


def _percent(error: float) -> str:
    return f"{100 * error:.2f} %"


def neighbours(gathered: Gathered, album: Album, seed: int) -> dict | None:
    """A few rows, of different classes as far as there are, with what is nearest to each in the sample."""
    if len(gathered.rows) < 2:
        return None
    found, labels = nearest(gathered.features, N_NEIGHBOURS), album.images.labels[gathered.rows]
    order = np.random.default_rng(seed).permutation(len(gathered.rows))
    _, first = np.unique(labels[order], return_index=True)  # of each class
    rest = np.setdiff1d(np.arange(len(order)), first)
    queries = []
    for i in order[np.concatenate([np.sort(first), rest])[:N_QUERIES]]:
        near = zip(found.index[i], found.cosine[i], strict=True)
        near = [{**album.pictured(gathered.rows[other]), "cosine": float(cosine)} for other, cosine in near]
        queries.append({**album.pictured(gathered.rows[i]), "near": near})
    has_classes = bool((labels >= 0).all()) and len(album.classes) > 1
    return {
        "queries": queries,
        "agreement": agreement(found, labels) if has_classes else None,
        "n_classes": len(album.classes),
        "n": len(gathered.rows),
    }


def map_of(gathered: Gathered, album: Album, seed: int) -> dict | None:
    """A part of the sample as points on a plane of 1000 x 700, and one picture of all their crops."""
    if len(gathered.rows) < 4:
        return None
    n_points = min(MAP_POINTS, len(gathered.rows))
    chosen = np.unique(np.linspace(0, len(gathered.rows) - 1, n_points).round().astype(int))
    rows, side = gathered.rows[chosen], min(MAP_SIDE, album.reader.size)
    address, columns = sprite(album.reader, rows, side)
    places = on_a_plane(gathered.features[chosen], seed) * (960, 660) + 20
    points = [{**album.about(row), "x": round(x, 1), "y": round(y, 1)} for row, (x, y) in zip(rows, places.tolist(), strict=True)]
    present = sorted({point["label"] for point in points if point["label"] >= 0})
    return {
        "points": points,
        "coloured": 1 < len(album.classes) <= COLOURED_CLASSES,
        "classes": [(label, album.classes[label]) for label in present],
        "sprite": address,
        "columns": columns,
    }
