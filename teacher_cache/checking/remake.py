"""Is the cache what its sources give? A sample of crops is cut again from the originals, a sample of targets made again by the
teacher.

Checksums say that bytes are those that were written; this says that what was written was right, and that it can be had again.
A comparison that cannot be made is `unchecked`: an original that changed, or another Pillow here, is no fault of the cache.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from ..cache import Cache, View
from ..crops.beton import CropReader
from ..crops.images import scan
from ..errors import BadInputError, TeacherCacheError, UnknownNameError, UsageError
from ..extraction.cropping import cut_image, new_images
from ..format.layout import store_file_name
from ..format.quantize import ChannelStatistics, token_errors
from ..format.spec import ARRAY_NAME, LayerFidelity
from ..store.manifest import come_by_themselves
from ..store.reader import StoreReader
from ..terminal.progress import progress
from .findings import Checked, Finding
from .policy import draw_rows, in_threads

DEFAULT_ROWS = 64
BATCH = 16  # rows a forward pass of the teacher
OTHER_PICTURE = 8.0
"""Mean difference, in levels of 255, from which two encoded crops do not show the same; versions of Pillow differ by below 2."""
OTHER_BYTES = f"Pillow {PIL.__version__} makes other bytes of the same original here"
_DRAWN = ("top", "left", "height", "width", "flip", "jitter", "jitter_order")


def cut_views_again(
    cache: Cache, images_dir: Path, n_rows: int, checked: Checked | None = None, seed: int | None = None
) -> Iterator[Finding]:
    """`recrop` of `n_rows` rows of each finished view, drawn at random."""
    for view in _finished_views(cache):
        rows = draw_rows(cache.n_images, n_rows, np.random.default_rng(seed))
        yield from _or_unchecked(view.path, recrop(view, images_dir, rows, checked))


def new_in_folder(cache: Cache, images_dir: Path) -> list[str]:
    """Images of the folder that the cache was made without; none where one cannot be read: others say it."""
    try:
        return new_images(cache, scan(images_dir).images)
    except (TeacherCacheError, OSError):
        return []


def teach_views_again(cache: Cache, teacher, store_name: str, n_rows: int, checked: Checked | None = None, seed: int | None = None
                      ) -> Iterator[Finding]:  # fmt: skip
    """`reteach` of `n_rows` rows, drawn at random, of the store of this name in each view that has it."""
    for view in _finished_views(cache):
        if store_name in view.store_names():
            rows = draw_rows(cache.n_images, n_rows, np.random.default_rng(seed))
            path = view.store_path(store_name)
            yield from _or_unchecked(path, reteach(view, path, teacher, rows, checked))


def _finished_views(cache: Cache) -> list[View]:
    return [view for view in cache.views_on_disk() if view.is_cropped]


def _or_unchecked(path: Path, findings: Iterator[Finding]) -> Iterator[Finding]:
    """What is too damaged to be compared was found by `verify`; here it only is not compared."""
    try:
        yield from findings
    except (TeacherCacheError, OSError) as error:
        yield Finding("unchecked", str(path), f"could not be compared: {str(error).removeprefix(f'{path}: ')}")


# --- crops -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recut:
    """One crop, cut again."""

    encoded: bytes
    """Empty if the original cannot be used."""
    kind: str = "sound"
    """As of a Finding: `sound` if record and bytes are those of the cache, else `unchecked` or `damaged`."""
    reason: str = ""


def cut_again(view: View, images_dir: Path, name: str, record: np.void) -> Recut:
    """Cut the crop of the original `name` again, and compare it with its record in crops.npy."""
    cache = view.cache
    try:
        found, encoded = cut_image(images_dir, name, cache.plan, cache.identity.crop_format, view.number)
    except BadInputError as error:
        if not (images_dir / name).exists():
            return Recut(b"", "unchecked", f"{images_dir} has no such original; give the folder that the cache was made from")
        return Recut(b"", "unchecked", f"the original cannot be used ({str(error).removeprefix(f'{name}: ')})")

    def differs(*fields: str) -> bool:
        return any((found[field] != record[field]).any() for field in fields)

    if differs("source_bytes", "source_crc32c"):
        return Recut(encoded, "unchecked", "the original is not the file it was when the crop was cut")
    if differs("image_height", "image_width"):
        return Recut(encoded, "unchecked", f"Pillow {PIL.__version__} reads another height or width from the same original here")
    if differs(*_DRAWN):
        return Recut(encoded, "damaged", "crops.npy has another box, flip or jitter than the plan draws")
    if differs("bytes", "crc32c"):
        return Recut(encoded, "unchecked", OTHER_BYTES)
    return Recut(encoded)


def recrop(view: View, images_dir: Path, rows: np.ndarray, checked: Checked | None = None) -> Iterator[Finding]:
    """Cut the crops of `rows` of a view again: records and encoded bytes must be identical. The view itself has to be sound.

    Yields a Finding for each reason why some are not. checked: gets how many could be compared.
    """
    reader, names = CropReader(view.path), view.cache.images().names

    def compare(row: int) -> tuple[str, str]:
        cut = cut_again(view, images_dir, names[row], reader.crops[row])
        if cut.reason == OTHER_BYTES and _levels_apart(cut.encoded, _encoded(reader, row), reader.size) > OTHER_PICTURE:
            return "damaged", "the same original gives another picture"
        return cut.kind, cut.reason

    rows_of: dict[tuple[str, str], list[int]] = {}
    with progress(f"view {view.number}: cutting again", len(rows), "crops") as advance:
        for row, verdict in zip(rows.tolist(), in_threads(compare, rows.tolist()), strict=True):
            rows_of.setdefault(verdict, []).append(row)
            advance(1)
    if checked is not None:
        n_unchecked = sum(len(some) for (kind, _), some in rows_of.items() if kind == "unchecked")
        checked.again[f"{view.path.name}/{reader.path.name}"] = len(rows) - n_unchecked
    for (kind, reason), some in rows_of.items():
        if kind != "sound":
            message = f"{len(some)} of {len(rows)} crops cut again: {reason}, e.g. row {some[0]}, {names[some[0]]}."
            yield Finding(kind, str(reader.path), message)


def _encoded(reader: CropReader, row: int) -> bytes:
    start, size = int(reader.pointers[row]), int(reader.sizes[row])
    return reader.bytes[start : start + size].tobytes()


def _levels_apart(first: bytes, second: bytes, size: int) -> float:
    """Mean absolute difference of the pixels of two encoded crops (JPEG or raw RGB), in levels of 255."""

    def pixels(data: bytes) -> np.ndarray:
        if len(data) == size * size * 3:
            return np.frombuffer(data, "u1").astype("int16")
        return np.asarray(Image.open(io.BytesIO(data)), "int16").ravel()

    return float(np.abs(pixels(first) - pixels(second)).mean())


# --- targets -----------------------------------------------------------------------------------------------------------


def load_teacher_of(cache: Cache, weights: str, name: str | None = None) -> tuple[str, object]:
    """The name of a store and its teacher, on the best device of this machine.

    weights: a file, `random:SEED`, or `built-in` for those that come with the teacher. name: of the teacher or store; None if
    there is only one.
    Raises UsageError if these are not the weights that the store was made with, or there is no such store.
    """
    from ..device import cpu_bf16, pick_device
    from ..teachers import load_teacher

    views = _finished_views(cache)
    known = sorted({store for view in views for store in view.store_names()})
    if name is None and len(known) != 1:
        raise UsageError(f"{cache.path} has {len(known)} stores ({', '.join(known)}). Give one as --teacher.")
    chosen = known[0] if name is None else store_file_name(name)
    if chosen not in known:
        raise UnknownNameError(f"{cache.path} has no store {name}; it has {', '.join(known) or 'none'}.")
    store = next(view.store(chosen) for view in views if chosen in view.store_names())
    manifest = store.manifest
    device, _ = pick_device("auto", "auto")
    precision = manifest.precision if device != "cpu" or cpu_bf16() else "fp32"
    if weights == "built-in" and not come_by_themselves(manifest.teacher.weights):
        raise UsageError(f"--weights built-in: {store.path} was made with the weights {manifest.teacher.weights}. Give these.")
    try:
        own = None if weights == "built-in" else weights
        teacher = load_teacher(manifest.teacher.name, own, manifest.teacher.image_size, device, precision,
                               begun=manifest.teacher)  # fmt: skip
    except BadInputError as error:
        prefix = f"--weights {weights}: "
        raise UsageError(prefix + str(error).removeprefix(prefix)) from error
    if teacher.spec.weights_sha256 != manifest.teacher.weights_sha256:
        made_with, given = manifest.teacher, teacher.spec
        raise UsageError(
            f"--weights {weights}: {store.path} was made with the weights {made_with.weights}, sha256 "
            f"{made_with.weights_sha256}; those given have {given.weights_sha256}. Give the same ones."
        )
    return chosen, teacher


def limits(fidelity: LayerFidelity, tolerance: float) -> tuple[float, float]:
    """The largest errors of a row's median token and of any token that storing and rounding explain."""
    p99, worst = (max(pair) for pair in zip((fidelity.p99, fidelity.worst), (fidelity.cls or (0, 0, 0))[1:], strict=True))
    return p99 + tolerance, 2 * worst + 4 * tolerance


def reteach(view: View, path: Path, teacher, rows: np.ndarray, checked: Checked | None = None) -> Iterator[Finding]:
    """Run the teacher over `rows` of the store in `path` again and compare with what is stored, within what storing and machines
    do to it.

    teacher: a teachers.base.Teacher with the weights of the store. Rows that are not extracted yet are left out.
    With p99 and worst of a layer's recorded fidelity, and t = probe.PROBE_TOLERANCE of the precision, a row agrees if the error
    of its median token is at most p99 + t, that of every token at most 2 worst + 4 t, and if its attention differs by at most 4 t
    (relative L2). An unrelated crop differs by about 1. Errors are those of spec.LayerFidelity, with the store's channel
    statistics; of a float16 store, which keeps none, relative L2.
    Raises MismatchError if the teacher does not answer to the probe as it did when the store was begun, or this machine decodes
    crops to other pixels.
    """
    from ..encoding.encode import race  # needs torch
    from ..extraction.extract import run_teacher
    from ..extraction.probe import PROBE_TOLERANCE, require_same_probe

    reader, crops = StoreReader(path, check="always"), CropReader(view.path)
    spec, precision = reader.spec, reader.manifest.precision
    require_same_probe(reader.store, teacher)
    crops.require_same_decoder()
    tolerance = max(PROBE_TOLERANCE[precision], PROBE_TOLERANCE[teacher.precision])
    plain = ChannelStatistics(np.zeros(reader.teacher.dim, "float32"), np.ones(reader.teacher.dim, "float32"))

    rows = rows[reader.finished[rows // spec.shard_rows]]
    names, in_fp32 = view.cache.images().names, reader.store.read_fp32_rows()
    medians, worst = np.zeros((2, len(spec.layers), len(rows)))
    apart = np.zeros(len(rows))  # of the attention
    misdrawn = np.zeros(len(rows), bool)
    with progress(f"view {view.number}: {path.name} again", len(rows), "crops") as advance:
        for start in range(0, len(rows), BATCH):
            batch = slice(start, start + BATCH)
            index = reader.read("index", rows[batch]) if spec.visible else None
            tokens, attention = run_teacher(
                teacher, crops.read(rows[batch]), rows[batch], spec.layers, names.__getitem__, in_fp32, index
            )
            kept = reader.read("attention", rows[batch]) if spec.attention else None
            if index is not None:
                misdrawn[batch] = (index != race(kept, rows[batch], view.number, spec.visible).numpy()).any(1)
            for i, layer in enumerate(spec.layers):
                stored = reader.tokens(rows[batch], layer)  # [B, T, D]
                errors = token_errors(tokens[:, i], stored, reader.statistics.get(layer, plain))
                medians[i, batch], worst[i, batch] = np.median(errors, 1), errors.max(1)
            if spec.attention:
                difference = np.linalg.norm(attention - kept, axis=1)
                apart[batch] = difference / np.linalg.norm(attention, axis=1)
            advance(len(rows[batch]))

    if checked is not None:
        checked.again[f"{view.path.name}/{path.name}"] = len(rows)
    if misdrawn.any():
        message = (
            f"the visible patches of row {rows[misdrawn.argmax()]} are not those that its attention chooses on this machine."
        )
        yield Finding("damaged", str(path / "index"), message)
    verdicts = [("attention", "the attention", apart, 4 * tolerance)]
    for i, fidelity in enumerate(reader.manifest.fidelity):
        typical, single = limits(fidelity, tolerance)
        array = ARRAY_NAME.format(fidelity.layer)
        verdicts += [(array, "the median token", medians[i], typical), (array, "a token", worst[i], single)]
    for array, what, errors, limit in verdicts:
        if n_bad := int((~(errors <= limit)).sum()):
            message = (
                f"{n_bad} of {len(rows)} rows are not what {teacher.spec.name} gives again: {what} of row "
                f"{rows[errors.argmax()]} is off by {errors.max():.2g}, up to {limit:.2g} is rounding."
            )
            yield Finding("damaged", str(path / array), message)
