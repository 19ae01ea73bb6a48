"""Mending what `verify` finds, from what is sound: small files from their second copy, crops.beton from its own sound crops and
the originals, shards by declaring them unfinished, so that the next extraction makes them again.

Each function yields a line for each thing it has mended, and none if there was nothing to mend; it works while it is iterated.
Killed anywhere, it can be run again. Nothing is believed unless a checksum on record says so: what cannot be had again to the bit
is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..cache import Cache, View, require_no_part
from ..crops.beton import place_crops, read_checksums, write_beton
from ..errors import BadInputError, CacheCorruptError, UsageError
from ..files.claims import claimed
from ..files.durable import aside_path, inside, make_folder, open_plain, read_npy, write_whole
from ..files.range_claims import claimed_range
from ..files.space import full_disk_explained
from ..format import layout
from ..format.crop_record import CROP_DTYPE
from ..format.layout import CROPS_CLAIM, SPARE, store_claim, store_claims
from ..store.folding import unfold
from ..store.spare import is_current, write_spare
from ..store.store import Store, is_complete
from .advice import when_lost
from .policy import in_threads
from .remake import cut_again
from .small_files import SmallFiles
from .store_check import judge_shards
from .view_check import damaged_crops, has_tables

BLOCK_ROWS = 512
"""Crops that are held in memory while a crops.beton is written again."""


def repair_cache(cache_dir: Path, images_dir: Path | None = None, store: str | None = None) -> Iterator[str]:
    """Mend the lists and views of a cache and, in every view that has it, the store of this name as far as that needs no teacher.

    images_dir: as for `repair_view`.
    """
    yield from repair_lists(cache_dir)
    views = Cache(cache_dir).views_on_disk()
    for view in views:
        yield from repair_view(view, images_dir)
    for view in views:
        if store is not None and view.store_path(store).exists():
            yield from repair_store(view, store)


def repair_lists(cache_dir: Path) -> Iterator[str]:
    """Mend cache.json, the lists beside it and their spare; none of them has to be readable."""
    require_no_part(cache_dir)
    if not any(any(cache_dir.glob(name)) for name in (layout.CACHE_JSON, SPARE, layout.VIEWS)):
        raise UsageError(f"{cache_dir} is no cache: it has neither cache.json, nor {SPARE}, nor a view.")
    with claimed(cache_dir / CROPS_CLAIM, f"The crop stage of {cache_dir}"):
        yield from _restore(cache_dir, "cache")


def repair_view(view: View, images_dir: Path | None) -> Iterator[str]:
    """Mend the small files of a view and its crops.beton. The cache's own lists have to be sound.

    images_dir: the originals, needed for crops that are damaged; those are cut again, and must come out to the bit.
    """
    cache = view.cache
    nothing_lost = "The damaged file is still there; make room and run the same command again."
    crop_stage = claimed(cache.path / CROPS_CLAIM, f"The crop stage of {cache.path}")
    with crop_stage, full_disk_explained(view.path, lambda: nothing_lost):
        yield from _restore(view.path, "view")
        yield from _rebuild_crops(view, images_dir)


def repair_store(view: View, name: str) -> Iterator[str]:
    """Mend the small files of a store, and declare unfinished exactly the shards that verify rejects.

    extract_view then makes these again.
    """
    path = view.store_path(name)
    what = f"The store {path}"
    n_shards_at_most = view.cache.n_images  # how many there are, a damaged manifest cannot say
    with claimed(store_claim(path), what), claimed_range(store_claims(path), 0, n_shards_at_most, what):
        yield from _restore(path, "store")
        if not is_complete(path) and not (path / layout.COMMITS).exists():
            lost = f"{path}: the list of its finished shards (complete.json or commits/), and its copy in {SPARE}, are lost. "
            raise CacheCorruptError(lost + when_lost(path, "store"))
        store = Store.open(path)
        sound, findings = judge_shards(view, store)
        if findings:
            unfold(store, sound)
        for finding in findings:
            yield f"{finding.path}: {finding.message} Its shard will be extracted again."


def _restore(folder: Path, kind: str) -> Iterator[str]:
    """Write the sound copy of each small file of a folder over the other one, in the folder or in its spare."""
    files = SmallFiles(folder, kind)
    if files.lost:
        raise CacheCorruptError(
            f"{folder}: {', '.join(files.lost)}, and its copy in {SPARE}, are lost. {when_lost(folder, kind)}"
        )
    for name, wrong in files.wrong.items():
        if "/" in name:
            inside(folder, name.rpartition("/")[0])  # raises if it leads out
        make_folder((folder / name).parent)
        write_whole(folder / name, files.sound(name))
        yield f"{folder / name}: {wrong} Restored from {SPARE}."
    if not is_current(folder):
        write_spare(folder)
        yield f"{folder / SPARE}: did not hold the small files beside it as they are. Written again."


def _rebuild_crops(view: View, images_dir: Path | None) -> Iterator[str]:
    """Write a damaged crops.beton again. Where each crop lies follows from crops.npy: its own tables are not needed."""
    beton, sums = view.path / layout.CROPS_BETON, read_checksums(view.path)
    if sums["crops_id"] != view.cache.crops_id:
        raise CacheCorruptError(
            f"{view.path} holds crops {sums['crops_id'][:12]}, the cache {view.cache.crops_id[:12]}: it is of another cache. "
            "Put the right folder there."
        )
    crops = read_npy(view.path / layout.CROPS_NPY, CROP_DTYPE, (view.cache.n_images,))
    sizes = crops["bytes"].astype("uint64")
    _, pointers, _ = place_crops(sizes)
    rows, lost = np.arange(len(crops)), np.ones(len(crops), bool)
    if beton.exists():
        lost[:] = False
        lost[damaged_crops(beton, pointers, sizes, crops["crc32c"], rows)] = True
        if not lost.any() and _is_whole(beton, sums[layout.CROPS_BETON]):
            return
    if lost.any() and images_dir is None:
        raise UsageError(
            f"{beton}: {lost.sum()} of its {len(lost)} crops are damaged and have to be cut again from the originals, e.g. row "
            f"{rows[lost][0]}. Give their folder as --images."
        )
    images, cache = view.cache.images(), view.cache
    try:
        data = _salvaged(view, images_dir, images.names, crops, pointers, lost)
        write_beton(beton, crops, images.labels, cache.plan.size, cache.identity.crop_format, data)
    except BaseException:
        aside_path(beton).unlink(missing_ok=True)
        raise
    if not _is_whole(beton, sums[layout.CROPS_BETON]):
        raise CacheCorruptError(f"{beton}: written again from sound crops, it is not the file that checksums.json describes.")
    from_originals = f", {lost.sum()} cut again from {images_dir}" if lost.any() else ""
    yield f"{beton}: was damaged. Written again: {(~lost).sum()} crops as they were in it{from_originals}."


def _is_whole(beton: Path, sums: dict) -> bool:
    """Whether all of a crops.beton that is no crop is as recorded."""
    return beton.stat().st_size == sums["bytes"] and has_tables(beton, sums["tables_sha256"])


def _salvaged(view: View, images_dir: Path | None, names: tuple[str, ...], crops: np.ndarray, pointers: np.ndarray,
              lost: np.ndarray) -> Iterator[bytes]:  # fmt: skip
    """The encoded crops in row order: out of the damaged file, or cut again where they are `lost`."""
    beton = view.path / layout.CROPS_BETON

    def crop(row: int) -> bytes:
        if not lost[row]:
            with open_plain(beton) as file:
                file.seek(int(pointers[row]))
                return file.read(int(crops["bytes"][row]))
        cut = cut_again(view, images_dir, names[row], crops[row])
        if cut.kind != "sound":
            raise BadInputError(
                f"{beton}: the crop of row {row}, {names[row]}, is damaged and cannot be had again: {cut.reason}. Give the "
                "original as it was, on a machine with the Pillow that made the cache."
            )
        return cut.encoded

    for start in range(0, len(crops), BLOCK_ROWS):
        yield from in_threads(crop, range(start, min(start + BLOCK_ROWS, len(crops))))
