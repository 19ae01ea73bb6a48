"""The crop stage: originals in, `crops.beton` of every missing view out. Deterministic and resumable.

Steps: list the images; cut and encode them in parts of 512, each original decoded once for all views; commit each part as it
is done; when all are there, publish each view by rename, then the cache's identity. A part that was committed is not made again,
unless it has bad images that have been mended since.

    CACHE/crops.partial/     job.json                                  what is being made, from which images
        view-000/            000007.bad.json  000007.bin  000007.npy   one part: what is wrong, encoded crops, records
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .beton import CropReader, tables_sha256, write_beton
from .cache import Cache, CropsIdentity, differences, view_path, write_cache
from .claims import claimed
from .crops import CROP_DTYPE, CROP_FORMATS, CropPlan, cut, draw, encode, load_image
from .durable import (
    ASIDE,
    crc32c,
    npy_bytes,
    read_npy,
    read_sealed,
    seal,
    sha256_file,
    sync_folder,
    write_whole,
)
from .errors import BadInputError, CacheCorruptError, MismatchError
from .estimate import full_disk_explained
from .images import ImageList, scan
from .progress import progress

PART_ROWS = 512
WORK = "crops.partial"
CLAIM = "crops.claim"


@dataclass(frozen=True)
class CropJob:
    """What one run of the crop stage has to make."""

    cache_dir: Path
    images_dir: Path
    images: ImageList
    """Candidates in row order; undecodable ones are still among them in a new cache."""
    plan: CropPlan
    crop_format: str
    views: tuple[int, ...]
    """The missing views."""
    n_ignored: int
    """Files of the folder that are no images by name."""

    @property
    def work_dir(self) -> Path:
        return self.cache_dir / WORK

    def describe(self) -> dict:
        """What job.json says: parts on disk serve a later run only if it says the same."""
        return {**CropsIdentity.of(self.images, self.plan, self.crop_format).to_json(), "part_rows": PART_ROWS}

    @property
    def n_parts(self) -> int:
        return -(-len(self.images.names) // PART_ROWS)

    @property
    def n_missing_crops(self) -> int:
        """Crops, over all views, that no committed part holds yet."""
        return sum(len(_part_names(self, part)) * len(self.missing_views(part)) for part in range(self.n_parts))

    def part_path(self, view: int, part: int, suffix: str) -> Path:
        return self.work_dir / f"view-{view:03d}" / f"{part:06d}{suffix}"

    def missing_views(self, part: int) -> list[int]:
        return [view for view in self.views if not self.part_path(view, part, ".npy").exists()]


def plan_job(cache_dir: Path, images_dir: Path | None, plan: CropPlan, crop_format: str, n_views: int) -> CropJob | None:
    """Find out what is missing for views 0 .. n_views-1; None if nothing is.

    Raises MismatchError if the cache, or an unfinished crop stage in it, was begun with other images or another plan;
    BadInputError without a usable image folder when there is work to do.
    """
    cache = Cache(cache_dir) if (cache_dir / "cache.json").exists() else None
    if cache is not None:
        cache.require_same(
            CropsIdentity(plan, crop_format, cache.identity.names_sha256, cache.identity.labels_sha256,
                          cache.identity.classes, cache.n_images)
        )  # fmt: skip
        views = tuple(v for v in range(n_views) if not cache.view(v).is_cropped)
        if not views:
            return None
        for view in views:
            if cache.view(view).path.exists():
                raise CacheCorruptError(
                    f"{cache.view(view).path} has lost its checksums.json. Restore it, or delete that folder."
                )
    else:
        if cache_dir.exists() and not cache_dir.is_dir():
            raise BadInputError(f"{cache_dir} is a file. Give a folder for the cache, new or begun.")
        entries = {entry.name for entry in cache_dir.iterdir()} if cache_dir.exists() else set()
        if entries - {CLAIM} and WORK not in entries:
            raise BadInputError(f"{cache_dir} is neither empty nor a cache. Give another folder.")
        views = tuple(range(n_views))
    if images_dir is None:
        raise BadInputError(f"{cache_dir} lacks view {views[0]}, and making it needs the originals: give --images DIR.")

    images, n_ignored = scan(images_dir)
    images = images.permuted(plan.seed) if cache is None else _same_images(cache, images, images_dir)
    job = CropJob(cache_dir, images_dir, images, plan, crop_format, views, n_ignored)
    _require_begun_alike(job)
    return job


def _same_images(cache: Cache, found: ImageList, images_dir: Path) -> ImageList:
    """The cache's own images, after a check that all of them stand in the folder."""
    images = cache.images()
    missing = set(images.names) - set(found.names)
    if missing:
        raise MismatchError(
            f"{images_dir} lacks {len(missing)} of the {len(images.names)} images of {cache.path}, e.g. {min(missing)}. "
            "Give the folder that the cache was made from."
        )
    return images


def estimate_crop_bytes(job: CropJob, n_samples: int = 16) -> int:
    """Mean bytes of an encoded crop, measured on evenly spaced originals; a guess if none of these can be decoded."""
    if CROP_FORMATS[job.crop_format] is None:
        return job.plan.size**2 * 3
    sizes = []
    for name in job.images.names[:: max(1, len(job.images.names) // n_samples)][:n_samples]:
        try:
            sizes.append(len(_cut_views(job, name, job.views[:1])[0][1]))
        except BadInputError:
            continue  # counted and named when the stage itself meets it
    return round(float(np.mean(sizes))) if sizes else job.plan.size**2


def make_crops(job: CropJob, skip_bad: bool = False, workers: int | None = None) -> Cache:
    """Make the job's views; returns the cache.

    All undecodable images are reported together in one BadInputError; `skip_bad` leaves them out of a new cache instead and
    lists them in its skipped.txt.
    """
    job.cache_dir.mkdir(parents=True, exist_ok=True)
    is_new = not (job.cache_dir / "cache.json").exists()
    kept = "Finished crops are kept; make room and run the same command again."
    with claimed(job.cache_dir / CLAIM, f"The crop stage of {job.cache_dir}"), full_disk_explained(job.cache_dir, lambda: kept):
        _begin(job)
        _take_back_mended(job)
        _cut_all(job, workers or os.cpu_count() or 1)
        bad = _bad_images(job)
        if bad and not (skip_bad and is_new):
            raise BadInputError(
                f"{len(bad)} of {len(job.images.names)} images cannot be decoded:\n  " + "\n  ".join(bad.values()) + "\n" +
                ("Mend them and run the same command again, or leave them out with --skip-bad. Finished crops are kept."
                 if is_new else "A view must hold every image of its cache: restore them and run the same command again.")
            )  # fmt: skip
        _publish(job, bad)
        shutil.rmtree(job.work_dir)
    return Cache(job.cache_dir)


def remove_finished_work(cache_dir: Path) -> None:
    """Remove the work folder of a crop stage that was killed after its last view was published."""
    if _is_finished(cache_dir):
        with claimed(cache_dir / CLAIM, f"The crop stage of {cache_dir}"):
            shutil.rmtree(cache_dir / WORK)


def _is_finished(cache_dir: Path) -> bool:
    """Whether a work folder is there although the cache has every view that was begun in it."""
    views = [view.name for view in (cache_dir / WORK).glob("view-*")]
    is_published = all((cache_dir / view / "checksums.json").exists() for view in views)
    return (cache_dir / WORK).exists() and (cache_dir / "cache.json").exists() and is_published


def _require_begun_alike(job: CropJob) -> None:
    """Raise MismatchError, naming what differs, if an unfinished crop stage stands there that was to make something else."""
    path = job.work_dir / "job.json"
    if not path.exists() or _is_finished(job.cache_dir):
        return
    differing = differences(read_sealed(path), job.describe(), "begun")
    if differing:
        raise MismatchError(
            f"{job.work_dir} was begun with other images or parameters:\n  " + "\n  ".join(differing) +
            "\nContinue with the same ones, or delete that folder to start the crop stage over."
        )  # fmt: skip


def _begin(job: CropJob) -> None:
    """Record what is being made, or check that a stage begun earlier makes the same."""
    _require_begun_alike(job)
    if _is_finished(job.cache_dir):
        shutil.rmtree(job.work_dir)
    job.work_dir.mkdir(exist_ok=True)
    for view in job.views:
        (job.work_dir / f"view-{view:03d}").mkdir(exist_ok=True)
    if not (job.work_dir / "job.json").exists():
        write_whole(job.work_dir / "job.json", seal(job.describe()))


def _take_back_mended(job: CropJob) -> None:
    """Declare unfinished every committed part one of whose bad images can be decoded by now."""
    for part in range(job.n_parts):
        for view in job.views:
            records = job.part_path(view, part, ".npy")
            if records.exists():
                bad = read_sealed(job.part_path(view, part, ".bad.json"))
                if any(not isinstance(_try_cut(job, name, [view]), str) for name in bad):
                    records.unlink()


def _cut_views(job: CropJob, name: str, views) -> list[tuple[np.void, bytes]]:
    """Decode one original and return, per view, its record and its encoded crop."""
    try:
        data = (job.images_dir / name).read_bytes()
    except OSError as error:
        raise BadInputError(f"{name}: {error.strerror}") from error
    image = load_image(data, name)
    results = []
    for view in views:
        crop = draw(job.plan, name, view, image.height, image.width)
        try:
            encoded = encode(cut(job.plan, image, crop), job.crop_format)
        except BadInputError as error:
            raise BadInputError(f"{name}: {error}") from error
        record = np.zeros((), CROP_DTYPE)
        record["image_height"], record["image_width"] = image.height, image.width
        for field in ("top", "left", "height", "width", "flip", "jitter", "jitter_order"):
            record[field] = getattr(crop, field)
        record["bytes"], record["crc32c"] = len(encoded), crc32c(encoded)
        record["source_bytes"], record["source_crc32c"] = len(data), crc32c(data)
        results.append((record, encoded))
    return results


def _cut_all(job: CropJob, workers: int) -> None:
    """Cut and commit every part that is not there yet. Pillow works without the GIL, so threads are enough."""
    parts = [(part, job.missing_views(part)) for part in range(job.n_parts)]
    n_done = sum(len(_part_names(job, part)) for part, views in parts if not views)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="crop")
    try:
        with progress("cropping", len(job.images.names), "images", n_done) as advance:
            for part, views in parts:
                if views:
                    names = _part_names(job, part)
                    _commit_part(job, part, views, list(pool.map(lambda name, views=views: _try_cut(job, name, views), names)))
                    advance(len(names))
    finally:
        pool.shutdown(cancel_futures=True)


def _part_names(job: CropJob, part: int) -> tuple[str, ...]:
    return job.images.names[part * PART_ROWS : (part + 1) * PART_ROWS]


def _try_cut(job: CropJob, name: str, views: list[int]) -> list[tuple[np.void, bytes]] | str:
    try:
        return _cut_views(job, name, views)
    except BadInputError as error:
        return str(error)


def _commit_part(job: CropJob, part: int, views: list[int], results: list) -> None:
    """Write one part of every missing view: bad.json, then crops, then the records, which say that it is done."""
    names = _part_names(job, part)
    bad = {name: reason for name, reason in zip(names, results, strict=True) if isinstance(reason, str)}
    for index, view in enumerate(views):
        records = np.zeros(len(results), CROP_DTYPE)
        encoded = []
        for i, result in enumerate(results):
            if not isinstance(result, str):
                records[i], crop = result[index]
                encoded.append(crop)
        write_whole(job.part_path(view, part, ".bad.json"), seal(bad))
        write_whole(job.part_path(view, part, ".bin"), b"".join(encoded))
        write_whole(job.part_path(view, part, ".npy"), npy_bytes(records))


def _bad_images(job: CropJob) -> dict[str, str]:
    """Name -> `name: reason` of every candidate that could not be decoded, in row order."""
    bad = {}
    for part in range(job.n_parts):
        of_part = {}
        for view in job.views:
            of_part |= read_sealed(job.part_path(view, part, ".bad.json"))
        bad |= {name: of_part[name] for name in _part_names(job, part) if name in of_part}
    return bad


def _publish(job: CropJob, bad: dict[str, str]) -> None:
    """Turn the committed parts into a cache: each view whole by rename, then the identity, which says that it is one."""
    ok = np.array([name not in bad for name in job.images.names])
    if not ok.any():
        raise BadInputError(f"None of the {len(ok)} images of {job.images_dir} can be decoded, e.g. {next(iter(bad.values()))}.")
    names = tuple(name for name in job.images.names if name not in bad)
    kept = ImageList(names, job.images.labels[ok], job.images.classes)
    crops_id = CropsIdentity.of(kept, job.plan, job.crop_format).crops_id
    for view in job.views:
        _publish_view(job, view, ok, kept.labels, crops_id)
    if not (job.cache_dir / "cache.json").exists():
        write_cache(job.cache_dir, kept, job.plan, job.crop_format, list(bad.values()))


def _publish_view(job: CropJob, view: int, ok: np.ndarray, labels: np.ndarray, crops_id: str) -> None:
    """Write crops.npy, crops.beton and checksums.json into a folder aside, then rename it into place."""
    path = view_path(job.cache_dir, view)
    if path.exists():  # an interrupted run came this far; with other bad images than now, its crops are others
        if read_sealed(path / "checksums.json")["crops_id"] == crops_id:
            return
        shutil.rmtree(path)
    crops = np.concatenate([_records(job, view, part) for part in range(job.n_parts)])[ok]
    aside = path.with_name(path.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write_whole(aside / "crops.npy", npy_bytes(crops))
    write_beton(aside / "crops.beton", crops, labels, job.plan.size, job.crop_format, _encoded(job, view, ok))
    files = {"crops.npy": sha256_file(aside / "crops.npy")}
    beton = {"bytes": (aside / "crops.beton").stat().st_size, "tables_sha256": tables_sha256(aside / "crops.beton")}
    checksums = {"crops_id": crops_id, "files": files, "crops.beton": beton}
    write_whole(aside / "checksums.json", seal(checksums))
    write_whole(aside / "checksums.json", seal({**checksums, "decoded": CropReader(aside).decoded()}))
    os.rename(aside, path)
    sync_folder(path.parent)


def _records(job: CropJob, view: int, part: int) -> np.ndarray:
    return read_npy(job.part_path(view, part, ".npy"), CROP_DTYPE)


def _encoded(job: CropJob, view: int, ok: np.ndarray) -> Iterator[bytes]:
    """The encoded crops of a view in row order, each checked against its record; rows that are not `ok` are left out."""
    for part in range(job.n_parts):
        data, position = job.part_path(view, part, ".bin").read_bytes(), 0
        for keep, record in zip(ok[part * PART_ROWS :], _records(job, view, part), strict=False):
            encoded = data[position : position + int(record["bytes"])]
            position += len(encoded)
            if crc32c(encoded) != record["crc32c"]:
                raise CacheCorruptError(
                    f"{job.part_path(view, part, '.bin')} was damaged. Delete it with its .npy and run the command again."
                )
            if keep:
                yield encoded
