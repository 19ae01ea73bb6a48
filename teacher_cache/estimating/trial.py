"""Extraction on a few batches, timed: crops are cut into a cache of their own on the target's disk, which is thrown away.

It is the very code that extracts, so decoding, quantising and writing (with fsync) count as they will.
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..crops.cutting import load_image
from ..crops.images import ImageList, read_image
from ..encoding.fit import fit_bytes, least_rows
from ..errors import BadInputError
from ..extraction.cropping import make_crops, plan_job
from ..extraction.extract import extract_view
from ..extraction.planning import ExtractPlan
from ..files.space import require_space
from ..format.crop_plan import CropPlan

LASTS_S = 8.0
"""What is aimed at, for each of the two timings."""
LEAST_ROWS, MOST_ROWS = 16, 2048
MOST_BYTES = 800_000_000
"""Of the targets that are written, two views of them, unless LEAST_ROWS take more, or what a transform is fitted on."""
ORIGINAL_BYTES = 200_000
"""Room for an original, and for its crops."""
N_ORIGINALS = 64
"""Different images among the crops; they are repeated."""


def teacher_rate(teacher, layers: tuple[int, ...], crop_size: int, batch_size: int) -> float:
    """Crops a second of the teacher alone, on batches in memory; what every step of live training pays."""
    import torch

    images = np.random.default_rng(0).integers(0, 256, (batch_size, crop_size, crop_size, 3), "uint8")
    on_device = torch.from_numpy(images).to(teacher.device)

    def run() -> None:
        teacher(on_device, layers)
        if teacher.device.type == "cuda":
            torch.cuda.synchronize(teacher.device)

    run()  # the first call of a process prepares much
    n_done, started = 0, time.perf_counter()
    while not n_done or time.perf_counter() - started < LASTS_S:
        run()
        n_done += batch_size
    return n_done / (time.perf_counter() - started)


def extraction_rate(folder: Path, teacher, plan: ExtractPlan, crop_plan: CropPlan, crop_format: str, expected: float,
                    images_dir: Path | None = None, images: ImageList | None = None) -> tuple[float, int]:  # fmt: skip
    """Crops a second of `extract`, and on how many crops it was measured.

    folder: on the disk of the future cache; a temporary folder in it is written and removed. expected: crops a second, for the
    number of crops. images_dir, images: originals; without them pictures are made up.
    """
    spec = plan.store_spec(teacher.spec, MOST_ROWS)
    row_bytes = sum(spec.row_bytes(array, teacher.spec) for array in spec.array_names)
    n_rows = int(min(MOST_ROWS, MOST_BYTES // (2 * row_bytes), expected * LASTS_S))
    n_rows = max(LEAST_ROWS, least_rows(spec, teacher.spec), n_rows)
    fit = fit_bytes(replace(spec, n_rows=n_rows, shard_rows=min(spec.shard_rows, n_rows)), teacher.spec)
    require_space(folder, max(fit, 2 * n_rows * row_bytes) + n_rows * ORIGINAL_BYTES)
    with tempfile.TemporaryDirectory(dir=folder, prefix="teacher-cache-trial-") as name:
        trial = Path(name)
        originals = _originals(images_dir, images)
        (trial / "images").mkdir()
        for row in range(n_rows):
            (trial / "images" / f"{row:05d}.jpg").write_bytes(originals[row % len(originals)])
        job = plan_job(trial / "cache", trial / "images", crop_plan, crop_format, 2)
        cache = make_crops(job)
        plan = replace(plan, shard_rows=min(plan.shard_rows, n_rows))
        extract_view(cache.view(0), "trial", teacher, plan)  # fits the quantiser; what is slow once is over then
        started = time.perf_counter()
        extract_view(cache.view(1), "trial", teacher, plan)
        return n_rows / (time.perf_counter() - started), n_rows


def _originals(images_dir: Path | None, images: ImageList | None) -> list[bytes]:
    """Image files that can be decoded."""
    if images is None or images_dir is None:
        return [_made_up(seed) for seed in range(8)]
    found = []
    for name in images.names[:: max(1, len(images.names) // N_ORIGINALS)][:N_ORIGINALS]:
        try:
            data = read_image(images_dir, name)
            load_image(data, name)
        except BadInputError:
            continue  # counted and named when the crop stage meets it
        found.append(data)
    if not found:
        raise BadInputError(f"None of {N_ORIGINALS} images of {images_dir} could be decoded.")
    return found


def _made_up(seed: int) -> bytes:
    """A JPEG of the size of an average ImageNet image, smooth with some noise."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (25, 32, 3), "uint8")).resize((500, 400), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, "int16") + draws.integers(-12, 13, (400, 500, 3), "int16")
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype("uint8")).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
