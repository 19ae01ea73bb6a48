"""How large a cache will be, before anything of it is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..cache import Cache
from ..crops.beton import place_crops
from ..crops.images import ImageList
from ..errors import BadInputError
from ..extraction.cropping import sample_crop_bytes
from ..format import layout
from ..format.crop_plan import CROP_FORMATS, CropPlan
from ..format.crop_record import CROP_DTYPE
from ..format.spec import LayerFidelity, MadeWith, StoreSpec, TeacherSpec, new_version
from ..store.manifest import Manifest, small_array_shapes, small_files
from ..store.sizes import store_bytes
from ..store.spare import pack_members
from ..words import human

TYPICAL_JPEG_BYTES = 27_000 / 224**2
"""Of a pixel of a crop of a photograph at JPEG quality 95: docs/design/0002."""
N_SAMPLES = 64
"""Crops that are cut to measure their bytes."""
TABLE_ROWS = 10_000
"""Rows for which crops.beton is laid out; more make no difference to its bytes a row."""
NAME_BYTES = 30
"""Of a line of images.txt, where there are no images to look at."""


@dataclass(frozen=True)
class CropSizes:
    """What is known of the crops that will be, or are, in a cache."""

    n_images: int
    sizes: np.ndarray
    """Bytes of encoded crops, as many as were looked at."""
    source: str
    """Where these come from, for people."""
    name_bytes: float = NAME_BYTES
    """Of a line of images.txt."""

    @property
    def each(self) -> int:
        """Mean bytes of an encoded crop."""
        return round(float(self.sizes.mean()))

    @classmethod
    def of_cache(cls, cache: Cache) -> CropSizes:
        sizes = cache.finished_view(0).crops()["bytes"]
        name_bytes = (cache.path / layout.IMAGES_TXT).stat().st_size / cache.n_images
        return cls(cache.n_images, sizes, "as they are in the cache", name_bytes)

    @classmethod
    def of_images(cls, folder: Path, images: ImageList, plan: CropPlan, crop_format: str) -> CropSizes:
        """Cuts a few crops. Raises BadInputError if none of the images can be decoded."""
        sizes = np.array(sample_crop_bytes(folder, images.names, plan, crop_format, N_SAMPLES))
        if not len(sizes):
            raise BadInputError(f"None of {min(N_SAMPLES, len(images.names))} images of {folder} could be decoded.")
        error = sizes.std() / len(sizes) ** 0.5 / sizes.mean()
        names = float(np.mean([len(name.encode()) + 1 for name in images.names]))
        return cls(len(images.names), sizes, f"measured on {len(sizes)}, give or take {error:.0%}", names)

    @classmethod
    def typical(cls, n_images: int, plan: CropPlan, crop_format: str) -> CropSizes:
        """Without images to look at."""
        if CROP_FORMATS[crop_format] is None:
            return cls(n_images, np.array([3 * plan.size**2]), "plain RGB")
        typical = np.array([round(TYPICAL_JPEG_BYTES * plan.size**2)])
        return cls(n_images, typical, "typical of photographs at quality 95 (docs/design/0002); --images DIR measures yours")


def crop_bytes(crops: CropSizes) -> int:
    """Bytes of crops.beton of one view."""
    n_rows = min(crops.n_images, TABLE_ROWS)
    _, _, table_start = place_crops(np.resize(crops.sizes, n_rows).astype("uint64"))
    return round((table_start / n_rows + 24) * crops.n_images)  # the allocation table, 24 bytes a row, lies behind the crops


def _list_bytes(crops: CropSizes, n_views: int) -> int:
    """Bytes of names, labels and crop records, each in its file and in a spare."""
    around = 12_000 + 10_000 * n_views  # JSON, and what tar rounds up
    return round(2 * crops.n_images * (crops.name_bytes + 8 + CROP_DTYPE.itemsize * n_views)) + around


def _small_bytes(spec: StoreSpec, teacher: TeacherSpec) -> int:
    """Bytes of the small files of a store and of their second copies."""
    nothing = "0" * 64
    fidelity = tuple(LayerFidelity(layer, 1 / 3, 1 / 3, 1 / 3, 65536) for layer in spec.layers)
    made = MadeWith(1 << 20, False, "x" * 40)
    manifest = Manifest(teacher, spec, 0, nothing, nothing, "fp32", fidelity, nothing, {}, made, new_version(spec))
    arrays = {name: np.zeros(shape, "float32") for name, shape in small_array_shapes(manifest).items()}
    files = small_files(manifest, arrays)
    files[layout.STORE_JSON] = bytes(100 * len(files))
    files[layout.SHARDS_NPY] = bytes(128 + 12 * spec.n_shards * len(spec.array_names))
    return sum(map(len, files.values())) + len(pack_members(files))


def cache_bytes(crops: CropSizes, n_views: int, spec: StoreSpec, teacher: TeacherSpec) -> dict[str, int]:
    """Bytes of a finished cache with one teacher, if no codec saves anything, by what takes them.

    crops; tokens, with their scales; attention; rest: lists, headers, checksums, indices, small files and all second copies.
    """

    def of(arrays: list[str]) -> int:
        return spec.n_rows * n_views * sum(spec.row_bytes(array, teacher) for array in arrays)

    attention = of(["attention"]) if spec.attention else 0
    tokens = of([array for array in spec.array_names if array != "attention"])
    rest = n_views * (store_bytes(spec, teacher) + _small_bytes(spec, teacher)) - tokens - attention + _list_bytes(crops, n_views)
    parts = {"crops": n_views * crop_bytes(crops), "tokens": tokens, "attention": attention, "rest": rest}
    return {**parts, "total": sum(parts.values())}


def byte_lines(sizes: dict[str, int], crops: CropSizes, n_views: int, spec: StoreSpec, teacher: TeacherSpec) -> list[str]:
    """`cache_bytes` for people, a line each."""
    n_rows = n_views * crops.n_images
    about = {
        "crops": f"{human(crops.each)} each: {crops.source}",
        "tokens": f"{human(sizes['tokens'] / n_rows)} a crop: {len(spec.layers)} layers of {spec.n_tokens(teacher)} tokens, "
        f"{teacher.dim} wide, {spec.dtype}",
        "attention": f"{human(sizes['attention'] / n_rows)} a crop",
        "rest": "lists, checksums, indices, second copies of small files",
    }
    return [f"{name:<11}{human(sizes[name]):>8}   {text}" for name, text in about.items() if sizes[name]]
