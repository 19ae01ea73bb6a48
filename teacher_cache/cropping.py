"""The crop stage: originals in, `crops.beton` of every missing view out. Deterministic and resumable.

Steps: list the images; cut and encode them in parts of 512, each original decoded once for all views; commit each part as it
is done; when all are there, publish the cache's identity, then each view, by rename. A part that was committed is not made again.

    CACHE/crops.partial/     job.json  candidates.txt  labels.npy      what is being made, from which images
        view-000/            000007.bin  000007.npy                    encoded crops of one part, then its records
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .beton import tables_sha256, write_beton
from .cache import Cache, CropsIdentity, View, write_cache
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
from .images import ImageList, scan
from .progress import progress

PART_ROWS = 512
_PART_DTYPE = np.dtype([("ok", "u1"), *((name, *CROP_DTYPE.fields[name][:1]) for name in CROP_DTYPE.names)])


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
        return self.cache_dir / "crops.partial"

    @property
    def n_parts(self) -> int:
        return -(-len(self.images.names) // PART_ROWS)

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
    else:
        if cache_dir.exists() and not cache_dir.is_dir():
            raise BadInputError(f"{cache_dir} is a file. Give a folder for the cache, new or begun.")
        if cache_dir.exists() and any(entry.name != "crops.partial" for entry in cache_dir.iterdir()):
            raise BadInputError(f"{cache_dir} is neither empty nor a cache. Give another folder.")
        views = tuple(range(n_views))
    if images_dir is None:
        raise BadInputError(f"{cache_dir} lacks view {views[0]}, and making it needs the originals: give --images DIR.")

    images, n_ignored = scan(images_dir)
    if cache is not None:
        return CropJob(cache_dir, images_dir, _same_images(cache, images, images_dir), plan, crop_format, views, n_ignored)
    return CropJob(cache_dir, images_dir, images.permuted(plan.seed), plan, crop_format, views, n_ignored)


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
    """Mean bytes of an encoded crop, measured on evenly spaced originals (a median of nothing decodable is an error)."""
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
    job.work_dir.mkdir(parents=True, exist_ok=True)
    with claimed(job.work_dir / "claim", f"The crop stage of {job.cache_dir}"):
        _begin(job)
        _cut_all(job, workers or os.cpu_count() or 1)
        bad = _bad_images(job)
        if bad and (not skip_bad or (job.cache_dir / "cache.json").exists()):
            advice = (
                "A view must hold every image of its cache: restore them."
                if (job.cache_dir / "cache.json").exists()
                else "Mend or remove them, or leave them out with --skip-bad. Finished crops are kept."
            )
            raise BadInputError(
                f"{len(bad)} of {len(job.images.names)} images cannot be decoded:\n  " + "\n  ".join(bad) + f"\n{advice}"
            )
        _publish(job, bad)
    shutil.rmtree(job.work_dir)
    return Cache(job.cache_dir)


def _begin(job: CropJob) -> None:
    """Record what is being made, or check that a stage begun earlier makes the same."""
    identity = CropsIdentity.of(job.images, job.plan, job.crop_format)
    path = job.work_dir / "job.json"
    if not path.exists():
        write_whole(path, seal(identity.to_json()))
        return
    begun = read_sealed(path)
    if begun != identity.to_json():
        differing = sorted(key for key in begun if begun[key] != identity.to_json().get(key))
        raise MismatchError(
            f"{job.work_dir} was begun with another {', '.join(differing)}. Continue with the same images and parameters, or "
            "delete that folder to start the crop stage over."
        )


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
        encoded = encode(cut(job.plan, image, crop), job.crop_format)
        record = np.zeros((), _PART_DTYPE)
        record["ok"] = 1
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
    for view in job.views:
        (job.work_dir / f"view-{view:03d}").mkdir(exist_ok=True)
    n_done = sum(_part_names(job, part)[1] for part, views in parts if not views)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="crop")
    try:
        with progress("cropping", len(job.images.names), "images", n_done) as advance:
            for part, views in parts:
                if views:
                    names, n_names = _part_names(job, part)
                    _commit_part(job, part, views, list(pool.map(lambda name, views=views: _try_cut(job, name, views), names)))
                    advance(n_names)
    finally:
        pool.shutdown(cancel_futures=True)


def _part_names(job: CropJob, part: int) -> tuple[tuple[str, ...], int]:
    names = job.images.names[part * PART_ROWS : (part + 1) * PART_ROWS]
    return names, len(names)


def _try_cut(job: CropJob, name: str, views: list[int]) -> list[tuple[np.void, bytes]] | str:
    try:
        return _cut_views(job, name, views)
    except BadInputError as error:
        return str(error)


def _commit_part(job: CropJob, part: int, views: list[int], results: list) -> None:
    """Write one part of every missing view: bad.json, then crops, then the records, which say that it is done."""
    bad = {str(i): reason for i, reason in enumerate(results) if isinstance(reason, str)}
    for index, view in enumerate(views):
        records = np.zeros(len(results), _PART_DTYPE)
        encoded = []
        for i, result in enumerate(results):
            if not isinstance(result, str):
                records[i], crop = result[index]
                encoded.append(crop)
        write_whole(job.part_path(view, part, ".bad.json"), seal(bad))
        write_whole(job.part_path(view, part, ".bin"), b"".join(encoded))
        write_whole(job.part_path(view, part, ".npy"), npy_bytes(records))


def _bad_images(job: CropJob) -> list[str]:
    """`name: reason` of every candidate that could not be decoded."""
    parts = (read_sealed(job.part_path(job.views[0], part, ".bad.json")) for part in range(job.n_parts))
    return [reason for bad in parts for reason in bad.values()]


def _publish(job: CropJob, bad: list[str]) -> None:
    """Turn the committed parts into a cache: identity first, then each view whole by rename."""
    records = {view: np.concatenate([_records(job, view, part) for part in range(job.n_parts)]) for view in job.views}
    ok = records[job.views[0]]["ok"] == 1
    if not ok.any():
        raise BadInputError(f"None of the {len(ok)} images of {job.images_dir} can be decoded, e.g. {bad[0]}.")
    if not (job.cache_dir / "cache.json").exists():
        names = tuple(name for name, keep in zip(job.images.names, ok, strict=True) if keep)
        kept = ImageList(names, job.images.labels[ok], job.images.classes)
        write_cache(job.cache_dir, kept, job.plan, job.crop_format, bad)
    cache = Cache(job.cache_dir)
    for number in job.views:
        view = cache.view(number)
        if not view.is_cropped:
            _publish_view(job, view, records[number][ok], cache.images().labels)


def _publish_view(job: CropJob, view: View, records: np.ndarray, labels: np.ndarray) -> None:
    """Write crops.npy, crops.beton and checksums.json into a folder aside, then rename it into place."""
    crops = np.zeros(len(records), CROP_DTYPE)
    for name in CROP_DTYPE.names:
        crops[name] = records[name]
    aside = view.path.with_name(view.path.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write_whole(aside / "crops.npy", npy_bytes(crops))
    write_beton(aside / "crops.beton", crops, labels, job.plan.size, job.crop_format, _encoded(job, view.number))
    files = {"crops.npy": sha256_file(aside / "crops.npy")}
    beton = {"bytes": (aside / "crops.beton").stat().st_size, "tables_sha256": tables_sha256(aside / "crops.beton")}
    write_whole(aside / "checksums.json", seal({"crops_id": view.cache.crops_id, "files": files, "crops.beton": beton}))
    os.rename(aside, view.path)
    sync_folder(view.path.parent)


def _records(job: CropJob, view: int, part: int) -> np.ndarray:
    return read_npy(job.part_path(view, part, ".npy"), _PART_DTYPE)


def _encoded(job: CropJob, view: int) -> Iterator[bytes]:
    """The encoded crops of a view in row order, each checked against its record."""
    for part in range(job.n_parts):
        data, position = job.part_path(view, part, ".bin").read_bytes(), 0
        for record in _records(job, view, part):
            if record["ok"]:
                encoded = data[position : position + int(record["bytes"])]
                position += len(encoded)
                if crc32c(encoded) != record["crc32c"]:
                    raise CacheCorruptError(
                        f"{job.part_path(view, part, '.bin')} was damaged. Delete it with its .npy and run the command again."
                    )
                yield encoded
