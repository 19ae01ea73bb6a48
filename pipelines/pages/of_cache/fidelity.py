"""The true error of stored tokens on a sample: the teacher is run once more, and compared with what is stored."""

from __future__ import annotations

import numpy as np

from teacher_cache.cache import View
from teacher_cache.crops.beton import CropReader
from teacher_cache.extraction.extract import run_teacher
from teacher_cache.extraction.probe import require_same_probe
from teacher_cache.format.quantize import ChannelStatistics, token_errors
from teacher_cache.store.reader import StoreReader
from teacher_cache.terminal.progress import progress

BATCH = 16


def measured_errors(view: View, store: StoreReader, teacher, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median and the largest error of a row's tokens, in each layer: float64 [L, n] twice, as spec.LayerFidelity has them.

    teacher: a teachers.base.Teacher with the weights of the store. A float16 store has no channel statistics: there errors are
    relative L2. Raises MismatchError if the teacher answers to the probe otherwise than it did, or crops decode otherwise here.
    """
    crops, layers = CropReader(view.path), store.spec.layers
    require_same_probe(store.store, teacher)
    crops.require_same_decoder()
    plain = ChannelStatistics(np.zeros(store.teacher.dim, "float32"), np.ones(store.teacher.dim, "float32"))
    names, in_fp32 = view.cache.images().names, store.store.read_fp32_rows()
    medians, worst = np.zeros((2, len(layers), len(rows)))
    with progress("running the teacher again", len(rows), "crops") as advance:
        for start in range(0, len(rows), BATCH):
            batch = slice(start, start + BATCH)
            index = store.read("index", rows[batch]) if store.spec.visible else None
            tokens, _ = run_teacher(teacher, crops.read(rows[batch]), rows[batch], layers, names.__getitem__, in_fp32, index)
            for i, layer in enumerate(layers):
                errors = token_errors(tokens[:, i], store.tokens(rows[batch], layer), store.statistics.get(layer, plain))
                medians[i, batch], worst[i, batch] = np.median(errors, 1), errors.max(1)
            advance(len(rows[batch]))
    return medians, worst
