"""The order of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.feed.order import Order


@given(
    n_rows=st.integers(1, 500),
    block=st.integers(1, 64),
    window=st.integers(1, 5),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_an_epoch_has_every_row_once(n_rows, block, window, seed, epoch):
    """Whatever the blocks, an epoch is a permutation of all rows, and the same one each time it is asked for."""
    order = Order(n_rows, 1, seed, block, window)
    rows = order.epoch(epoch)
    assert sorted(rows) == list(range(n_rows))
    assert np.array_equal(rows, order.epoch(epoch))


@given(
    n_rows=st.integers(1, 300),
    block=st.integers(1, 40),
    window=st.integers(1, 5),
    bounds=st.tuples(st.integers(0, 300), st.integers(0, 300)),
)
def test_a_part_of_an_epoch(n_rows, block, window, bounds):
    """Places of an epoch that are asked for by themselves hold what they hold in the whole, none where there are none."""
    order, (first, last) = Order(n_rows, 1, 7, block, window), sorted(bounds)
    part = order.epoch(2, first, last)
    assert part.dtype == np.int64 and np.array_equal(part, order.epoch(2)[first:last])


def test_epochs_and_seeds_differ():
    """Another epoch and another seed give another order."""
    order = Order(100, 10, seed=3)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), Order(100, 10, seed=4).epoch(0))


def test_windows_keep_reads_near_each_other():
    """The rows of a window are those of a few blocks, so few shards are open and a cache of a window's size serves them."""
    rows = Order(1000, 10, seed=0, block_rows=50, window_blocks=4).epoch(0)
    for window in rows.reshape(5, 200):
        assert len(set(window // 50)) == 4


@pytest.mark.parametrize("first, last", [(0, 12), (3, 12), (4, 5), (7, 12)])
def test_steps_resume_anywhere(first, last):
    """Steps asked for from the middle are the same steps; an epoch's left-over rows are dropped."""
    order = Order(43, 10, seed=1)
    whole = np.concatenate([rows for _, rows in order.steps(0, 12)])
    assert order.steps_per_epoch == 4
    part = list(order.steps(first, last))
    assert np.array_equal(np.concatenate([rows for _, rows in part]), whole[first:last])
    assert [epoch for epoch, _ in part] == sorted({step // 4 for step in range(first, last)})
