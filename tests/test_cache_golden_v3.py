"""Stores of version 3, committed: they must be readable for ever, and hold the numbers of those of versions 1 and 2.

Nothing makes them any more. test_cache_golden_v4.py makes their like in the version of today.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from fakes import Bf16Teacher
from store_fakes import write_again
from test_cache_golden import GOLDEN as GOLDEN_V1
from test_cache_golden import N_IMAGES, ROW, TOKEN, files_of, picked, stored_row, unseal, whitened
from zarr_oracle import rows_by_zarr

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.store.reader import READERS, StoreReader

GOLDEN = GOLDEN_V1.with_name("cache_v3")
NUMBERS = GOLDEN.with_suffix(".json")
STORES = ("plain", "mixed", "seen")
IN_FP32 = [1, 4, 5]
"""Rows of the store `mixed` that its teacher gave in fp32 alone."""
NAME_SOFTWARE = ("zarr.json", "store.json", "complete.json", "shards.npy", "spare.tar")
"""Files of a store that follow from the versions in its manifest. The header of a shard, 64 bytes, does so too."""


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads(NUMBERS.read_text())


def test_a_reader_written_from_the_document_reads_the_store(numbers):
    """Manifest, rows in fp32 and stored numbers are found with what docs/format.md says alone, and are the teacher's."""
    for name in STORES:
        store = GOLDEN / "view-000" / f"{name}.zarr"
        manifest = json.loads((store / "zarr.json").read_text())["attributes"]["teacher_cache"]
        assert manifest["format_version"] == 3
        assert {"activation", "positions"} <= manifest["teacher"].keys() and "visible" in manifest["store"]
        assert manifest["made"].keys() == {"batch_size", "compile", "device"}
        assert unseal(store / "complete.json")["fp32_rows"] == (IN_FP32 if name == "mixed" else [])
        for array, expected in numbers["stores"][name].items():
            assert picked(stored_row(store, array, ROW)) == expected
    last = numbers["teacher"]["06"]
    np.testing.assert_allclose(whitened(GOLDEN / "view-000/plain.zarr", 6, ROW)[[0, TOKEN], :6], last, atol=0.05)
    mixed = whitened(GOLDEN / "view-000/mixed.zarr", 6, ROW)[[0, TOKEN], :6]  # in bf16, which the fake tells by an offset
    np.testing.assert_allclose(mixed - Bf16Teacher.OFFSET, last, atol=0.002)


@pytest.mark.parametrize("reader", READERS)
def test_the_golden_stores_are_readable(reader):
    """Every reader, and zarr, gives every row of every array as it stands in the files, and verify finds them sound."""
    view = Cache(GOLDEN).finished_view(0)
    assert view.store_names() == sorted(STORES)
    for name in STORES:
        store = StoreReader(view.store_path(name), reader=reader)
        for array in store.spec.array_names:
            expected = [stored_row(store.path, array, row) for row in range(N_IMAGES)]
            np.testing.assert_array_equal(store.read(array, range(N_IMAGES)), expected)
            np.testing.assert_array_equal(rows_by_zarr(store.path, array, range(N_IMAGES)), expected)
        assert store.store.read_fp32_rows().tolist() == (IN_FP32 if name == "mixed" else [])
    assert verify(Cache(GOLDEN))[0] == []


def test_the_writers_give_the_same_bytes_again(tmp_path):
    """From the same manifests and stored rows every file is written again bit for bit, on any machine."""
    for name in STORES:
        path, store = Cache(GOLDEN).view(0).store_path(name), tmp_path / f"{name}.zarr"
        write_again(path, store)
        assert files_of(store) == files_of(path)


def behind_header(name: str, files: dict[str, bytes]) -> bytes:
    """All bytes of a file; of a shard file those behind its header."""
    return files[name][64 if "c." in name and re.search("(^|/)(tokens|scale|attention|index)/", name) else 0 :]


@pytest.mark.parametrize(("golden", "then", "now"), [("cache_v1", "fake", "plain"), ("cache_v2", "seen", "seen")])
def test_a_version_changes_no_number(golden, then, now):
    """Stores that were made of the same crops and teacher in older versions have the same quantiser, probe, head and rows."""
    old, new = (
        files_of(path) for path in (GOLDEN_V1.with_name(golden) / f"view-000/{then}.zarr", GOLDEN / f"view-000/{now}.zarr")
    )
    assert old.keys() == new.keys()
    arrays = [name for name in old if not name.endswith(NAME_SOFTWARE)]
    assert len(arrays) > 10 and [name for name in arrays if behind_header(name, old) != behind_header(name, new)] == []
