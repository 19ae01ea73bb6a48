"""Crops, teachers and students of any size, from the command line: nothing but memory knows 224."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from fakes import write_images
from timm.models.vision_transformer import VisionTransformer

from pipelines.feed.labelled import MOST_BYTES, LabelledImages
from student.cli.evaluate import evaluate
from student.cli.train import train
from student.errors import ConfigError
from teacher_cache import teachers
from teacher_cache.cache import Cache
from teacher_cache.cli.main import main
from teacher_cache.crops.beton import CropReader
from teacher_cache.extraction import parts
from teacher_cache.store.reader import StoreReader
from teacher_cache.teachers.timm_vit import as_teacher, at_image_size
from teacher_cache.teachers.weights.load import LoadedWeights, random_weights

IMAGES, BATCH = 8, 4
TEACHERS = {"vit-8": (32, 8), "vit-14": (28, 14), "vit-16": (32, 16), "vit-32": (64, 32)}
"""Name -> (side of the input, side of a patch)."""


def load_tiny(name, weights=None, image_size=None, device="cpu", precision="fp32", begun=None):
    """A ViT of two narrow blocks, as `timm:NAME` would be one."""
    side, patch = TEACHERS[name]
    model = VisionTransformer(img_size=side, patch_size=patch, embed_dim=24, depth=2, num_heads=2, num_classes=0).eval()
    random_weights(model, 0)
    if image_size is not None:
        at_image_size(model, name, image_size)
    return as_teacher(name, model, LoadedWeights("random:0", "0" * 64), (0.5,) * 3, (0.5,) * 3, device, precision)


@pytest.fixture(scope="module", autouse=True)
def tiny_teachers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "load_teacher", load_tiny)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), n_classes=2, per_class=IMAGES // 2)


def run(command, *arguments, code=0) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output


def extract(cache, images, teacher, *more, code=0) -> str:
    return run(main, "extract", "--teacher", teacher, "--images", images, "--batch-size", 4, *more, cache, code=code)


def train_a_step(cache, out, *more, code=0) -> str:
    return run(train, "--cache", cache, "--preset", "maskalign-b16", "--tiny", "--set", f"batch_size={BATCH}", "--teacher",
               "tiny", "--max-steps", 1, "--out", out, *more, code=code)  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "image_size", "crop_size"),
    [("vit-8", 32, 32), ("vit-32", 224, 224), ("vit-14", 336, 336), ("vit-16", 384, 384), ("vit-14", 518, 518),
     ("vit-16", 384, 192), ("vit-16", 192, 384)],
)  # fmt: skip
def test_from_crop_to_step(tmp_path, images, teacher, image_size, crop_size):
    """Crops of any size are cut, seen by a teacher of the same or another size, found sound, and learned from."""
    cache = tmp_path / "cache"
    sizes = ["--image-size", image_size, *(["--crop-size", crop_size] if crop_size != image_size else [])]
    extract(cache, images, teacher, "--name", "tiny", *sizes)
    opened = Cache(cache)
    assert json.loads((cache / "cache.json").read_text())["format_version"] == (2 if crop_size > 256 else 1)
    assert opened.plan.size == crop_size and opened.plan.resize == 256
    assert CropReader(opened.view(0).path).read([0]).shape == (1, crop_size, crop_size, 3)
    store = StoreReader(opened.view(0).store_path("tiny"))
    grid = image_size // TEACHERS[teacher][1]
    assert store.teacher.image_size == image_size and store.teacher.grid == (grid, grid)
    assert store.tokens([0], 2).shape == (1, 1 + grid**2, 24)

    assert "sound and complete" in run(main, "verify", "--images", images, "--weights", "random:0", cache)
    train_a_step(cache, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["backbone"]["image_size"] == crop_size and config["backbone"]["patch_size"] * grid == crop_size


def test_crops_that_no_patch_divides(tmp_path, images):
    """Crops of 257 px serve a teacher of its own size; a student whose patches do not fill them is refused with sizes that do."""
    cache = tmp_path / "cache"
    extract(cache, images, "vit-16", "--name", "tiny", "--image-size", 256, "--crop-size", 257)
    assert "sound and complete" in run(main, "verify", cache)
    said = train_a_step(cache, tmp_path / "run", code=2)
    assert "image_size=257 is no multiple of the 16 pixels of an output token. Take 256 or 272, and crops of that size." in said
    said = run(train, "--cache", cache, "--preset", "mae-b16", "--accept-mismatch", "--out", tmp_path / "run", code=2)
    assert "crops of" in said and "257 is no multiple of 16 px" in said and "--set" not in said
    said = run(train, "--cache", cache, "--preset", "mae-b16", "--tiny", "--out", tmp_path / "run", code=2)
    assert "Crops of 257 px: no grid of 2 to 64 patches a side fills them. Take crops of another size, such as 256 px." in said
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_patches_do_not_fill(tmp_path, images):
    """A teacher's input that its patches do not fill is refused with the sizes beside it, before anything is cut."""
    said = extract(tmp_path / "cache", images, "vit-16", "--image-size", 257, code=2)
    assert "--image-size 256 or 272" in said and not (tmp_path / "cache").exists()


def test_a_teacher_of_another_grid_than_the_presets_student(tmp_path, images):
    """extract --preset refuses a grid that its student does not have, with the size that gives it; one that is given is taken."""
    cache = tmp_path / "cache"
    said = extract(cache, images, "vit-14", "--preset", "maskalign-b16", code=2)
    assert "student has 14 x 14 patches, and vit-14 at its own 28 px 2 x 2" in said and not cache.exists()
    assert "Give --image-size 196; or, for a student of another grid, --image-size 28." in said
    extract(cache, images, "vit-14", "--preset", "maskalign-b16", "--image-size", 28, "--name", "tiny")
    arguments = ["--preset", "maskalign-b16", "--teacher", "tiny", "--accept-mismatch", "--out", tmp_path / "run"]
    said = run(train, "--cache", cache, *arguments, code=2)
    assert "needs attention on the student's 14 x 14 patches (224 pixels, 16 a patch); the teacher vit-14 has 2 x 2" in said
    assert "With teacher-cache extract --image-size 196, under another --name, vit-14 has 14 x 14 patches." in said
    assert "A student of 32 px (--set backbone.image_size=32, on crops of that size) has 2 x 2." in said
    extract(cache, images, "vit-14", "--preset", "maskalign-b16", "--name", "tiny")  # as it was begun
    extract(cache, images, "vit-16", "--preset", "mae-b16", "--name", "other", "--dry-run")


def test_two_teachers_of_different_grids(tmp_path, images):
    """Of two teachers over one crop the one whose grid is another is named, with the size at which the grids are equal."""
    cache = tmp_path / "cache"
    extract(cache, images, "vit-14", "--name", "tiny", "--image-size", 56)
    extract(cache, images, "vit-16", "--name", "other")
    arguments = ["--preset", "mr-mae-b16-clip-dino", "--tiny", "--set", f"batch_size={BATCH}", "--teacher", "tiny"]
    said = run(train, "--cache", cache, *arguments, "--teacher", "other", "--out", tmp_path / "run", code=2)
    assert "mimic-2 compares patch by patch: the student has 4 x 4 patches" in said and "vit-16 has 2 x 2" in said
    assert "With teacher-cache extract --image-size 64, under another --name, vit-16 has 4 x 4 patches." in said
    extract(cache, images, "vit-16", "--name", "equal", "--image-size", 64)
    run(train, "--cache", cache, *arguments, "--teacher", "equal", "--max-steps", 1, "--out", tmp_path / "run")


def test_the_students_own_size(tmp_path, images):
    """A preset made for 224 px learns at 384 px when told so, and its student is evaluated there."""
    cache, out = tmp_path / "cache", tmp_path / "run"
    run(main, "crop", "--images", images, "--crop-size", 384, cache)
    small = {"depth": 1, "dim": 24, "heads": 2, "patch_size": 16}
    options = [word for key, value in small.items() for word in ("--set", f"backbone.{key}={value}")]
    arguments = [
        "--cache",
        cache,
        "--preset",
        "mae-demo",
        "--accept-mismatch",
        *options,
        "--set",
        "batch_size=4",
        "--max-steps",
        1,
    ]
    said = run(train, *arguments, "--out", out, code=2)
    assert "are 384 px, mae-demo takes 32 px" in said and "--set backbone.image_size=384" in said
    run(train, *arguments, "--set", "backbone.image_size=384", "--out", out)
    assert "neighbours" in run(evaluate, "knn", out, "--train", images, "--val", cache)


def test_pages_and_pictures_of_large_crops(tmp_path, images):
    """show, report, inspect and estimate know nothing of 224 px either."""
    cache = tmp_path / "cache"
    extract(cache, images, "vit-16", "--name", "tiny", "--image-size", 384)
    run(main, "show", "--row", "0:2", "--images", images, "-o", tmp_path / "sheet.png", cache)
    run(main, "show", "-o", tmp_path / "one.png", cache)
    run(main, "report", "-o", tmp_path / "report.html", cache)
    assert json.loads(run(main, "inspect", "--json", cache))["plan"]["size"] == 384
    said = run(main, "estimate", "--teacher", "vit-16", "--image-size", 384, "--images", images, "--json", tmp_path / "new")
    assert json.loads(said)["crop_size"] == 384


def test_other_sizes_are_another_cache(tmp_path, images):
    """A cache is not gone on with at another size, larger or smaller, and the message names the size alone."""
    cache = tmp_path / "cache"
    run(main, "crop", "--images", images, "--crop-size", 300, cache)
    said = run(main, "crop", "--images", images, "--crop-size", 224, "--views", 2, cache, code=2)
    assert "crop plan size: 300 in the cache, 224 given" in said and "format_version" not in said
    run(main, "crop", "--images", images, "--views", 2, cache)
    assert len(Cache(cache).views()) == 2


@pytest.mark.parametrize("option", ["--crop-size", "--image-size"])
@pytest.mark.parametrize("size", [7, 4097])
def test_sizes_out_of_bounds(tmp_path, images, option, size):
    """Below 8 and above 4096 pixels nothing is made, and the message has the bounds."""
    said = extract(tmp_path / "cache", images, "vit-16", option, size, code=2)
    assert "8<=x<=4096" in said and not (tmp_path / "cache").exists()


def test_the_largest_crops(tmp_path, monkeypatch):
    """Raw crops of 4096 px, of 50 MB each, are cut, found sound and read; so many of them are in memory as can be."""
    folder, cache = write_images(tmp_path / "images", 1, 2), tmp_path / "cache"
    monkeypatch.setattr(parts, "PART_BYTES", 3 * 4096**2)
    run(main, "crop", "--images", folder, "--crop-size", 4096, "--crop-format", "raw", cache)
    assert "sound and complete" in run(main, "verify", cache)
    reader = CropReader(Cache(cache).view(0).path)
    assert [pixels.shape for pixels in reader.each([1, 0])] == [(4096, 4096, 3)] * 2
    assert LabelledImages(cache, 4096).batch_size == MOST_BYTES // (3 * 4096**2) == 2


def test_miniatures_without_a_teacher():
    """A miniature has 4 patches a side or as few more as fill the crop; where only two or three do, these."""
    from pipelines.presets import recipe

    grids = {size: recipe("mae-b16").tiny((), size).config.backbone.grid[0] for size in (32, 224, 254, 384, 518)}
    assert grids == {32: 4, 224: 4, 254: 2, 384: 4, 518: 7}
    with pytest.raises(ConfigError, match="Crops of 257 px"):
        recipe("mae-b16").tiny((), 257)
