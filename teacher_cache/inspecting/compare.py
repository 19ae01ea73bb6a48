"""Two caches side by side: what is equal, what differs. From JSON and shard tables alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..cache import Cache
from ..format.spec import comparable
from ..store.store import Store
from .inspect import describe, ranges

MOST_RANGES = 6
"""Ranges of shards that a line names."""


@dataclass(frozen=True)
class Line:
    """One thing that was compared."""

    kind: str
    """`equal`, `differs`, `unknown`: cannot be told from the records, or `note`: of something that makes no other targets."""
    what: str
    text: str


def compare(first: Cache, second: Cache) -> list[Line]:
    """Everything a student could notice: crops, views, teachers, stores, shards; a line each."""
    return list(_compare(first, second))


def _compare(first: Cache, second: Cache) -> Iterator[Line]:
    a, b = describe(first), describe(second)
    yield from _crops(a, b)
    views_a, views_b = ({view["view"]: view for view in cache["views"]} for cache in (a, b))
    if views_a.keys() == views_b.keys():
        yield Line("equal", "views", ", ".join(map(str, views_a)) or "none")
    else:
        yield _differs("views", ", ".join(map(str, views_a)) or "none", ", ".join(map(str, views_b)) or "none")
    both = sorted(views_a.keys() & views_b.keys())
    for number in both:
        equal = views_a[number]["crops_sha256"] == views_b[number]["crops_sha256"]
        text = "the same crops, byte for byte" if equal else "other crops: cut from other files, or encoded otherwise"
        yield Line("equal" if equal else "differs", f"view {number}", text)

    stores_a, stores_b = (
        {(view["view"], store["name"]): store for view in cache["views"] for store in view["stores"]} for cache in (a, b)
    )
    compared = set()
    for view, name in sorted(stores_a.keys() | stores_b.keys(), key=lambda key: (key[1], key[0])):
        store_a, store_b = stores_a.get((view, name)), stores_b.get((view, name))
        if store_a is None or store_b is None:
            if view in both:
                where = first.path if store_a else second.path
                yield Line("differs", f"{name}, view {view}", f"is only in {where}")
            continue
        if name not in compared:
            compared.add(name)
            yield from _stores(name, store_a, store_b)
        yield from _shards(f"{name}, view {view}", first.view(view).store(name), second.view(view).store(name))


def _crops(a: dict, b: dict) -> Iterator[Line]:
    if a["crops_id"] == b["crops_id"]:
        yield Line("equal", "crops", f"{a['n_images']:,} images in the same order, plan and format ({a['crops_id'][:12]})")
        return
    differing = [_differs(f"crop plan {key}", a["plan"].get(key), b["plan"].get(key)) for key in sorted(a["plan"] | b["plan"])
                 if a["plan"].get(key) != b["plan"].get(key)]  # fmt: skip
    for key, what in (("crop_format", "crop format"), ("n_images", "images"), ("n_classes", "classes")):
        if a[key] != b[key]:
            differing.append(_differs(what, a[key], b[key]))
    if a["n_images"] == b["n_images"] and a["names_sha256"] != b["names_sha256"]:
        differing.append(Line("differs", "images", "as many, with other names or in another order"))
    elif a["n_images"] == b["n_images"] and a["labels_sha256"] != b["labels_sha256"]:
        differing.append(Line("differs", "labels", "the same images with other labels"))
    yield from differing or [Line("differs", "classes", "other names")]


def _stores(name: str, a: dict, b: dict) -> Iterator[Line]:
    """Teacher, what is kept, quantiser: the same in all views of a cache."""
    differing = []
    for what, (of_a, of_b) in (("teacher's ", comparable(a["teacher"], b["teacher"])), ("", (a["store"], b["store"]))):
        for key in of_a:
            if key not in ("weights", "codecs") and of_a[key] != of_b.get(key):
                differing.append(_differs(f"{name}: {what}{key}", of_a[key], of_b.get(key)))
    codecs = [dict(store["store"]["codecs"]) for store in (a, b)]
    for array in sorted(codecs[0].keys() & codecs[1].keys()):
        if codecs[0][array] != codecs[1][array]:
            differing.append(_differs(f"{name}: codec of {array}", codecs[0][array], codecs[1][array]))
    if a["precision"] != b["precision"]:
        differing.append(_differs(f"{name}: precision", a["precision"], b["precision"]))
    if not differing and a["shared_sha256"] != b["shared_sha256"]:
        differing.append(Line("differs", name, "the teacher answered otherwise: other quantiser, final norm or probe"))
    yield from differing or [Line("equal", name, "the same teacher, layers, dtype and quantiser")]
    if a["teacher"]["weights"] != b["teacher"]["weights"] and a["teacher"]["weights_sha256"] == b["teacher"]["weights_sha256"]:
        yield Line("note", name, f"the same weights from {a['teacher']['weights']} and {b['teacher']['weights']}")
    records = [{**store["software"], **(store["made"] or {})} for store in (a, b)]
    for key in sorted(records[0].keys() & records[1].keys()):
        if records[0][key] != records[1][key]:
            yield Line("note", name, f"made with {key} {records[0][key]} and {records[1][key]}")


def _shards(what: str, a: Store, b: Store) -> Iterator[Line]:
    """Which shards are there, and whether they hold the same bytes."""
    if (a.spec.n_rows, a.spec.shard_rows) != (b.spec.n_rows, b.spec.shard_rows):
        return  # a line has it already
    (files_a, there_a), (files_b, there_b) = a.commits, b.commits
    if (there_a != there_b).any():
        counts = f"{there_a.sum():,} and {there_b.sum():,} of {a.spec.n_shards:,} shards are there"
        yield Line("differs", what, f"{counts}; only in one: {_named(there_a != there_b)}")
    if files_a.shape != files_b.shape or a.spec.codecs != b.spec.codecs:
        return  # a line has it already
    if a.sha256 != b.sha256:
        yield Line("unknown", what, "every shard names its store's manifest, and these differ: checksums cannot be compared")
        return
    both = there_a & there_b
    other = both & (files_a != files_b).any(axis=1)
    if other.any():
        yield Line("differs", what, f"{other.sum():,} shards have other bytes: {_named(other)}")
    elif both.any():
        yield Line("equal", what, f"{both.sum():,} shards, byte for byte by their CRC-32")


def _named(shards: np.ndarray) -> str:
    """bool [n_shards] as `3:5, 7:8`."""
    named = [f"{first}:{stop}" for first, stop in ranges(shards)]
    return ", ".join(named[:MOST_RANGES]) + " ..." * (len(named) > MOST_RANGES)


def _differs(what: str, a, b) -> Line:
    def words(value) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return Line("differs", what, f"{words(a)} | {words(b)}")
