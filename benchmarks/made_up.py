"""What is measured on: made-up images, and stores of made-up targets with the sizes of a ViT-B/16's. No weights, no download."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from teacher_cache.cache import Cache
from teacher_cache.extraction.cropping import make_crops, plan_job
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.quantize import ChannelStatistics
from teacher_cache.format.spec import MadeWith, StoreSpec, TeacherSpec, new_version
from teacher_cache.format.transform import MOST_BITS, N_SCALES, LayerCode, Transform, token_bytes
from teacher_cache.store.folding import fold
from teacher_cache.store.manifest import Manifest, create_store
from teacher_cache.store.store import Store
from teacher_cache.store.writer import ShardWriter

NAME = "made-up"
VIT_B16 = TeacherSpec(
    name=NAME, weights="random:0", weights_sha256="0" * 64, image_size=224, patch_size=16, grid=(14, 14), dim=768, depth=12,
    heads=12, has_cls=True, n_registers=0, mean=(0.5,) * 3, std=(0.5,) * 3, norm_eps=1e-5, projection_dim=512, resize="none",
    activation="gelu", positions="none", attention_source="cls", head="layernorm",
)  # fmt: skip
SMALL = TeacherSpec(
    name=NAME, weights="random:0", weights_sha256="0" * 64, image_size=28, patch_size=7, grid=(4, 4), dim=32, depth=12, heads=2,
    has_cls=True, n_registers=0, mean=(0.5,) * 3, std=(0.5,) * 3, norm_eps=1e-5, projection_dim=8, resize="none",
    activation="gelu", positions="none", attention_source="cls", head="layernorm",
)  # fmt: skip
"""For `--tiny`."""


def made_up_image(index: int, width: int = 500, height: int = 375) -> Image.Image:
    """A picture with the spectrum of a photograph (amplitude 1 / frequency) and some grain; at quality 90 a JPEG of 110 kB."""
    rng = np.random.default_rng(index)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.maximum(np.hypot(y, x), 1 / max(width, height))
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width)) for _ in range(3)]
    bright, *colours = (plane / plane.std() for plane in planes)
    grain = rng.standard_normal((height, width)) * 7
    channels = [128 + 45 * bright + 12 * shift + grain for shift in (colours[0], -sum(colours) / 2, colours[1])]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype("uint8"))


def write_images(folder: Path, n_images: int, size: tuple[int, int] = (500, 375), n_distinct: int = 64) -> Path:
    """A folder of `n_images` JPEGs in two classes; only `n_distinct` pictures are drawn, the others are copies of them.

    size: (width, height), pixels. A crop is drawn by the name of its image, so crops of copies differ all the same.
    """
    paths = [folder / f"class-{index % 2}" / f"image-{index:05d}.jpg" for index in range(n_images)]
    for path in paths[:2]:
        path.parent.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(paths):
        if index < n_distinct:
            made_up_image(index, *size).save(path, quality=90)
        else:
            shutil.copyfile(paths[index % n_distinct], path)
    return folder


def make_cache(
    folder: Path, n_rows: int, crop_size: int = 224, images: Path | None = None, plan: CropPlan | None = None
) -> Cache:
    """A cache of one view without targets, `n_rows` crops of made-up images, or of those of the folder `images`."""
    if images is None:
        small = crop_size < 100
        images = write_images(folder / "images", n_rows, (60, 45) if small else (500, 375))
    elif n_rows:
        images = _some_images(images, folder / "images", n_rows)
    return make_crops(plan_job(folder / "cache", images, plan or CropPlan(size=crop_size, scale=(0.2, 1.0)), "jpeg95", 1))


def _some_images(source: Path, folder: Path, n_images: int) -> Path:
    """A folder with copies of images of another, evenly spread; over again under other names where it has too few."""
    found = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    spread = found[:: max(1, len(found) // n_images)]
    for index, path in zip(range(n_images), itertools.cycle(spread), strict=False):
        link = folder / path.parent.name / f"{index:06d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, link)
    return folder


def store_spec(teacher: TeacherSpec, n_rows: int, layers: str, dtype: str = "int8", shard_rows: int = 256) -> StoreSpec:
    """What `teacher-cache extract` would make of these."""
    return ExtractPlan(layers=layers, dtype=dtype, shard_rows=shard_rows).store_spec(teacher, n_rows)


def begin_store(path: Path, teacher: TeacherSpec, spec: StoreSpec, view=None) -> None:
    """Create a store without rows; of `view` if one is given."""
    flat = ChannelStatistics(np.zeros(teacher.dim, "float32"), np.ones(teacher.dim, "float32"))
    head = {"gamma": np.ones(teacher.dim, "float32"), "beta": np.zeros(teacher.dim, "float32")}
    if teacher.projection_dim is not None:
        head["projection"] = np.eye(teacher.dim, teacher.projection_dim, dtype="float32")
    manifest = Manifest(
        teacher=teacher, store=spec, view=view.number if view else 0, crops_id=view.cache.crops_id if view else "c" * 64,
        crops_sha256=view.crops_sha256 if view else "d" * 64, precision="fp32", fidelity=(), probe_sha256="e" * 64, software={},
        made=MadeWith(64, False, "cpu"), format_version=new_version(spec),
    )  # fmt: skip
    statistics = dict.fromkeys(spec.layers, flat) if spec.group else {}
    transform = made_up_transform(spec, teacher) if spec.is_transformed else None
    create_store(path, manifest, statistics, head, np.zeros((len(spec.layers), teacher.dim), "float32"), transform)


def made_up_transform(spec: StoreSpec, teacher: TeacherSpec) -> Transform:
    """One whose tokens have the bytes of any other's and take as long to read; its bits are spread evenly."""
    levels = np.concatenate([np.linspace(-3, 3, 2**bits) for bits in range(1, MOST_BITS + 1)]).astype("float32")
    scales = np.exp2(np.arange(N_SCALES) / 8 - 16).astype("float32")
    n_bits, dim = 8 * (token_bytes(spec.dtype, teacher.dim) - 1), teacher.dim
    bits = n_bits // dim + (np.arange(dim) < n_bits % dim)
    codes = {}
    for layer in spec.layers:
        behind = np.full((dim * (len(spec.read_with(layer)) - 1), dim), 1e-3, "float32")
        rows = np.concatenate([behind, np.eye(dim, dtype="float32") * (bits > 0)[:, None]])
        codes[layer] = LayerCode.of(np.zeros(dim, "float32"), rows.astype("float32"), bits, np.ones(dim, "float32"))
    return Transform(codes, levels, scales)


def made_up_rows(rng: np.random.Generator, n_rows: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random rows of one array, without fill values: codes from their whole range, scales and attention small and positive."""
    if dtype == "int8":
        return rng.integers(-127, 128, (n_rows, *shape), dtype="int8")
    if np.dtype(dtype).kind in "iu":
        return rng.integers(1, 255, (n_rows, *shape), dtype=dtype)
    return rng.random((n_rows, *shape), dtype="float32").astype(dtype) * np.array(0.02, dtype)


def fill_store(path: Path, teacher: TeacherSpec, spec: StoreSpec, seed: int = 0) -> None:
    """Give a begun store all its rows, random ones."""
    rng = np.random.default_rng(seed)
    for shard in range(spec.n_shards):
        with ShardWriter(Store.open(path), shard) as out:
            rows = spec.rows_of(shard)
            for start in range(rows.start, rows.stop, 32):
                n_rows = min(32, rows.stop - start)
                out.append(
                    {a: made_up_rows(rng, n_rows, spec.row_shape(a, teacher), spec.row_dtype(a)) for a in spec.array_names}
                )
    fold(Store.open(path))


def add_targets(cache: Cache, teacher: TeacherSpec = VIT_B16, layers: str = "last5", dtype: str = "int8", name: str = NAME,
                shard_rows: int = 256) -> Path:  # fmt: skip
    """Give view 0 of a cache a complete store of made-up targets; returns its path."""
    view, spec = cache.view(0), store_spec(teacher, cache.n_images, layers, dtype, shard_rows)
    path = view.store_path(name)
    begin_store(path, teacher, spec, view)
    fill_store(path, teacher, spec)
    return path
