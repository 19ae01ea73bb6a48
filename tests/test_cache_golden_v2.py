"""Stores of version 2, int4 and visible tokens, committed: they must be readable for ever, as those of version 1 beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracles import race
from test_cache_golden import GOLDEN as GOLDEN_V1
from test_cache_golden import (
    ROW,
    require_written_again,
    small_array,
    stored_row,
    stores_that_read_alike,
)

from teacher_cache.store.reader import READERS

GOLDEN = GOLDEN_V1.with_name("cache_v2")
STORES = ("four", "seen")


def whitened(store: Path, layer: int, row: int) -> np.ndarray:
    """float32 [T, D], from docs/format.md alone."""
    manifest = json.loads((store / "zarr.json").read_text())["attributes"]["teacher_cache"]
    assert manifest["format_version"] == 2
    spec, dim = manifest["store"], manifest["teacher"]["dim"]
    stored = stored_row(store, f"tokens/{layer:02d}", row)
    if spec["dtype"] == "int4":
        q = np.empty((len(stored), 2 * stored.shape[1]), "f4")
        q[:, 0::2], q[:, 1::2] = stored % 16, stored // 16
        stored = q[:, :dim] - 8
    scale = stored_row(store, "scale", row)[spec["layers"].index(layer)].astype("f4")
    per_channel = scale[:, np.arange(dim) // spec["group"]]
    return stored * per_channel * small_array(store, f"quant/{layer:02d}/spread") + small_array(
        store, f"quant/{layer:02d}/centre"
    )


def test_a_reader_written_from_the_document_reads_the_targets():
    """Tokens, dequantised as the document says, are the teacher's: of int4 within 15 % of their size, and those of `index`."""
    teacher = np.load(GOLDEN.with_suffix(".npy"))  # [C+N, D] of the last block, row ROW
    four = whitened(GOLDEN / "view-000" / "four.zarr", 6, ROW)
    assert four.shape == teacher.shape and 0.01 < np.linalg.norm(four - teacher) / np.linalg.norm(teacher) < 0.15
    store = GOLDEN / "view-000" / "seen.zarr"
    index = stored_row(store, "index", ROW)
    np.testing.assert_allclose(whitened(store, 6, ROW), teacher[[0, *(1 + index)]], atol=0.05)
    assert np.array_equal(index, race(stored_row(store, "attention", ROW)[None], np.array([ROW]), 0, 5)[0])


@pytest.mark.parametrize("reader", READERS)
def test_the_golden_stores_are_readable(reader):
    """Every reader, and zarr, gives every row of every array as it stands in the files, and verify finds them sound."""
    for store in stores_that_read_alike(GOLDEN, STORES, reader):
        np.testing.assert_array_equal(store.tokens([ROW], 6)[0], whitened(store.path, 6, ROW))


def test_the_writers_give_the_same_bytes_again(tmp_path):
    """From the same manifests and stored rows every file is written again bit for bit, on any machine."""
    require_written_again(GOLDEN, STORES, tmp_path)
