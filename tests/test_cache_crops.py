"""Drawing and cutting crops: a pure function of (plan, name, view), torchvision's pixels, and images of every sort."""

from __future__ import annotations

import io
import itertools
import math
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torchvision.transforms.functional as F
from fakes import image_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from teacher_cache.crops.cutting import TEXT_BYTES, cut, draw, encode, load_image
from teacher_cache.errors import BadInputError, UsageError
from teacher_cache.format.crop_plan import CROP_FORMATS, Crop, CropPlan
from teacher_cache.terminal.image_warnings import named

sides = st.integers(1, 6000)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def picture(height: int, width: int) -> Image.Image:
    """Noise: every pixel counts."""
    return Image.fromarray(np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), "uint8"))


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- drawing ---------------------------------------------------------------------------------------------------------

GOLDEN = {
    "plain": ((CropPlan(), "n01440764/a.JPEG", 0, 375, 500), Crop(76, 170, 249, 216, True)),
    "next view": ((CropPlan(), "n01440764/a.JPEG", 1, 375, 500), Crop(38, 2, 334, 422, False)),
    "jitter": (
        (CropPlan(seed=7, jitter=0.4, scale=(0.4, 1)), "ünïcode/b.png", 0, 480, 640),
        Crop(60, 15, 419, 376, False, (0.7730131149291992, 0.986437976360321, 0.7594441175460815), (0, 1, 2)),
    ),
    "fallback": ((CropPlan(), "x", 0, 1, 5000), Crop(0, 2499, 1, 1, False)),
    "huge view": ((CropPlan(ratio=(1, 1), scale=(1, 1)), "y", 2**40, 99, 100), Crop(0, 0, 99, 99, True)),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_draw_never_changes(case):
    """A draw is the same on every machine and in every version: caches made years apart agree."""
    arguments, crop = GOLDEN[case]
    assert draw(*arguments) == crop


@given(sides, sides, names, st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.floats(0.01, 1), st.floats(0.05, 20))
def test_boxes_lie_inside(height, width, name, seed, view, low, ratio):
    """Whatever the image's size, name and plan, the box has at least one pixel and lies inside the image."""
    plan = CropPlan(seed=seed, scale=(low, 1.0), ratio=(min(ratio, 1 / ratio), max(ratio, 1 / ratio)))
    crop = draw(plan, name, view, height, width)
    assert crop.height >= 1 and crop.width >= 1 and crop.top >= 0 and crop.left >= 0
    assert crop.top + crop.height <= height and crop.left + crop.width <= width
    assert crop == draw(plan, name, view, height, width)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_extreme_sizes(height, width):
    """Images of one pixel and of one line give a crop of the plan's size."""
    plan = CropPlan(size=32)
    crop = draw(plan, "a.png", 0, height, width)
    assert cut(plan, picture(height, width), crop).size == (32, 32)


def test_law_of_the_boxes():
    """Area share and aspect stay in the plan's ranges and fill them evenly; half of the crops are mirrored."""
    plan, height, width = CropPlan(scale=(0.2, 1.0)), 1000, 1000
    crops = [draw(plan, f"{i}.png", 0, height, width) for i in range(4000)]
    share = np.array([crop.height * crop.width / (height * width) for crop in crops])
    aspect = np.array([crop.width / crop.height for crop in crops])
    assert 0.199 < share.min() < 0.21 and share.max() <= 1
    assert 0.748 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.336
    assert abs(np.log(aspect).mean()) < 0.01  # log-uniform: as many wide as tall ones
    small = share[share < 0.7]  # a larger box may not fit and be drawn again
    assert np.abs(np.histogram(small, 5, (0.2, 0.7))[0] / len(small) - 0.2).max() < 0.03
    assert 0.47 < np.mean([crop.flip for crop in crops]) < 0.53
    places = np.array([crop.top / max(1, height - crop.height) for crop in crops])
    assert abs(places.mean() - 0.5) < 0.02 and places.min() < 0.02 and places.max() > 0.98


def test_views_names_and_seeds_are_independent():
    """Another view, name or seed draws another crop; a neighbouring view is not the same stream shifted."""
    drawn = {
        draw(CropPlan(seed=seed), name, view, 500, 500)
        for seed, name, view in itertools.product(range(5), ("a", "b", "a/b", "a b"), range(20))
    }
    assert len(drawn) == 5 * 4 * 20


def test_jitter_law():
    """Each factor is uniform in 1-s .. 1+s, and all six orders of brightness, contrast and saturation occur alike."""
    crops = [draw(CropPlan(jitter=0.4), str(i), 0, 99, 99) for i in range(3000)]
    factors = np.array([crop.jitter for crop in crops])
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4 and np.abs(factors.mean(0) - 1).max() < 0.02
    counts = np.unique([crop.jitter_order for crop in crops], axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 400


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "resized"}, "random or center"), ({"size": 0}, "1 to 4096"), ({"size": 4097}, "1 to 4096"),
        ({"scale": (0.5, 0.2)}, "low <= high"),
        ({"scale": (0.0, 1.0)}, "0 < low"), ({"ratio": (0, 1)}, "ratio"), ({"flip_p": 1.5}, "flip_p"), ({"jitter": -1}, "jitter"),
        ({"seed": -1}, "seed"), ({"resample": "nearest"}, "bicubic, bilinear"), ({"resize": 0}, "resize must be at least 1"),
        ({"kind": "center", "resize": 223}, "at least size"),
    ],
)  # fmt: skip
def test_impossible_plans(change, words):
    """A plan that cannot be drawn is refused when it is built, naming the field and the plan."""
    with pytest.raises(UsageError, match=words):
        CropPlan(**change)


@pytest.mark.parametrize("size", [8, 224, 256, 257, 384, 518, 4096])
def test_random_plans_of_any_size(size):
    """A random plan has any size; `resize`, which belongs to centre crops, stays what it always was, as does every crops_id."""
    plan = CropPlan(size=size)
    assert plan == CropPlan().changed(None, size, None) and plan.to_json()["resize"] == 256
    assert plan.version == (1 if size <= 256 else 2)
    centre = CropPlan().changed("center", size, 3)
    assert (centre.resize, centre.seed, centre.version) == (round(size * 8 / 7), 3, 1)


@pytest.mark.parametrize("size", [0, 7, 4097])
def test_sizes_that_are_not_made(size):
    """What is asked for has 8 to 4096 pixels, and the message says so."""
    with pytest.raises(UsageError, match=f"Crops of {size} pixels: a side of 8 to 4096 pixels"):
        CropPlan().changed(None, size, None)


def test_a_plan_that_is_gone_on_with():
    """What is not asked for stays as it is, also the short side of a centre crop that is not the usual one."""
    centre = CropPlan(kind="center", size=224, resize=232, flip_p=0.0)
    assert centre.changed(None, None, None) == centre == centre.changed("center", 224, None)
    assert centre.changed(None, 336, None) == CropPlan.center(336)
    assert CropPlan(jitter=0.4).changed("random", 384, None) == CropPlan(jitter=0.4, size=384)


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("view", range(6))
def test_random_crop_is_torchvisions(view, resample):
    """A random crop has the bits of torchvision's resized_crop of the same box, then its hflip."""
    plan, image = CropPlan(size=48, resample=resample), picture(131, 97)
    crop = draw(plan, "a.png", view, 131, 97)
    theirs = F.resized_crop(image, crop.top, crop.left, crop.height, crop.width, [48, 48], InterpolationMode(resample))
    theirs = F.hflip(theirs) if crop.flip else theirs
    assert cut(plan, image, crop).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize(("height", "width"), [(97, 131), (131, 97), (64, 64), (37, 200), (20, 31), (1, 7)])
def test_center_crop_is_torchvisions(height, width, size):
    """A centre crop has the bits of torchvision's Resize and CenterCrop, for odd and even sizes."""
    plan, image = CropPlan.center(size), picture(height, width)
    theirs = CenterCrop(size)(Resize(plan.resize, InterpolationMode.BICUBIC)(image))
    assert cut(plan, image, draw(plan, "a.png", 0, height, width)).tobytes() == theirs.tobytes()


def test_center_plan_for_evaluation():
    """The usual evaluation crop of 224 pixels resizes the short side to 256."""
    assert CropPlan.center(224) == CropPlan(kind="center", size=224, resize=256, flip_p=0.0)


def test_center_crop_of_a_hair():
    """An image so narrow that resizing its short side would take gigabytes is refused with its size."""
    with pytest.raises(BadInputError, match="5000 x 1 pixels are too narrow"):
        cut(CropPlan.center(), picture(1, 5000), Crop(0, 0, 1, 5000, False))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jitter_is_torchvisions(order):
    """Jitter has the bits of torchvision's adjust functions on the whole image, in the crop's own order."""
    image, factors = picture(50, 60), (1.3, 0.7, 1.6)
    ours = cut(CropPlan(size=24), image, Crop(5, 6, 30, 40, False, factors, order))
    for index in order:
        image = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[index](image, factors[index])
    theirs = F.resized_crop(image, 5, 6, 30, 40, [24, 24], InterpolationMode.BICUBIC)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("crop_format", CROP_FORMATS)
def test_encoding(crop_format):
    """Raw crops are exact, JPEGs keep full colour resolution and stay within their quality."""
    image = image_of(3).resize((32, 32))
    data = encode(image, crop_format)
    if crop_format == "raw":
        assert data == image.tobytes()
        return
    decoded = Image.open(io.BytesIO(data))
    assert decoded.mode == "RGB" and [c[1:3] for c in decoded.layer] == [(1, 1)] * 3  # 4:4:4
    assert np.abs(np.asarray(decoded, int) - np.asarray(image, int)).mean() < (4 if crop_format == "jpeg95" else 7)


# --- decoding originals ----------------------------------------------------------------------------------------------

ORIENTED = {  # EXIF tag 274 -> how the upright image is made from the stored one
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation(orientation):
    """All eight EXIF orientations come out upright."""
    image, exif = picture(20, 31), Image.Exif()
    exif[274] = orientation
    upright = load_image(file_of(image, "PNG", exif=exif), "a.png")
    assert np.array_equal(np.asarray(upright), ORIENTED[orientation](np.asarray(image)))


GREY = np.arange(256, dtype="uint8").reshape(16, 16)


def png_16(colour_type: int, levels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write. levels: uint8 [H, W, channels], each times 257."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = levels.shape
    lines = b"".join(b"\0" + (line.astype(">u2") * 257).tobytes() for line in levels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


PALETTE = Image.fromarray(GREY).convert("RGB").quantize(64)
MODES = {
    "grey": (file_of(Image.fromarray(GREY), "PNG"), GREY),
    "grey with alpha": (file_of(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(255 - GREY)]), "PNG"), GREY),
    "black and white": (file_of(Image.fromarray(GREY > 99), "PNG"), np.where(GREY > 99, 255, 0)),
    "palette": (file_of(PALETTE, "PNG"), np.asarray(PALETTE.convert("L"))),
    "palette with a transparent colour": (file_of(PALETTE, "PNG", transparency=5), np.asarray(PALETTE.convert("L"))),
    "palette with alpha": (file_of(PALETTE, "PNG", transparency=bytes(range(64))), np.asarray(PALETTE.convert("L"))),
    "RGBA": (file_of(Image.merge("RGBA", [Image.fromarray(GREY)] * 3 + [Image.fromarray(255 - GREY)]), "PNG"), GREY),
    "16-bit grey": (file_of(Image.fromarray(GREY.astype("uint16") * 257), "PNG"), GREY),
    "16-bit grey TIFF": (file_of(Image.fromarray(GREY.astype("uint16") * 257), "TIFF"), GREY),
    "16-bit RGB": (png_16(2, GREY[..., None].repeat(3, 2)), GREY),
    "16-bit grey with alpha": (png_16(4, np.stack([GREY, 255 - GREY], -1)), GREY),
    "PGM": (file_of(Image.fromarray(GREY), "PPM"), GREY),
    "dark 16-bit PGM": (b"P5 2 1 65535\n" + struct.pack(">2H", 257, 0), np.array([[1, 0]])),
    "BMP": (file_of(Image.fromarray(GREY), "BMP"), GREY),
    "one pixel": (file_of(Image.fromarray(GREY[:1, 7:8]), "PNG"), GREY[:1, 7:8]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_pixel_formats(mode):
    """Every pixel format becomes the 8-bit RGB that a viewer would show, alpha dropped, without a warning."""
    data, levels = MODES[mode]
    image = load_image(data, "a.png")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.repeat(levels[..., None], 3, 2))


def test_cmyk_jpeg():
    """A CMYK JPEG becomes RGB of nearly the same colours."""
    original = image_of(5)
    image = load_image(file_of(original.convert("CMYK"), "JPEG", quality=95), "a.jpg")
    assert image.mode == "RGB" and image.size == original.size
    assert np.abs(np.asarray(image, int) - np.asarray(original, int)).mean() < 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    """Of an animation or a stack of pages the first is taken."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = load_image(file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options), "a.png")
    assert image.size == (8, 8) and image.getcolors() == [(64, (255, 0, 0))]


def test_the_name_does_not_decide():
    """A PNG that is called .jpg is decoded: the bytes say what they are."""
    assert load_image(file_of(image_of(1), "PNG"), "a.jpg").tobytes() == image_of(1).tobytes()


BROKEN = {
    "empty": b"",
    "text": b"this is no image\n" * 20,
    "truncated JPEG": file_of(picture(60, 60), "JPEG")[:-900],
    "truncated PNG": file_of(picture(60, 60), "PNG")[:-900],
    "header only": file_of(picture(60, 60), "PNG")[:33],
    "zeros": bytes(4096),
    "damaged PNG": file_of(picture(60, 60), "PNG").replace(b"IDAT", b"IDAX"),
    "float TIFF": file_of(Image.fromarray(GREY.astype("float32")), "TIFF"),
    "32-bit integer TIFF": file_of(Image.fromarray(GREY.astype("int32")), "TIFF"),
    "not a number TIFF": file_of(Image.fromarray(np.full((4, 4), math.nan, "float32")), "TIFF"),
    "truncated WebP": file_of(picture(60, 60), "WEBP")[:-900],
    "truncated GIF": file_of(picture(60, 60).quantize(64), "GIF")[:-900],
    "truncated progressive JPEG": file_of(picture(60, 60), "JPEG", progressive=True)[:-99],
    "EPS": file_of(picture(60, 60), "EPS"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case):
    """A file that cannot be decoded raises BadInputError with its name and the reason, never another error."""
    with pytest.raises(BadInputError, match=r"^class/a\.png: \S+"):
        load_image(BROKEN[case], "class/a.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("compressed", [False, True])
def test_long_texts_in_a_png(compressed):
    """A PNG with megabytes of text is decoded as one without; with more than the bound it is refused by its name."""
    text = PngInfo()
    text.add_text("history", "x" * (3 << 20), zip=compressed)
    assert load_image(file_of(image_of(1), "PNG", pnginfo=text), "a.png").tobytes() == image_of(1).tobytes()
    text.add_text("more", "x" * TEXT_BYTES, zip=compressed)
    with pytest.raises(BadInputError, match="^a.png: ValueError: .*[tT]ext"):
        load_image(file_of(image_of(1), "PNG", pnginfo=text), "a.png")


def test_warnings_name_their_images():
    """What Pillow warns of is counted by kind with the name of an image, whichever thread decodes it."""
    exif = Image.Exif()
    exif[271] = "a maker"
    data = bytearray(file_of(image_of(1).convert("RGB"), "JPEG", exif=exif))
    start = data.index(b"Exif\0\0") + 6
    data[start + 8 : start + 10] = b"\xff\xff" if data[start : start + 2] == b"MM" else b"\xff\x7f"  # so many entries
    said = []
    with warnings.catch_warnings(), named(said.append):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: load_image(bytes(data), f"{i}.jpg"), range(8)))
        load_image(file_of(image_of(2), "PNG"), "sound.png")
    assert len(said) == 1 and said[0].startswith("warning  0.jpg: ") and said[0].endswith("(7 more images with such a warning)")


def test_warnings_of_others_stay_as_they_are():
    """A warning that is about no image is shown as ever, and afterwards Python's handling is what it was."""
    before = warnings.showwarning
    with pytest.warns(DeprecationWarning, match="old"), named(lambda line: pytest.fail(line)):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert warnings.showwarning is before


def test_decompression_bombs(monkeypatch):
    """A small file that would decode to an absurd number of pixels is refused before it fills the memory."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadInputError, match="bomb.png: .*Images of more than 2,000 pixels are not decoded; put a smaller copy"):
        load_image(file_of(Image.new("L", (100, 100)), "PNG"), "bomb.png")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what is odd in a file
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]), st.data())
def test_damaged_files_never_crash(kind, data):
    """Whatever byte of a file is changed and wherever it is cut: an RGB image or BadInputError."""
    original = bytearray(file_of(image_of(2).convert("RGB"), kind))
    original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(original)))
    try:
        assert load_image(bytes(original[:end]), "a").mode == "RGB"
    except BadInputError as error:
        assert str(error).startswith("a: ")
