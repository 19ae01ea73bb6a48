"""Names of a cache's files: what belongs to what, and nothing but what is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from teacher_cache.files.durable import aside_path
from teacher_cache.format import layout

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["", "view-", "view-x", "view", "7", "view--1", "view-٣", "view-001.partial"])
def test_what_is_no_view(name):
    """A folder is a view by its name alone if that is `view-` and a number in digits of ASCII."""
    assert layout.view_number(name) is None


@pytest.mark.parametrize("number", [0, 7, 999, 1000])
def test_views_by_number(number):
    """The number of a view is found in its name again."""
    assert layout.view_number(layout.view_path(Path("c"), number).name) == number


def test_what_belongs_to_a_store():
    """Of the entries of a view a store owns its folder, its claims and what is aside of them, and no other store's."""
    store = Path("c/view-000") / layout.store_folder("clip-b16")
    own = [store, layout.store_claim(store), layout.store_claims(store)]
    for path in [*own, *map(aside_path, own)]:
        assert layout.owning_store(path.name) == store.name, path
    assert [layout.owning_store(name) for name in ("crops.npy", "spare.tar", "clip-b16", "clip-b16.zarr.old")] == [None] * 4
    assert layout.store_name(store.name) == "clip-b16"


def test_every_file_of_a_cache_has_a_name():
    """All files of the golden caches are named by layout.py: nothing lies in a cache that the code does not know."""
    fixed = {value for key, value in vars(layout).items() if key.isupper() and isinstance(value, str)}
    row_arrays = r"tokens/\d\d|scale|attention|index"
    of_layer = "|".join((*layout.STATISTICS, *layout.TRANSFORM))
    small = rf"{layout.QUANT}/\d\d/({of_layer})|{layout.LEVELS}|{layout.SCALES}"
    small += rf"|{layout.HEAD}/(gamma|beta|projection)|{layout.PROBE}"
    in_store = re.compile(
        rf"(({row_arrays}|{small}|tokens|{layout.QUANT}(/\d\d)?|{layout.HEAD})/)?{layout.ZARR_JSON}"
        rf"|({row_arrays})/c(\.\d+)+|({small})/c(\.0)+|{layout.COMMITS}/\d{{6}}\.json|[a-z]+\.[a-z]+"
    )
    n_files = 0
    for cache in (path.parent for path in GOLDEN.glob(f"*/{layout.CACHE_JSON}")):
        for path in (path for path in cache.rglob("*") if path.is_file()):
            parts, n_files = path.relative_to(cache).parts, n_files + 1
            if len(parts) > 2:
                name = "/".join(parts[2:])
                assert layout.view_number(parts[0]) is not None and layout.owning_store(parts[1]) == parts[1]
                assert in_store.fullmatch(name) and ("/" in name or name in fixed), path
            else:
                assert parts[-1] in fixed | set(layout.LISTS), path
    assert n_files > 100
