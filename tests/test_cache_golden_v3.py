"""Stores of version 3, committed: they must be readable for ever, and hold the numbers of those of versions 1 and 2.

Nothing makes them any more. test_cache_golden_v4.py makes their like in the version of today.
"""

from __future__ import annotations

import json
import re

import pytest
from test_cache_golden import GOLDEN as GOLDEN_V1
from test_cache_golden import (
    ROW,
    files_of,
    picked,
    require_the_teachers_tokens,
    require_written_again,
    stored_row,
    stores_that_read_alike,
    unseal,
)

from teacher_cache.store.reader import READERS

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
    require_the_teachers_tokens(GOLDEN, numbers["teacher"]["06"])


@pytest.mark.parametrize("reader", READERS)
def test_the_golden_stores_are_readable(reader):
    """Every reader, and zarr, gives every row of every array as it stands in the files, and verify finds them sound."""
    for name, store in zip(STORES, stores_that_read_alike(GOLDEN, STORES, reader), strict=True):
        assert store.store.read_fp32_rows().tolist() == (IN_FP32 if name == "mixed" else [])


def test_the_writers_give_the_same_bytes_again(tmp_path):
    """From the same manifests and stored rows every file is written again bit for bit, on any machine."""
    require_written_again(GOLDEN, STORES, tmp_path)


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
