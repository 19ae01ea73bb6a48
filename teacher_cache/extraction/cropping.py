"""The crop stage: originals in, `crops.beton` of every missing view out. Deterministic and resumable.

Steps: list the images; cut and encode them in parts (parts.py), each original decoded once for all views; commit each part as it
is done; when all are there, publish each view by rename, then the cache's identity. A part that was committed is not made again,
unless it has bad images that have been mended since. A view that is added later is cut from the very files that the others were.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..cache import Cache, CropsIdentity, View, write_cache
from ..crops.beton import CropReader, tables_sha256, write_beton
from ..crops.cutting import cut, draw, encode, load_image
from ..crops.images import ImageList, Scanned, lies_in_left_out, read_image, scan
from ..errors import BadInputError, CacheCorruptError, MismatchError, UsageError
from ..files.claims import ClaimHeldError, claimed, is_claimed_or_left, is_name_of
from ..files.durable import (
    clear_aside,
    crc32c,
    make_folder,
    npy_bytes,
    publish,
    read_sealed,
    remove_folder,
    seal,
    sha256_file,
    write_whole,
)
from ..files.space import full_disk_explained
from ..format import layout
from ..format.crop_plan import CROP_FORMATS, CropPlan
from ..format.crop_record import CROP_DTYPE
from ..format.layout import CROPS_CLAIM, SPARE, WORK, view_path
from ..store.spare import write_spare
from ..terminal.progress import progress
from ..words import human
from .parts import WorkFolder, is_left_over

CHANGED = "is not the file that this cache was cut from"
SHOWN = 50
"""Bad images that an error names; the rest stand in bad.txt."""


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
    ignored: tuple[str, ...]
    """Files of the folder that are no images by name."""
    left_out: tuple[str, ...]
    """Its hidden files and folders, and those of systems: images.Scanned."""
    new: tuple[str, ...]
    """Images of the folder that the cache was made without."""
    finished: View | None
    """A view that is there, of a cache that exists."""

    @property
    def is_new(self) -> bool:
        return self.finished is None

    @property
    def identity(self) -> CropsIdentity:
        return CropsIdentity.of(self.images, self.plan, self.crop_format)

    @cached_property
    def work(self) -> WorkFolder:
        return WorkFolder(self.cache_dir, self.images.names, self.views, self.plan.size)

    @cached_property
    def sources(self) -> np.ndarray | None:
        """CROP_DTYPE [n_images] of the view that is there: length and CRC-32C of every original."""
        if self.finished is None:
            return None
        if sha256_file(self.finished.path / layout.CROPS_NPY) != self.finished.crops_sha256:
            raise CacheCorruptError(f"{self.finished.path / layout.CROPS_NPY} is damaged. Run the same command with --repair.")
        return self.finished.crops()


def plan_job(cache_dir: Path, images_dir: Path | None, plan: CropPlan, crop_format: str, n_views: int) -> CropJob | None:
    """Find out what is missing for views 0 .. n_views-1; None if nothing is.

    Raises MismatchError if the cache, or an unfinished crop stage in it, was begun with other images or another plan;
    UsageError without an image folder when there is work to do, and for a folder that is no place for a cache.
    """
    cache = Cache(cache_dir) if (cache_dir / layout.CACHE_JSON).exists() else None
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
                    f"{cache.view(view).path} has lost its checksums.json. Run the same command with --repair, which restores it "
                    "from spare.tar, or delete that folder to make it again."
                )
    else:
        if cache_dir.exists() and not cache_dir.is_dir():
            raise UsageError(f"{cache_dir} is a file. Give a folder for the cache, new or begun.")
        entries = {entry.name for entry in cache_dir.iterdir()} if cache_dir.exists() else set()
        if SPARE in entries and WORK not in entries:
            Cache(cache_dir)  # raises, because it has lost its cache.json
        if any(not is_name_of(entry, CROPS_CLAIM) for entry in entries) and WORK not in entries:
            raise UsageError(f"{cache_dir} is neither empty nor a cache. Give another folder.")
        views = tuple(range(n_views))
    if images_dir is None:
        raise UsageError(f"{cache_dir} lacks view {views[0]}, and making it needs the originals: give --images DIR.")

    finished = next(iter(cache.views()), None) if cache else None

    def job_of(found: Scanned) -> CropJob:
        images = found.images.permuted(plan.seed) if cache is None else _same_images(cache, found.images, images_dir)
        new = tuple(new_images(cache, found.images)) if cache else ()
        ignored, left_out = tuple(found.ignored), tuple(found.left_out)
        return CropJob(cache_dir, images_dir, images, plan, crop_format, views, ignored, left_out, new, finished)

    found = scan(images_dir)
    job = job_of(found)
    try:
        job.work.require_begun_alike(job.identity)
    except MismatchError:
        if cache is not None or not found.left_out:
            raise
        with suppress(UsageError, BadInputError):  # the stage may have been begun when nothing was left out
            job = job_of(scan(images_dir, everything=True))
            job.work.require_begun_alike(job.identity)
            return job
        raise
    return job


def _same_images(cache: Cache, found: ImageList, images_dir: Path) -> ImageList:
    """The cache's own images, after a check that all of them stand in the folder; those, too, that would be left out today."""
    images = cache.images()
    missing = set(images.names) - set(found.names)
    missing = {name for name in missing if not (lies_in_left_out(name) and os.path.lexists(images_dir / name))}
    if missing:
        raise MismatchError(
            f"{images_dir} lacks {len(missing)} of the {len(images.names)} images of {cache.path}, e.g. {min(missing)}. "
            "Give the folder that the cache was made from."
        )
    return images


def new_images(cache: Cache, found: ImageList) -> list[str]:
    """Images of a folder that a cache was made without, but for those that it names in skipped.txt."""
    skipped = (cache.path / layout.SKIPPED_TXT).read_text(errors="replace").splitlines()
    new = sorted(set(found.names) - set(cache.images().names))
    return [name for name in new if not any(line.startswith(f"{name}: ") for line in skipped)]


def estimate_crop_bytes(job: CropJob, n_samples: int = 16) -> int:
    """Mean bytes of an encoded crop, measured on evenly spaced originals; a guess if none of these can be decoded."""
    if CROP_FORMATS[job.crop_format] is None:
        return job.plan.size**2 * 3
    sizes = sample_crop_bytes(job.images_dir, job.images.names, job.plan, job.crop_format, n_samples, job.views[0])
    return round(float(np.mean(sizes))) if sizes else job.plan.size**2


def sample_crop_bytes(
    images_dir: Path, names: Sequence[str], plan: CropPlan, crop_format: str, n_samples: int, view: int = 0
) -> list[int]:
    """Bytes of the encoded crops of evenly spaced originals; those that cannot be decoded are left out."""
    sizes = []
    for name in names[:: max(1, len(names) // n_samples)][:n_samples]:
        try:
            sizes.append(len(cut_image(images_dir, name, plan, crop_format, view)[1]))
        except BadInputError:
            continue  # counted and named when the stage itself meets it
    return sizes


def bytes_to_write(job: CropJob, crop_bytes: int) -> int:
    """What the job takes on disk from now on: the parts and, at the end, the files they are joined into."""
    n_unpublished = sum(not view_path(job.cache_dir, view).exists() for view in job.views)
    return crop_bytes * (job.work.n_missing_crops + n_unpublished * len(job.images.names))


def make_crops(job: CropJob, skip_bad: bool = False, workers: int | None = None,
               wait: Callable[[str], None] | None = None, cut_all: Callable[[CropJob], None] | None = None) -> Cache:  # fmt: skip
    """Make the job's views; returns the cache.

    cut_all: has every part cut and committed that is missing, while this process holds the claim. [default: `workers` threads]

    All images that cannot be decoded, or have changed since the cache was made, are reported together in one BadInputError;
    `skip_bad` leaves them out of a new cache instead and lists them in its skipped.txt. wait: told whom one waits for while
    another process makes them, which leaves nothing to do; None: that is an error.
    """
    from ..kernels import decoder  # noqa: F401 - it decodes every finished view once: where it is missing nothing is begun

    make_folder(job.cache_dir)
    with full_disk_explained(job.cache_dir, lambda: _kept(job)), _claimed(job.cache_dir, wait):
        if wait is not None and _has_views(job):
            return Cache(job.cache_dir)
        job.work.begin(job.identity)
        _take_back_mended(job)
        (cut_all or partial(_cut_all, workers=workers or os.cpu_count() or 1))(job)
        bad = job.work.bad()
        if bad and not (skip_bad and job.is_new):
            raise BadInputError(_complaint(job, bad))
        _publish(job, bad)
        job.work.remove()
    return Cache(job.cache_dir)


def remove_left_over(cache_dir: Path) -> None:
    """Remove the claim and the work folder of a crop stage that was killed after its last view was published."""
    if is_left_over(cache_dir) or is_claimed_or_left(cache_dir / CROPS_CLAIM):
        with suppress(ClaimHeldError), _claimed(cache_dir):  # a stage that is at work clears up itself
            if is_left_over(cache_dir):
                remove_folder(cache_dir / WORK)


def _has_views(job: CropJob) -> bool:
    """Whether another process has finished what the job was to make."""
    has_cache = (job.cache_dir / layout.CACHE_JSON).exists()
    return has_cache and all(Cache(job.cache_dir).view(view).is_cropped for view in job.views)


def _claimed(cache_dir: Path, wait: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
    return claimed(cache_dir / CROPS_CLAIM, f"The crop stage of {cache_dir}", wait)


def _kept(job: CropJob) -> str:
    """What a full disk leaves of the stage."""
    to_write = human(bytes_to_write(job, estimate_crop_bytes(job)))
    return f"Finished crops are kept; about {to_write} are still to be written. Make room and run the same command again."


def _complaint(job: CropJob, bad: dict[str, str]) -> str:
    reasons = list(bad.values())
    n_changed = sum(reason.endswith(CHANGED) for reason in reasons)
    counts = [f"{n_changed} have changed since this cache was made"] * (n_changed > 0)
    counts += [f"{len(bad) - n_changed} cannot be decoded"] * (len(bad) > n_changed)
    if len(reasons) > SHOWN:
        reasons = [*reasons[:SHOWN], f"... and {len(bad) - SHOWN:,} more, all of them in {job.work.list_bad(bad)}"]
    what_now = "Mend them and run the same command again, or leave them out with --skip-bad."
    if not job.is_new:
        what_now = "A view must hold every image of its cache, unchanged: restore them and run the same command again."
    elif n_changed:
        what_now += f" To take the images as they are now, delete {job.work.path} first."
    return (
        f"Of {len(job.images.names):,} images {' and '.join(counts)}:\n  " + "\n  ".join(reasons) +
        f"\n{what_now} Finished crops are kept."
    )  # fmt: skip


# --- cutting ---------------------------------------------------------------------------------------------------------


def cut_image(images_dir: Path, name: str, plan: CropPlan, crop_format: str, view: int) -> tuple[np.void, bytes]:
    """Read one original and cut its crop of one view: its record (CROP_DTYPE) and its encoded bytes.

    Raises BadInputError with the name and the reason if it cannot be read or decoded.
    """
    return _cut_views(images_dir, name, plan, crop_format, [view])[0]


def _cut_views(images_dir: Path, name: str, plan: CropPlan, crop_format: str, views) -> list[tuple[np.void, bytes]]:
    """`cut_image` for several views, decoding once."""
    data = read_image(images_dir, name)
    image = load_image(data, name)
    results = []
    for view in views:
        crop = draw(plan, name, view, image.height, image.width)
        try:
            encoded = encode(cut(plan, image, crop), crop_format)
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


def _try_cut(job: CropJob, views: list[int], name: str, known: np.void | None) -> list[tuple[np.void, bytes]] | str:
    """Record and crop of every view, or why the image cannot be used. known: its record in a view that has been cut before."""
    try:
        cut_now = _cut_views(job.images_dir, name, job.plan, job.crop_format, views)
    except BadInputError as error:
        return str(error)
    source = ["source_bytes", "source_crc32c"]
    if known is not None and known["source_bytes"] and known[source] != cut_now[0][0][source]:
        return f"{name}: {CHANGED}"
    return cut_now


def _known(job: CropJob, part: int) -> Sequence[np.void | None]:
    """For each image of a part its record in a view that has been cut before, if there is one."""
    if job.sources is not None:
        return job.sources[job.work.rows_of(part)]
    cut_before = job.work.finished_views(part)
    return job.work.records_of(part, cut_before[0]) if cut_before else [None] * len(job.images.names[job.work.rows_of(part)])


def _take_back_mended(job: CropJob) -> None:
    """Declare unfinished every committed part one of whose bad images can be used by now."""
    for part in range(job.work.n_parts):
        for view in job.work.finished_views(part):
            bad = job.work.bad_of(part, view)
            if bad:
                known = dict(zip(job.images.names[job.work.rows_of(part)], _known(job, part), strict=True))
                if any(not isinstance(_try_cut(job, [view], name, known[name]), str) for name in bad):
                    job.work.take_back(part, view)


def cut_part(job: CropJob, part: int, views: list[int]) -> None:
    """Cut and commit a part of these views. Made twice it is the same, whoever makes it. NoSpaceError on a full disk."""
    with full_disk_explained(job.cache_dir, lambda: _kept(job)):
        job.work.commit(part, views, _cut_part(job, part, views, map))


def _cut_part(job: CropJob, part: int, views: list[int], each: Callable) -> list[list[tuple[np.void, bytes]] | str]:
    return list(each(partial(_try_cut, job, views), job.images.names[job.work.rows_of(part)], _known(job, part)))


def _cut_all(job: CropJob, workers: int) -> None:
    """Cut and commit every part that is not there yet. Pillow works without the GIL, so threads are enough."""
    parts = [(part, job.images.names[job.work.rows_of(part)], job.work.missing_views(part)) for part in range(job.work.n_parts)]
    n_done = sum(len(names) for _, names, views in parts if not views)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="crop")
    try:
        with progress("cropping", len(job.images.names), "images", n_done) as advance:
            for part, names, views in parts:
                if views:
                    with advance.waits_for("decode"):
                        results = _cut_part(job, part, views, pool.map)
                    with advance.waits_for("disk"):
                        job.work.commit(part, views, results)
                    advance(len(names))
    finally:
        pool.shutdown(cancel_futures=True)


# --- publishing ------------------------------------------------------------------------------------------------------


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
    if not (job.cache_dir / layout.CACHE_JSON).exists():
        write_cache(job.cache_dir, kept, job.plan, job.crop_format, list(bad.values()))


def _publish_view(job: CropJob, view: int, ok: np.ndarray, labels: np.ndarray, crops_id: str) -> None:
    """Write the files of a view into a folder aside, then rename it into place."""
    path = view_path(job.cache_dir, view)
    aside = clear_aside(path)
    if path.exists():  # an interrupted run came this far; with other bad images than now, its crops are others
        if read_sealed(path / layout.CHECKSUMS_JSON)["crops_id"] == crops_id:
            return
        publish(path, aside)  # half removed it must not be taken for a view
        shutil.rmtree(aside)
    aside.mkdir()
    crops = job.work.records(view)[ok]
    write_whole(aside / layout.CROPS_NPY, npy_bytes(crops))
    write_beton(aside / layout.CROPS_BETON, crops, labels, job.plan.size, job.crop_format, job.work.encoded(view, ok))
    files = {layout.CROPS_NPY: sha256_file(aside / layout.CROPS_NPY)}
    beton = {"bytes": (aside / layout.CROPS_BETON).stat().st_size, "tables_sha256": tables_sha256(aside / layout.CROPS_BETON)}
    checksums = {"crops_id": crops_id, "files": files, layout.CROPS_BETON: beton}
    write_whole(aside / layout.CHECKSUMS_JSON, seal(checksums))
    write_whole(aside / layout.CHECKSUMS_JSON, seal({**checksums, "decoded": CropReader(aside).decoded()}))
    write_spare(aside)
    publish(aside, path)
