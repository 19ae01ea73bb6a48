"""Which rows a step takes: a function of (seed, step) alone, so a run resumes anywhere.

Blocks of neighbouring rows are shuffled, then rows inside a window of a few blocks. Rows of a cache are in random order of the
classes already (teacher_cache/crops/images.py), so a window mixes well. What is read for some time lies in a few shards: few
are open, and a cache in front of a slow disk that holds a window (16,384 rows; 2.5 GB a layer of a ViT-B/16 as int8) sees each
block read once, whole. Within a window reads are random, a row (150 kB) at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The order of `n_rows` rows in steps of `batch_size`; what is left over at the end of an epoch is dropped."""

    n_rows: int
    batch_size: int
    """Rows a step."""
    seed: int
    block_rows: int = 2048
    """Neighbouring rows that stay in one window; the cache's shard rows are a good choice."""
    window_blocks: int = 8

    @property
    def steps_per_epoch(self) -> int:
        return self.n_rows // self.batch_size

    def epoch(self, epoch: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """int64: all rows, each once; of them those at places [first, last) of the order, for which no other window is sorted.

        Shuffled by sorting raw Philox output: numpy may change its own `permutation`, and a resumed run must not notice.
        """
        last = self.n_rows if last is None else last
        draws = np.random.Philox(key=np.array([self.seed, epoch], "uint64"))

        def shuffled(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
            order = np.argsort(keys)  # twice as fast as a stable sort, and the same unless two of 64 bits are equal
            ordered = keys[order]
            return values[order if (ordered[1:] != ordered[:-1]).all() else np.argsort(keys, kind="stable")]

        starts = np.arange(0, self.n_rows, self.block_rows)
        starts = shuffled(starts, draws.random_raw(len(starts)))
        begin, wanted = 0, []
        for i in range(0, len(starts), self.window_blocks):
            if begin >= last:
                break
            blocks = [np.arange(start, min(start + self.block_rows, self.n_rows)) for start in starts[i : i + self.window_blocks]]
            window = np.concatenate(blocks)
            keys, end = draws.random_raw(len(window)), begin + len(window)
            if first < end and begin < last:
                wanted.append(shuffled(window, keys)[max(first - begin, 0) : last - begin])
            begin = end
        return np.concatenate(wanted) if wanted else np.empty(0, "int64")

    def steps(self, first_step: int, last_step: int):
        """(epoch, int64 [k, batch_size]) for the steps [first_step, last_step), an epoch at a time."""
        step = first_step
        while step < last_step:
            epoch, within = divmod(step, self.steps_per_epoch)
            n_steps = min(self.steps_per_epoch - within, last_step - step)
            rows = self.epoch(epoch, within * self.batch_size, (within + n_steps) * self.batch_size)
            yield epoch, rows.reshape(n_steps, self.batch_size)
            step += n_steps
