"""A cache of format version 2, committed: random crops above 256 px, which this project must read for ever.

    python tests/test_cache_golden_crops.py --rewrite

makes golden/crops_v2/ again, for a version that nobody has used yet. It has no stores; those of golden/cache_v* have their own
versions.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.crops.beton import CropReader
from teacher_cache.extraction.cropping import make_crops, plan_job
from teacher_cache.files.durable import read_sealed
from teacher_cache.format.crop_plan import CropPlan

GOLDEN = Path(__file__).parent / "golden" / "crops_v2"
PLAN = CropPlan(seed=1, size=264)


def make_cache(folder: Path) -> Cache:
    """The golden cache, made in `folder` from nothing: two smooth pictures, one crop each."""
    y, x = np.mgrid[:300, :400]
    for index in range(2):
        path = folder / "images" / f"class-{index}" / f"image-{index}.ppm"
        path.parent.mkdir(parents=True)
        pixels = np.stack([x * 255 // 400, y * 255 // 300, np.full_like(x, 90 * index)], -1)
        Image.fromarray(pixels.astype("uint8")).save(path)
    return make_crops(plan_job(folder / "cache", folder / "images", PLAN, "jpeg95", 1))


def test_it_is_read():
    """The cache says version 2 and its old identity, is sound, and decodes to crops of its size."""
    cache = Cache(GOLDEN)
    assert read_sealed(GOLDEN / "cache.json")["format_version"] == 2 and cache.plan == PLAN
    assert cache.crops_id == "418a8def52992dbf3a38d43341462cba08a69518d26aa1f54486fec29265f008"
    assert verify(cache)[0] == []
    pixels = CropReader(cache.view(0).path).read(range(2))
    assert pixels.shape == (2, 264, 264, 3) and pixels[..., 0].std() > 20


def test_it_is_made_again(tmp_path):
    """The same images and plan have the same identity, the same boxes, and nearly the same pixels, whatever encodes them."""
    views = Cache(GOLDEN).view(0), make_cache(tmp_path).view(0)
    assert views[0].cache.crops_id == views[1].cache.crops_id
    before, after = (view.crops() for view in views)
    drawn = [name for name in before.dtype.names if name not in ("bytes", "crc32c")]
    np.testing.assert_array_equal(before[drawn], after[drawn])
    pixels = [CropReader(view.path).read(range(2)).astype(int) for view in views]
    assert np.abs(pixels[0] - pixels[1]).mean() < 2


def rewrite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make_cache(Path(folder))
        shutil.rmtree(GOLDEN, ignore_errors=True)
        shutil.copytree(made.path, GOLDEN)


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        sys.exit(__doc__)
    rewrite()
