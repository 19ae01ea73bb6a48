"""A whole cache: its crops, and a teacher's targets of them. Planned and announced first, then made; interrupted, made again.

    make_cache("cache", images="imagenet/train", teacher="clip-b16", weights="ViT-B-16.pt")

The commands crop and extract are `plan_cache` and `CacheWork.make`; `make_cache` is both for a program.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache import Cache
from ..crops.images import in_one_line
from ..errors import UsageError
from ..files.claims import taking_over
from ..files.space import free_bytes, require_space
from ..format.crop_plan import CropPlan
from ..format.layout import CACHE_JSON, SKIPPED_TXT, store_folder, view_path
from ..format.spec import StoreSpec, TeacherSpec
from ..store.store import Store, is_begun
from ..store.writer import bytes_under_way, missing_bytes
from ..terminal.progress import note, told_to
from ..words import human
from .cropping import CropJob, bytes_to_write, estimate_crop_bytes, make_crops, remove_left_over
from .planning import (
    CropRequest,
    CropWork,
    ExtractPlan,
    begun_teacher,
    cleaned_name,
    in_words_of,
    own_shards,
    plan_crops,
    plan_targets,
)
from .ranks import Process

if TYPE_CHECKING:
    from ..teachers.base import Teacher

CROP_SIZE = 224
"""Side of the crops of a new cache that no teacher is known of, pixels."""


@dataclass(frozen=True)
class TargetRequest:
    """Whose targets are to be made, and how. None where nothing is said: as in the store that is there, else as by default."""

    teacher: str | Teacher
    """Its name, or one that is loaded."""
    weights: str | None = None
    name: str | None = None
    """Of the store. None: the teacher's."""
    layers: str | None = None
    dtype: str | None = None
    visible: int | None = None
    """K: CLS and the K patches that attention draws first. 0: all tokens."""
    shard_rows: int | None = None
    image_size: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "auto"
    compiled: bool = False
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches of the student that the targets are for. None: any."""

    @property
    def teacher_name(self) -> str:
        return self.teacher if isinstance(self.teacher, str) else self.teacher.spec.name

    @property
    def store_name(self) -> str:
        """Of the store's folder. UsageError for a name that is none."""
        return cleaned_name(self.name or self.teacher_name)

    @property
    def given(self) -> dict:
        """What was said of the fields of an ExtractPlan."""
        return {"layers": self.layers, "dtype": self.dtype, "visible": self.visible,
                "shard_rows": self.shard_rows, "batch_size": self.batch_size}  # fmt: skip


@dataclass(frozen=True)
class TargetWork:
    """The targets that are to be made of each view."""

    name: str
    teacher: Teacher
    plan: ExtractPlan
    shards: range | None
    """Those of this process; None: all."""
    stores: tuple[Path, ...]
    """Where they will be, by view."""


@dataclass(frozen=True)
class Made:
    """What came of it."""

    is_new: bool
    """Whether anything was made that was not there."""
    n_missing: int = 0
    """Shards, over all views, that other processes still have to make."""


@dataclass(frozen=True)
class CacheWork:
    """What there is to make in a cache, checked and announced. Nothing is written before `make`."""

    path: Path
    crops: CropWork
    targets: TargetWork | None
    may_make_crops: bool
    is_idle: bool = False
    """Whether none of it is for this process."""

    def make(self, skip_bad: bool = False, workers: int | None = None) -> Made:
        """Make it, or the rest of it. skip_bad, workers: as for `make_cache`."""
        if self.is_idle:
            return Made(False)
        if self.may_make_crops:
            self.make_crops(skip_bad, workers)
        if self.targets is None:
            return Made(self.crops.job is not None)
        return self._make_targets(self.targets)

    def make_crops(self, skip_bad: bool = False, workers: int | None = None, wait: Callable[[str], None] | None = None) -> None:
        """Make the crops that are missing, or clear away what a killed process left when it had made the last of them.

        wait: told whom one waits for while another process is at it; None: that is an error.
        """
        make_missing_crops(self.path, self.crops.job, skip_bad, workers, wait)

    def _make_targets(self, work: TargetWork) -> Made:
        from .extract import extract_view

        views = [Cache(self.path).finished_view(number) for number in range(self.crops.n_views)]
        worked = [extract_view(view, work.name, work.teacher, work.plan, work.shards) for view in views]
        return Made(any(worked), _n_missing(work.stores))


def make_cache(
    path: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    teacher: str | Teacher | None = None,
    weights: str | os.PathLike | None = None,
    plan: CropPlan | None = None,
    views: int | None = None,
    crop_format: str | None = None,
    name: str | None = None,
    layers: str | Sequence[int] | None = None,
    dtype: str | None = None,
    tokens: str | None = None,
    shard_rows: int | None = None,
    shards: range | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
    take_over: bool = False,
    say: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Cache:
    """Make a cache, or what is missing of one; interrupted, call it again. Returns it; on a finished one it does nothing else.

    path: folder of the cache, new or begun.  images: folder of class folders with images, or of images; needed while crops are
    missing.  plan: how crops are drawn. [default: random resized crops of the teacher's size, or as the cache has]  views: passes
    over the images, one crop an image each.  crop_format: `jpeg95`, `jpeg90` or `raw`.  skip_bad: leave out images that cannot
    be decoded, and list them in skipped.txt.  workers: threads that cut crops.

    teacher: `clip-b16`, `timm:NAME` ... (teachers.load_teacher), or a teachers.base.Teacher; None: crops alone.  weights: its
    file, or `random:SEED`.  name: of the store. [default: the teacher's]  layers: `last5`, or block numbers from 1: `"8,10,12"`,
    `(8, 10, 12)`.  dtype: `int8`, `int4`, `float16` or `klt:BITS`.  tokens: `all`, or `visible:K`: CLS and the K patches that
    attention draws first.  shard_rows: crops a shard.  shards: make only these of each view; other processes make the others.
    image_size: side of the teacher's input, pixels.  batch_size: crops a forward pass.  device: `auto`, `cpu`, `cuda`, `cuda:N`.
    precision: `auto`, `fp32` or `bf16`.  compiled: run the blocks through torch.compile.

    take_over: whoever holds the cache is gone; do not watch its claim for minutes first.  say: told each line that the command
    prints.  progress: told again and again what goes on, how much of it is done, and how much there is.

    What is not said is as in the cache that is there. Raises MismatchError if it was made with other parameters, UsageError for
    what cannot be made, BadInputError for images or weights that cannot be used, NoSpaceError for a disk that is too small.
    """
    crops = CropRequest(
        images=None if images is None else Path(images), views=views, preset=plan, seed=None if plan is None else plan.seed,
        crop_format=crop_format,
    )  # fmt: skip
    request = None
    if teacher is not None:
        numbers = layers if layers is None or isinstance(layers, str) else ",".join(map(str, layers))
        request = TargetRequest(
            teacher, None if weights is None else os.fspath(weights), name, numbers, dtype,
            None if tokens is None else n_visible(tokens),
            shard_rows=shard_rows, image_size=image_size, batch_size=batch_size, device=device, precision=precision,
            compiled=compiled,
        )  # fmt: skip
    with told_to(say, progress), taking_over(take_over):
        plan_cache(Path(path), crops, request, shards).make(skip_bad, workers)
        return Cache(Path(path))


def n_visible(tokens: str) -> int:
    """`all` or `visible:K` as the number of patches to keep: 0 is all. UsageError for anything else."""
    match = re.fullmatch(r"visible:([1-9][0-9]{0,8})", tokens)
    if tokens != "all" and not match:
        raise UsageError(f"{tokens!r}: give all, or visible:K with the number of patches, such as visible:59.")
    return int(match[1]) if match else 0


def plan_cache(path: Path, crops: CropRequest, request: TargetRequest | None = None, shards: range | None = None,
               process: Process | None = None) -> CacheWork:  # fmt: skip
    """Find out what there is to make, say it, and whether the disk has room for it. Nothing is written.

    request: None for crops alone. process: this one; by default as torchrun's environment says.
    Raises as `make_cache` does.
    """
    if request is None:
        planned = plan_crops(path, crops, default_size=CROP_SIZE)
        if planned.job is None:
            note(f"{path} has all its crops. Nothing to do.")
        else:
            _require_space(path, _tell_crops(planned.job))
        return CacheWork(path, planned, None, True)
    process = process or Process.current(shards)
    process.require_own_device(request.device)
    return _plan_targets(path, crops, request, shards, process)


def _plan_targets(path: Path, crops: CropRequest, request: TargetRequest, shards: range | None, process: Process) -> CacheWork:
    from ..encoding.fit import fit_bytes
    from ..teachers import crop_size
    from .extract import require_same_targets  # imports numba, which asks once how many threads it may have: after `process`

    name = request.store_name
    plan, image_size = plan_targets(path, name, request.image_size, **request.given)
    teacher = _teacher(request, image_size, process, begun_teacher(path, name))
    if image_size is None:
        _require_grid(teacher.spec, request.grid)
    may_make = shards is None and process.world_size == 1
    planned = plan_crops(path, crops, default_size=crop_size(request.teacher_name, teacher.spec), may_make=may_make)
    for view in Cache(path).views() if (path / CACHE_JSON).exists() else []:
        require_same_targets(view, name, teacher, plan)
    stores = tuple(view_path(path, number) / store_folder(name) for number in range(planned.n_views))
    n_bytes = _tell_crops(planned.job) if planned.job else 0
    spec = plan.store_spec(in_words_of(path, name, teacher.spec), planned.n_images)
    shards = process.shards(shards, spec.n_shards)
    work = TargetWork(name, teacher, plan, shards, stores)
    if shards is not None and not shards:
        note(f"There are {spec.n_shards} shards for {process.world_size} processes: none for this one.")
        return CacheWork(path, planned, work, may_make, is_idle=True)
    _offer_bf16(request, teacher, stores)
    n_targets = _tell_targets(stores, spec, teacher.spec, own_shards(shards, spec))
    n_bytes += n_targets if any(map(is_begun, stores)) else max(n_targets, fit_bytes(spec, teacher.spec))
    _require_space(path, n_bytes, of_all=" by all shards, whoever makes them" if shards is not None else "")
    return CacheWork(path, planned, work, may_make)


def _teacher(request: TargetRequest, image_size: int | None, process: Process, begun: TeacherSpec | None) -> Teacher:
    """The teacher that is asked for, loaded; says what was loaded."""
    from .. import teachers
    from ..device import pick_device

    if not isinstance(request.teacher, str):
        if request.weights is not None or request.image_size is not None:
            raise UsageError("A teacher that is loaded has its weights and its image size: give neither.")
        if request.teacher.is_raw:
            raise UsageError(f"{request.teacher.spec.name} gives raw block outputs, and stores keep whitened ones. Load it anew.")
        return request.teacher
    device, precision = pick_device(request.device, request.precision, process.local_rank)
    loaded = teachers.load_teacher(request.teacher, request.weights, image_size, device, precision, begun)
    note(f"teacher  {loaded.spec.name}, weights {loaded.spec.weights} (sha256 {loaded.spec.weights_sha256[:12]}), "
         f"{loaded.precision} on {device}")  # fmt: skip
    if loaded.weights_read:
        note(f"         weights as they are in the file: {loaded.weights_read}")
    if request.weights and loaded.ignored_weights:
        note(f"         {len(loaded.ignored_weights)} tensors of that file belong to other parts and are left out, "
             f"e.g. {loaded.ignored_weights[0]}")  # fmt: skip
    if request.compiled:
        loaded.compile()
    return loaded


def _require_grid(teacher: TeacherSpec, grid: tuple[int, int] | None) -> None:
    """Raise UsageError if a teacher at its own size has another grid than the student that the targets are for."""
    if grid in (None, teacher.grid):
        return
    raise UsageError(
        f"The preset's student has {grid[0]} x {grid[1]} patches, and {teacher.name} at its own {teacher.image_size} px "
        f"{teacher.grid[0]} x {teacher.grid[1]}; a student learns from teachers of its own grid. Give --image-size "
        f"{grid[0] * teacher.patch_size}; or, for a student of another grid, --image-size {teacher.image_size}."
    )


def make_missing_crops(path: Path, job: CropJob | None, skip_bad: bool, workers: int | None = None,
                       wait: Callable[[str], None] | None = None, cut_all: Callable[[CropJob], None] | None = None
                       ) -> None:  # fmt: skip
    """Make the crops that are missing, or clear away what a killed process left when it had made the last of them.

    The rest as for `cropping.make_crops`.
    """
    if job is None:
        remove_left_over(path)
        return
    made = make_crops(job, skip_bad, workers, wait, cut_all)
    if made.n_skipped:
        note(f"{made.n_skipped:,} images could not be decoded and were left out; {made.path / SKIPPED_TXT} lists them.")


# --- said --------------------------------------------------------------------------------------------------------------


def _tell_crops(job: CropJob) -> int:
    """Say what crops will be made; returns the bytes that takes while it goes on."""
    n_images, n_views = len(job.images.names), len(job.views)
    if job.ignored:
        note(f"{len(job.ignored):,} files of {job.images_dir} are no images by their names and are left alone, e.g. "
             f"{job.ignored[0]!r}.")  # fmt: skip
    if job.left_out:
        note(in_one_line(job.left_out))
    tell_new(job.images_dir, job.new)
    one = estimate_crop_bytes(job)
    note(f"crops    {n_images:,} images in {len(job.images.classes):,} classes, {n_views} view{'s' * (n_views > 1)} to make, "
         f"{job.plan.kind} {job.plan.size} px, {job.crop_format}: about {human(one * n_images * n_views)} "
         f"({human(one)} each, measured on a few)")  # fmt: skip
    return bytes_to_write(job, one)


def tell_new(images: Path, new: Sequence[str]) -> None:
    """Say how many images of the folder the cache was made without."""
    if new:
        note(f"{len(new):,} images of {images} are not in this cache, which was made without them, e.g. {new[0]!r}.")


def _tell_targets(stores: Sequence[Path], spec: StoreSpec, teacher: TeacherSpec, own: range) -> int:
    """Say what targets will be made, of the shards `own` of each store; returns the bytes that all shards still take.

    All of them, because they come to lie on one disk: processes that each looked at their own share would all begin, and fill it.
    """
    n_bytes = sum(missing_bytes(store, spec, teacher, own) for store in stores)
    share = f" for shards {own.start}:{own.stop}" if len(own) < spec.n_shards else ""
    note(f"targets  {len(stores)} view{'s' * (len(stores) > 1)} of {spec.n_rows:,} crops in {spec.n_shards:,} shards, "
         f"layers {', '.join(map(str, spec.layers))}, {spec.dtype}{', attention' * spec.attention}: "
         f"{human(n_bytes)} to write{share}")  # fmt: skip
    return sum(max(0, missing_bytes(store, spec, teacher) - bytes_under_way(store)) for store in stores)


def _offer_bf16(request: TargetRequest, teacher: Teacher, stores: Sequence[Path]) -> None:
    """Say of a new store on a CPU that the teacher could be faster."""
    from ..device import cpu_bf16

    on_cpu = teacher.device.type == "cpu" and teacher.precision == "fp32" and request.precision == "auto"
    if on_cpu and (instruction := cpu_bf16()) and not any(map(is_begun, stores)):
        note(f"         This processor has {instruction}: --precision bf16 makes the teacher faster, and moves tokens "
             "by about as much as int8 does.")  # fmt: skip


def _n_missing(stores: Sequence[Path]) -> int:
    """Shards, over all stores, that are not finished; says how many of each."""
    n_all = 0
    for store in map(Store.open, stores):
        n_missing = store.spec.n_shards - store.n_finished()
        n_all += n_missing
        if n_missing:
            note(f"{store.path}: {n_missing:,} of {store.spec.n_shards:,} shards are still missing.")
    return n_all


def _require_space(path: Path, needed: int, of_all: str = "") -> None:
    note(f"space    {human(needed)} needed{of_all}, {human(free_bytes(path))} free")
    require_space(path, needed)
