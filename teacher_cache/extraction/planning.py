"""What was asked for, completed from what is there: whoever continues a cache need not repeat how it was begun.

What is given explicitly is never overruled: the library refuses it where it does not fit the cache.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..cache import Cache
from ..errors import MismatchError, UsageError
from ..format import layout
from ..format.crop_plan import CropPlan
from ..format.dtypes import dtype_of, klt_bits
from ..format.quantize import GROUPS
from ..format.spec import StoreSpec, TeacherSpec, array_names
from ..format.transform import layers_together
from ..store.manifest import Manifest
from ..store.store import Store, is_begun
from ..words import quoted
from .cropping import CropJob, plan_job


@dataclass(frozen=True)
class CropRequest:
    """How crops are to be made; None where nothing was given."""

    images: Path | None = None
    views: int | None = None
    preset: CropPlan | None = None
    """The crop plan of a preset; its seed does not count."""
    plan: str | None = None
    crop_size: int | None = None
    crop_format: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class CropWork:
    """The crops that will be there, and the job that makes those that are missing."""

    n_images: int
    n_views: int
    job: CropJob | None


def plan_crops(cache_dir: Path, request: CropRequest, default_size: int, may_make: bool = True) -> CropWork:
    """Find out what there is to cut.

    default_size: side of the crops of a new cache, pixels. may_make: without it, missing crops are a UsageError.
    """
    existing = Cache(cache_dir) if (cache_dir / layout.CACHE_JSON).exists() else None
    plan = existing.plan if existing else CropPlan(size=default_size)
    if request.preset:
        plan = dataclasses.replace(request.preset, seed=plan.seed)
    plan = plan.changed(request.plan, request.crop_size, request.seed)
    crop_format = request.crop_format or (existing.identity.crop_format if existing else "jpeg95")
    present = {view.number for view in existing.views()} if existing else set()
    n_views = request.views or max(present, default=0) + 1
    if plan.kind == "center" and n_views > 1:
        raise UsageError(f"--plan center draws the same crop in every view: --views {n_views} would store it {n_views} times.")
    if not may_make and not present.issuperset(range(n_views)):
        raise UsageError(
            "--shards is for crops that are finished, because these have one writer. First run: teacher-cache crop --images DIR "
            f"--views {n_views} --crop-size {plan.size} {quoted(cache_dir)}"
        )
    job = plan_job(cache_dir, request.images, plan, crop_format, n_views)
    return CropWork(len(job.images.names) if job else existing.n_images, n_views, job)


def cleaned_name(name: str) -> str:
    """The name of a store as that of its folder. UsageError for a name that is none."""
    cleaned = layout.store_file_name(name)
    if not cleaned or cleaned.startswith(".") or not all(c.isalnum() or c in "._-" for c in cleaned):
        raise UsageError(f"--name {name!r}: give letters, digits, '.', '_' and '-'.")
    return cleaned


@dataclass(frozen=True)
class ExtractPlan:
    """What of the teacher to keep, and how."""

    layers: str = "last5"
    """`last5` (or last1, last12 ...), `last`, or block numbers from 1: `8,10,12`."""
    dtype: str = "int8"
    shard_rows: int = 2048
    batch_size: int = 64
    visible: int = 0
    """K: keep CLS and the first K patches of an attention race (race.py); 0: keep all tokens."""

    def __post_init__(self):
        object.__setattr__(self, "dtype", dtype_of(self.dtype))
        if self.shard_rows < 1 or self.batch_size < 1:
            raise UsageError(f"shard rows and batch size must be positive, given {self.shard_rows} and {self.batch_size}.")

    def layers_of(self, teacher: TeacherSpec) -> tuple[int, ...]:
        """Block numbers, ascending. Raises UsageError for blocks the teacher does not have."""
        text = self.layers.strip()
        if text == "last" or text.startswith("last") and text[4:].isdecimal() and int(text[4:]) > 0:
            n = int(text[4:] or 1)
            return tuple(range(max(1, teacher.depth - n + 1), teacher.depth + 1))
        try:
            layers = tuple(sorted({int(number) for number in text.split(",")}))
        except ValueError:
            layers = ()
        if not layers or layers[0] < 1 or layers[-1] > teacher.depth:
            raise UsageError(
                f"--layers {self.layers}: {teacher.name} has blocks 1 to {teacher.depth}. Give numbers such as "
                f"{teacher.depth - 1},{teacher.depth}, or last, or last5."
            )
        return layers

    def store_spec(self, teacher: TeacherSpec, n_rows: int) -> StoreSpec:
        """The store this plan asks for."""
        layers = self.layers_of(teacher)
        attention = teacher.attention_source is not None
        if self.visible and not attention:
            raise UsageError(
                f"--tokens visible:{self.visible}: {teacher.name} gives no attention to choose by (it has neither a CLS token "
                "nor an attention-pooling head). Give --tokens all."
            )
        if self.visible > teacher.n_patches:
            raise UsageError(
                f"--tokens visible:{self.visible}: {teacher.name} has {teacher.n_patches} patches. Give fewer, or --tokens all."
            )
        names = array_names(layers, self.dtype, attention, self.visible)
        group = GROUPS.get(self.dtype, 0) if klt_bits(self.dtype) is None else layers_together(teacher.dim)
        return StoreSpec(
            n_rows=n_rows, shard_rows=min(self.shard_rows, n_rows), layers=layers, dtype=self.dtype,
            group=group, attention=attention, codecs=tuple((name, "none") for name in names), visible=self.visible,
        )  # fmt: skip


def plan_targets(cache_dir: Path, name: str, image_size: int | None, **given) -> tuple[ExtractPlan, int | None]:
    """The plan for the stores `name` of a cache, if there are any, and the side of the teacher's input (None: its own).

    given: fields of ExtractPlan; None where nothing was given: then it is as in the first view that has the store.
    Raises MismatchError if what was given, or that first store, does not agree with the store of any view.
    """
    base, given = ExtractPlan(), {field: value for field, value in given.items() if value is not None}
    begun = _begun(cache_dir, name)
    if begun:
        found = begun[0].manifest
        layers = ",".join(map(str, found.store.layers))
        batch_size = found.made.batch_size if found.made else base.batch_size
        base = ExtractPlan(layers, found.store.dtype, found.store.shard_rows, batch_size, found.store.visible)
        image_size = image_size or found.teacher.image_size
    plan = dataclasses.replace(base, **given)
    for store in begun:
        asked = plan.store_spec(store.teacher, store.spec.n_rows)
        require_like(store.path, target_differences(store.manifest, plan, asked))
    return plan, image_size


def begun_teacher(cache_dir: Path, name: str) -> TeacherSpec | None:
    """The teacher of the stores `name`, as the one that says least describes it; None if there are none."""
    return min((store.teacher for store in _begun(cache_dir, name)), key=lambda spec: spec.activation is not None, default=None)


def in_words_of(cache_dir: Path, name: str, teacher: TeacherSpec) -> TeacherSpec:
    """The teacher as the version of the stores `name` of a cache describes it; as it is where none was begun."""
    path = next(filter(is_begun, layout.stores_named(cache_dir, name)), None)
    return teacher if path is None else teacher.in_version(Store.open(path).manifest.format_version)


def _begun(cache_dir: Path, name: str) -> list[Store]:
    """The stores `name` that were begun, by view."""
    return [Store.open(path) for path in layout.stores_named(cache_dir, name) if is_begun(path)]


def target_differences(found: Manifest, plan: ExtractPlan, asked: StoreSpec) -> list[str]:
    """In what `asked`, the store of a plan, is not that of a manifest, a line each; not in codecs."""
    mine, theirs = ({**spec.to_json(), "codecs": None} for spec in (asked, found.store))
    if found.source is not None:
        theirs["made from"], mine["made from"] = f"the store {found.source['name']}, by recode", "the teacher"
    return spec_differences(theirs, mine)


def spec_differences(theirs: dict, mine: dict) -> list[str]:
    """`dtype: int8 in the store, float16 given` for each key that differs."""

    def text(value) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    return [f"{key}: {text(theirs.get(key))} in the store, {text(mine.get(key))} given" for key in keys]


def require_like(path: Path, differing: list[str]) -> None:
    """Raise MismatchError that lists the differences, if there are any."""
    if differing:
        raise MismatchError(
            f"{path} was made with other parameters:\n  " + "\n  ".join(differing) +
            f"\nGive the same ones, another --name, or delete {path}."
        )  # fmt: skip


def own_shards(shards: range | None, spec: StoreSpec) -> range:
    """Those of `shards` that exist; by default all. UsageError if the range begins behind the last one."""
    if shards is None:
        return range(spec.n_shards)
    if shards.start >= spec.n_shards:
        raise UsageError(
            f"--shards {shards.start}:...: there are {spec.n_shards} shards; the range must begin at 0 to {spec.n_shards - 1}."
        )
    return range(shards.start, min(shards.stop, spec.n_shards))
