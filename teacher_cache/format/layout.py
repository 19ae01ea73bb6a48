"""Every file and folder of a cache by its name, and where it lies: the drawings of docs/format.md as code.

CACHE/
  cache.json  images.txt  labels.npy  skipped.txt  spare.tar
  crops.claim                   held by the crop stage, and by repairs of lists and crops
  crops.partial/                an unfinished crop stage: job.json, bad.txt, view-000/000007.bin, .npy, .json
  view-000/
    checksums.json  crops.npy  crops.beton  spare.tar
    clip-b16.zarr.claim         held by who begins, completes or repairs the store
    clip-b16.zarr.claims/       held by those who make its shards; 000123.TOKEN.failed says why one was not made
    clip-b16.zarr/
      store.json  zarr.json  spare.tar
      commits/000123.json       while shards are missing; then shards.npy and complete.json
      tokens/08  scale  attention  index                           row arrays (StoreSpec.array_names): zarr.json, shards c.123.0.0
      quant/08/centre, spread   head/gamma, beta, projection   probe   small arrays: zarr.json and one chunk

What is not whole yet ends in `.partial` (durable.ASIDE); a zarr group has a zarr.json too.
"""

from __future__ import annotations

import re
from pathlib import Path

SPARE = "spare.tar"
"""In a cache, in each view, in each store."""

# --- of a cache

CACHE_JSON = "cache.json"
IMAGES_TXT, LABELS_NPY, SKIPPED_TXT = LISTS = ["images.txt", "labels.npy", "skipped.txt"]
"""The small files of a cache that cache.json vouches for."""
CROPS_CLAIM = "crops.claim"
VIEWS = "view-*"
"""Pattern of the views of a cache."""

# --- of an unfinished crop stage

WORK = "crops.partial"
JOB_JSON, BAD_TXT = "job.json", "bad.txt"

# --- of a view

CHECKSUMS_JSON = "checksums.json"
CROPS_NPY = "crops.npy"
CROPS_BETON = "crops.beton"
STORE_SUFFIX = ".zarr"
STORES = f"*{STORE_SUFFIX}"
"""Pattern of the stores of a view."""
CLAIM_SUFFIX, CLAIMS_SUFFIX = ".claim", ".claims"
CLAIMS, RANGE_CLAIMS = f"*{CLAIM_SUFFIX}", f"*{CLAIMS_SUFFIX}"
"""Patterns of what a store is claimed by."""
FAILED_SUFFIX = ".failed"
FAILURES = f"*{FAILED_SUFFIX}"
"""Pattern, beside the claims of a store's shards, of what went wrong with one of them."""

# --- of a store

STORE_JSON = "store.json"
ZARR_JSON = "zarr.json"
COMPLETE_JSON = "complete.json"
SHARDS_NPY = "shards.npy"
COMMITS = "commits"
RECORDS = "*.json"
"""Pattern of the commit records in COMMITS."""
FP32_SUFFIX = ".fp32"
"""Ends the name of a file in COMMITS that keeps what an undone record said of rows made in fp32."""
PROBE = "probe"
QUANT, HEAD = "quant", "head"
"""Folders of small arrays."""
STATISTICS = ("centre", "spread")
"""The small arrays of each layer that is not float16."""
TRANSFORM = ("mean", "basis", "bits")
"""Those of each layer that is coded by a transform, too."""
LEVELS, SCALES = "quant/levels", "quant/scales"
"""Those that all layers of a transform share."""


def view_path(cache: Path, number: int) -> Path:
    """The folder of a view, there or not; of an unfinished crop stage if `cache` is its work folder."""
    return cache / f"view-{number:03d}"


def view_number(name: str) -> int | None:
    """The number of the view whose folder has this name; None if no view's has."""
    digits = name.removeprefix("view-")
    return int(digits) if digits != name and digits.isascii() and digits.isdecimal() else None


def part_path(work: Path, view: int, part: int, suffix: str) -> Path:
    """A file of an unfinished crop stage: `.bin` the crops of a part, `.npy` their records, `.json` the commit."""
    return view_path(work, view) / f"{part:06d}{suffix}"


def store_file_name(name: str) -> str:
    """A teacher's name as the name of its store: `timm:vit` -> `timm_vit`."""
    return name.replace(":", "_").replace("/", "_")


def store_folder(name: str) -> str:
    """The name of the folder of the store `name`."""
    return f"{name}{STORE_SUFFIX}"


def store_name(folder: str) -> str:
    """The other way round: `clip-b16.zarr` -> `clip-b16`."""
    return folder.removesuffix(STORE_SUFFIX)


def stores_named(cache: Path, name: str) -> list[Path]:
    """The folders of the stores `name` of a cache, by view."""
    return sorted(cache.glob(f"{VIEWS}/{store_folder(name)}"))


_OF_STORE = re.compile(r"(.+?\.zarr)(\.claims?)?((\.[0-9a-f]{16})?\.partial)?")


def owning_store(entry: str) -> str | None:
    """The folder's name of the store that an entry of a view belongs to: its own, its claims', what is aside of them."""
    match = _OF_STORE.fullmatch(entry)
    return match[1] if match else None


def store_claim(store: Path) -> Path:
    """The claim of whoever begins, completes or repairs a store."""
    return store.with_name(f"{store.name}{CLAIM_SUFFIX}")


def store_claims(store: Path) -> Path:
    """The claims of those who make its shards."""
    return store.with_name(f"{store.name}{CLAIMS_SUFFIX}")


def record_path(store: Path, shard: int) -> Path:
    """The commit record of a shard."""
    return store / COMMITS / f"{shard:06d}.json"


def shard_file(store: Path, array: str, shard: int, n_dims: int) -> Path:
    """A shard of a zarr v3 array with `.` between the chunk indices: tokens/08/c.123.0.0"""
    return store / array / ".".join(["c", str(shard), *["0"] * (n_dims - 1)])


def is_shard_file(name: str) -> bool:
    """Whether a file of a row array is a shard, or one that is being written."""
    return name.startswith("c.")


def statistics_name(layer: int, which: str) -> str:
    """A small array of a layer; which: one of STATISTICS or TRANSFORM."""
    return f"{QUANT}/{layer:02d}/{which}"


def head_name(which: str) -> str:
    """The small array of a part of the head: gamma, beta, projection."""
    return f"{HEAD}/{which}"


def only_chunk(array: str, n_dims: int) -> str:
    """The one chunk of a small array."""
    return f"{array}/" + ".".join(["c", *["0"] * n_dims])
