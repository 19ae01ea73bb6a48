"""`teacher-cache estimate`: what was asked, completed from what is there or measured; the answer as JSON values, and in words."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cache import Cache
from ..crops.images import ImageList, scan
from ..encoding.fit import fit_bytes
from ..errors import UsageError
from ..extraction.planning import ExtractPlan
from ..files.durable import ASIDE
from ..files.space import existing_folder, free_bytes
from ..format import layout
from ..format.crop_plan import CropPlan
from ..format.layout import store_file_name
from ..format.spec import ARRAY_NAME, ATTENTION_SOURCES, StoreSpec, TeacherSpec
from ..terminal.progress import waiting
from ..words import human
from .disk import DiskRates, measure_files, measure_folder
from .forecast import CropSizes, byte_lines, cache_bytes
from .verdict import Rates, Use, hours, judge

MOST_FILES = 64
"""Shard files that are read to measure a disk."""


@dataclass(frozen=True)
class PresetFacts:
    """What a preset says; handed in, because this room knows no students."""

    preset: str
    plan: CropPlan
    teacher: str
    epochs: int
    read: Callable[[TeacherSpec, int], tuple[list[int], bool]]
    """Block numbers that a training step reads, and whether attention; given the teacher and StoreSpec.visible."""
    rate: Callable[[TeacherSpec, str], tuple[float, int]]
    """Measures crops a second on a device, and on batches of how many."""
    n_teachers: int = 1


@dataclass(frozen=True)
class Question:
    """The options of the command; None where nothing was said."""

    folder: Path
    teacher: str | None
    images: Path | None
    n_images: int | None
    views: int | None
    layers: str | None
    dtype: str | None
    visible: int | None
    shard_rows: int | None
    image_size: int | None
    crop_size: int | None
    crop_format: str | None
    epochs: int | None
    runs: int
    gpu_rate: float | None
    student_rate: float | None
    measure: bool
    weights: str | None
    batch_size: int
    device: str
    precision: str


def answer(asked: Question, student: PresetFacts | None) -> dict:
    """Everything that is known, as plain JSON values. Writes nothing unless asked to measure, and then nothing that stays."""
    from ..teachers import crop_size

    name = asked.teacher or (student.teacher if student else None)
    if name is None:
        raise UsageError("Whose targets? Give --teacher NAME (teacher-cache teachers lists them), or --preset NAME.")
    loaded, device = _load(asked, name) if asked.measure or not _is_listed(asked, name) else (None, None)
    teacher = loaded.spec if loaded else _listed(name)
    crops, crop_plan, crop_format, images = _crops(asked, student, crop_size(name, teacher))
    cache = Cache(asked.folder) if (asked.folder / layout.CACHE_JSON).exists() else None
    asked = dataclasses.replace(asked, views=asked.views or (len(cache.views()) if cache else 1))
    given = {key: getattr(asked, key) for key in ("layers", "dtype", "visible", "shard_rows", "batch_size")}
    plan = ExtractPlan(**{key: value for key, value in given.items() if value is not None})
    spec = plan.store_spec(teacher, crops.n_images)
    sizes = cache_bytes(crops, asked.views, spec, teacher)
    layers, attention = student.read(teacher, spec.visible) if student else (list(spec.layers), spec.attention)
    _require_stored(spec, layers, student)
    read = crops.each + _bytes_read(spec, teacher, layers, attention)

    measured: dict = {}
    if asked.measure:
        _measure(measured, asked, student, loaded, plan, spec, crop_plan, crop_format, images, device)
    disk: DiskRates | None = measured.get("disk")
    rates = Rates(
        asked.gpu_rate or measured.get("teacher"), None if asked.gpu_rate else measured.get("extraction"),
        asked.student_rate or measured.get("student"), disk.random if disk else None,
    )  # fmt: skip
    epochs = asked.epochs or (student.epochs if student else None)
    present = _bytes_there(cache, asked.views, store_file_name(name)) if cache else 0
    free = free_bytes(asked.folder)
    use = Use(crops.n_images, asked.views, epochs, asked.runs, read, sizes["total"], free + present)
    verdict = judge(use, rates)
    verdict_json = dataclasses.asdict(verdict)
    verdict_json["unknown"] = [*verdict.unknown, *_left_out(name, student, cache, rates)]
    if verdict.break_even_epochs is not None and math.isinf(verdict.break_even_epochs):
        verdict_json |= {"break_even_epochs": None, "never_pays": True}
    return {
        "teacher": name, "n_images": crops.n_images, "views": asked.views, "epochs": epochs, "runs": asked.runs,
        "preset": student.preset if student else None, "crop_size": crop_plan.size, "crop_format": crop_format,
        "layers": list(spec.layers), "dtype": spec.dtype, "attention": spec.attention, "visible": spec.visible,
        "attention_source": teacher.attention_source, "head": teacher.head,
        "shards": spec.n_shards,
        "fit_bytes": fit_bytes(spec, teacher), "bytes": sizes, "byte_lines": byte_lines(sizes, crops, asked.views, spec, teacher),
        "free_bytes": free, "present_bytes": present, "folder": str(asked.folder), "bytes_read_per_crop": read,
        "layers_read": layers, "codes_read": sorted({other for layer in layers for other in spec.read_with(layer)}),
        "groups": _groups(spec, teacher, layers),
        "rates": {**dataclasses.asdict(rates), "how": measured.get("how", [])},
        "disk": dataclasses.asdict(disk) if disk else None, **verdict_json,
    }  # fmt: skip


def _groups(spec: StoreSpec, teacher: TeacherSpec, read: list[int]) -> list[dict]:
    """Of klt the layers that are coded together, the last first; the bytes of their codes of a crop; and the operations that a
    token of those that are read takes."""
    if not spec.is_transformed:
        return []
    return [
        {
            "layers": list(group),
            "bytes_per_crop": sum(spec.row_bytes(ARRAY_NAME.format(layer), teacher) for layer in group),
            "flop_per_token": 2 * teacher.dim**2 * sum(len(spec.read_with(layer)) for layer in group if layer in read),
        }
        for group in spec.groups
    ]


def _bytes_there(cache: Cache, n_views: int, store_name: str) -> int:
    """Bytes of crops and targets that need not be made any more."""
    n_bytes = 0
    for view in cache.views()[:n_views]:
        n_bytes += (view.path / layout.CROPS_BETON).stat().st_size
        if store_name in view.store_names():
            n_bytes += int(view.store(store_name).commits.files["bytes"].sum())
    return n_bytes


def _left_out(name: str, student: PresetFacts | None, cache: Cache | None, rates: Rates) -> Iterator[str]:
    """What the figures do not count."""
    if student and student.n_teachers > 1:
        yield f"what more teachers of {student.preset} cost: this counts {name} alone, ask for the others with --teacher"
    if cache is None and rates.extraction:
        yield "the time of cutting crops, which comes before the extraction: hours for a million images on a few processors"


def _is_listed(asked: Question, name: str) -> bool:
    """Whether the table of teachers says all that is needed, so that nothing has to be built."""
    from ..teachers import TEACHERS

    return name in TEACHERS and asked.image_size in (None, TEACHERS[name].image_size)


def _listed(name: str) -> TeacherSpec:
    from ..teachers.families import in_the_table

    return in_the_table(name).spec()


def _load(asked: Question, name: str):
    """The teacher, with random weights unless others are given: they take as long."""
    from ..device import pick_device
    from ..teachers import load_teacher

    device, precision = pick_device(asked.device, asked.precision) if asked.measure else ("cpu", "fp32")
    return load_teacher(name, asked.weights or "random:0", asked.image_size, device, precision), device


def _crops(asked: Question, student: PresetFacts | None, default_size: int) -> tuple[CropSizes, CropPlan, str, ImageList | None]:
    """What the crops will be: those of a cache that is there, cut from images, or typical ones."""
    if asked.folder.exists() and not asked.folder.is_dir():
        raise UsageError(f"{asked.folder} is a file. Give the folder where the cache shall lie, or one that holds a cache.")
    if (asked.folder / layout.CACHE_JSON).exists():
        if asked.images or asked.n_images or asked.crop_size or asked.crop_format:
            raise UsageError(
                f"{asked.folder} is a cache, and its crops are what they are: leave out --images, --n-images, --crop-size and "
                "--crop-format, or give a folder that holds no cache."
            )
        cache = Cache(asked.folder)
        return CropSizes.of_cache(cache), cache.plan, cache.identity.crop_format, None
    plan = student.plan if student else CropPlan(size=default_size)
    plan = plan.changed(None, asked.crop_size, None)
    crop_format = asked.crop_format or "jpeg95"
    if asked.images and asked.n_images:
        raise UsageError("--images counts the images by itself: leave out --n-images, or give it alone.")
    if asked.images:
        images = scan(asked.images).images.permuted(plan.seed)
        return CropSizes.of_images(asked.images, images, plan, crop_format), plan, crop_format, images
    if not asked.n_images:
        raise UsageError("How many images? Give --images DIR, or --n-images N, or a CACHE that has its crops.")
    return CropSizes.typical(asked.n_images, plan, crop_format), plan, crop_format, None


def _require_stored(spec: StoreSpec, layers: list[int], student: PresetFacts | None) -> None:
    missing = sorted(set(layers) - set(spec.layers))
    if missing:
        raise UsageError(
            f"{student.preset} reads the blocks {', '.join(map(str, layers))}, and --layers keeps "
            f"{', '.join(map(str, spec.layers))}. Give --layers {','.join(map(str, sorted({*layers, *spec.layers})))}."
        )


def _bytes_read(spec: StoreSpec, teacher: TeacherSpec, layers: list[int], attention: bool) -> int:
    """Bytes of the arrays that a training step reads of one crop."""
    return sum(spec.row_bytes(array, teacher) for array in spec.arrays_read(layers, attention))


def _measure(measured: dict, asked: Question, student: PresetFacts | None, teacher, plan: ExtractPlan, spec: StoreSpec,
             crop_plan: CropPlan, crop_format: str, images: ImageList | None, device: str) -> None:  # fmt: skip
    """Fill in the rates that were not given, and `how` each was measured."""
    from .trial import extraction_rate, teacher_rate

    how = measured["how"] = []
    say = waiting("estimate")
    folder = existing_folder(asked.folder)
    if (folder / layout.CACHE_JSON).exists():
        folder = folder.parent  # nothing foreign is ever put into a cache
    row_bytes = max(spec.row_bytes(array, teacher.spec) for array in spec.array_names)
    say("the disk")
    shards = _largest_shards(asked.folder)
    measured["disk"] = measure_files(shards, row_bytes) if shards else measure_folder(folder, row_bytes)
    if not asked.gpu_rate:
        say("the teacher")
        rate = measured["teacher"] = teacher_rate(teacher, spec.layers, crop_plan.size, asked.batch_size)
        how.append(f"teacher {rate:,.4g} crops/s: alone, on {device} in {teacher.precision}, batches of {asked.batch_size}")
        plan = dataclasses.replace(plan, batch_size=min(plan.batch_size, max(1, round(rate * 4))))
        rate, n = extraction_rate(folder, teacher, plan, crop_plan, crop_format, rate, asked.images, images)
        measured["extraction"] = rate
        of = "of these images" if images else "of made-up pictures"
        how.append(f"extraction {rate:,.4g} crops/s: decoding, teacher, quantising and writing {n:,} crops {of}")
    if student and not asked.student_rate:
        say("the student")
        rate, n = student.rate(teacher.spec, device)
        measured["student"] = rate
        how.append(f"student {rate:,.4g} crops/s: {student.preset} on {device}, batches of {n} in memory, one process")


def _largest_shards(cache: Path) -> list[Path]:
    """Up to MOST_FILES shard files; a writer may be at work beside us."""
    sizes: dict[Path, int] = {}
    for path in cache.glob(f"{layout.VIEWS}/{layout.STORES}/**/c.*"):
        with contextlib.suppress(FileNotFoundError):
            if path.suffix != ASIDE:
                sizes[path] = path.stat().st_size
    return sorted(sizes, key=lambda path: -sizes[path])[:MOST_FILES]


def in_words(answered: dict) -> str:
    """What `answer` found, for people."""
    layers = ", ".join(map(str, answered["layers"]))
    free, total = answered["free_bytes"], answered["bytes"]["total"]
    lines = [
        f"{answered['n_images']:,} images, {answered['views']} view{'s' * (answered['views'] > 1)} of {answered['crop_size']} px "
        f"({answered['crop_format']}); {answered['teacher']}, layers {layers}, {answered['dtype']}"
        + (f", {ATTENTION_SOURCES[answered['attention_source']]} attention" if answered["attention"] else ", no attention")
        + ", no final norm" * (answered["head"] == "none")
        + (f", tokens of {answered['visible']} visible patches" if answered["visible"] else ""),
        "",
        *answered["byte_lines"],
        f"{'total':<11}{human(total):>8}   {human(free)} are free on the disk of {answered['folder']}"
        + (f"; {human(answered['present_bytes'])} of it are there" if answered["present_bytes"] else "")
        + (f": {human(total - free - answered['present_bytes'])} SHORT" if total > free + answered["present_bytes"] else ""),
        f"{'fitting':<11}{human(answered['fit_bytes']):>8}   of disk for a time, before any target: the quantiser's sample",
        "",
    ]
    if answered["extraction_s"] is not None:
        lines.append(f"extraction {hours(answered['extraction_s'])} on one device")
    read = f"{human(answered['bytes_read_per_crop'])} a crop"
    if answered["codes_read"] != sorted(answered["layers_read"]):
        blocks = [", ".join(map(str, answered[key])) for key in ("layers_read", "codes_read")]
        read += f" (the codes of blocks {blocks[1]}: {blocks[0]} cannot be read without those behind)"
    if answered["needed_bytes_per_s"] is not None:
        read += (
            f", {human(answered['needed_bytes_per_s'])}/s for one device that trains {answered['rates']['student']:,.4g} crops/s"
        )
    lines.append(f"training   reads {read}")
    for group in answered["groups"]:
        blocks = ", ".join(map(str, group["layers"]))
        lines.append(
            f"coded      together: blocks {blocks}, {human(group['bytes_per_crop'])} a crop; {group['flop_per_token'] / 1e6:.3g} "
            "MFLOP a token to decode what is read"
        )
    if disk := answered["disk"]:
        written = f", writes {human(disk['write'])}/s" if disk["write"] else ""
        lines.append(
            f"disk       reads {human(disk['random'])}/s at random ({human(disk['chunk_bytes'])} each, {disk['threads']} at a "
            f"time){written}: {disk['of']}, {disk['how']}"
        )
    lines += [f"measured   {line}" for line in answered["rates"]["how"]]
    lines += ["", *answered["sentences"]]
    if answered["unknown"]:
        lines += ["", "Not known:", *(f"  {line}" for line in answered["unknown"])]
    return "\n".join(lines)
