"""How crops are drawn and cut. A crop is a pure function of (plan, image name, view): any worker, in any order, on any
machine, draws the same box, flip and jitter. Pillow does the pixels, in the order the papers do them.

Gives up: colour jitter of hue (no method here uses it), and any augmentation that is not baked into the crop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin, UnidentifiedImageError

from .errors import BadInputError, UsageError
from .image_warnings import of_image

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

LEAST_SIZE, LARGEST_SIZE = 8, 4096
"""Sides of the crops that can be asked for, pixels. Below, no network has a patch; above, one crop alone has 50 MB. Caches with
crops of 1 to 7 pixels can be read: nothing has ever depended on the lower bound."""

CROP_FORMATS = {"jpeg95": 95, "jpeg90": 90, "raw": None}
"""Name -> JPEG quality (always 4:4:4), or None for plain RGB bytes."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
"""What is decoded, whatever the file is called. Others are seldom meant, and Pillow hands some to outside programs (EPS)."""

TEXT_BYTES = 64 << 20
"""Of text and profiles in a PNG, unpacked. Pillow refuses a picture for one text of more than 1 MiB, as image generators and
editors write them (prompts, histories); its bound on all texts of a file together is this one."""
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = TEXT_BYTES  # for the whole process: Pillow has no other way

CROP_DTYPE = np.dtype([
    ("image_height", "<i4"), ("image_width", "<i4"),  # of the upright original, pixels
    ("top", "<i4"), ("left", "<i4"), ("height", "<i4"), ("width", "<i4"),  # box on the upright original, pixels
    ("flip", "u1"),  # 1: the cut was mirrored left to right
    ("jitter", "<f4", 3),  # factors of brightness, contrast, saturation; 1 leaves the image as it is
    ("jitter_order", "u1", 3),  # indices into the line above, in the order they were applied
    ("bytes", "<u4"), ("crc32c", "<u4"),  # of the encoded crop
    ("source_bytes", "<u8"), ("source_crc32c", "<u4"),  # of the original image file
])  # fmt: skip
"""One record of crops.npy."""


@dataclass(frozen=True)
class CropPlan:
    """How every crop of a cache is drawn."""

    kind: str = "random"
    """`random`: a random resized crop a view. `center`: resize the short side, cut the middle (for evaluation)."""
    seed: int = 0
    size: int = 224
    """Side of the square crop, pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the box's share of the image area (MAE, MR-MAE, MaskAlign and MILAN use .2 to 1)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the box's width / height, drawn log-uniformly."""
    flip_p: float = 0.5
    resample: str = "bicubic"
    jitter: float = 0.0
    """Strength s of brightness, contrast and saturation, each factor uniform in 1-s .. 1+s; 0 is off."""
    resize: int = 256
    """`center` only: the short side before the cut, pixels. Of a random plan it says nothing; it is part of the identity of a
    cache all the same, because it always was."""

    def __post_init__(self):
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(float(bound) for bound in getattr(self, name)))
        checks = {
            "kind must be random or center": self.kind in ("random", "center"),
            f"size must be 1 to {LARGEST_SIZE} pixels": type(self.size) is int and 1 <= self.size <= LARGEST_SIZE,
            "resize must be at least 1": type(self.resize) is int and self.resize >= 1,
            "resize must be at least size": self.kind != "center" or self.resize >= self.size,
            "scale must be 0 < low <= high <= 1": len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1,
            "ratio must be 0 < low <= high": len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1],
            "flip_p must be 0 to 1": 0 <= self.flip_p <= 1,
            "jitter must be 0 to 1": 0 <= self.jitter <= 1,
            "seed must be 0 to 2**63 - 1": isinstance(self.seed, int) and 0 <= self.seed < 2**63,
            f"resample must be one of {', '.join(RESAMPLE)}": self.resample in RESAMPLE,
        }
        for message, holds in checks.items():
            if not holds:
                raise UsageError(f"Crop plan: {message}; given {self}.")

    @classmethod
    def center(cls, size: int = 224) -> CropPlan:
        """The usual evaluation crop: short side to size * 8/7 (256 for 224), middle cut, no flip."""
        return cls(kind="center", size=size, resize=round(size * 8 / 7), flip_p=0.0)

    def changed(self, kind: str | None, size: int | None, seed: int | None) -> CropPlan:
        """This plan with what is not None changed. Another kind comes with that kind's own settings, and another size of a centre
        crop with another short side before the cut. Raises UsageError for a size that no crop is made of.
        """
        if size is not None and not LEAST_SIZE <= size <= LARGEST_SIZE:
            raise UsageError(f"Crops of {size} pixels: a side of {LEAST_SIZE} to {LARGEST_SIZE} pixels can be made.")
        kind, size, seed = kind or self.kind, size or self.size, self.seed if seed is None else seed
        if kind == "center" and (kind, size) != (self.kind, self.size):
            return dataclasses.replace(CropPlan.center(size), seed=seed)
        return dataclasses.replace(self if self.kind == kind else CropPlan(), size=size, seed=seed)

    @property
    def version(self) -> int:
        """The oldest format version of caches that has words for this plan: version 1 wants `resize` >= `size` of every kind."""
        return 1 if self.resize >= self.size else 2

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "scale": list(self.scale), "ratio": list(self.ratio)}


@dataclass(frozen=True)
class Crop:
    """One drawn crop, in pixels of the upright original."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[float, float, float] = (1.0, 1.0, 1.0)
    jitter_order: tuple[int, int, int] = (0, 1, 2)


def _uniforms(seed: int, name: str, view: int, n: int) -> np.ndarray:
    """`n` doubles in [0, 1), from Philox keyed by (seed, image name) with the view as its counter.

    Raw 64-bit output is used, not numpy's distributions: Philox is fixed by its paper (Salmon et al. 2011), the
    distributions may change with numpy's version.
    """
    name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    # the counter is 256 bits wide; views are 2**64 steps apart, so their streams never meet
    stream = np.random.Philox(key=np.array([seed, name_key], "uint64"), counter=np.array([0, view, 0, 0], "uint64"))
    return (stream.random_raw(n) >> np.uint64(11)) * 2.0**-53


def draw(plan: CropPlan, name: str, view: int, height: int, width: int) -> Crop:
    """The crop of image `name` in `view`, for an upright original of `height` x `width` pixels.

    The box follows torchvision's RandomResizedCrop: ten tries at area and log-aspect, then the largest centred box.
    """
    if plan.kind == "center":
        return Crop(0, 0, height, width, False)
    u = _uniforms(plan.seed, name, view, 48)
    tries, place, rest = u[:20].reshape(10, 2), u[20:40].reshape(10, 2), u[40:]

    log_low, log_high = math.log(plan.ratio[0]), math.log(plan.ratio[1])
    for (u_area, u_ratio), (u_top, u_left) in zip(tries, place, strict=True):
        area = height * width * (plan.scale[0] + u_area * (plan.scale[1] - plan.scale[0]))
        aspect = math.exp(log_low + u_ratio * (log_high - log_low))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(u_top * (height - box_height + 1)), int(u_left * (width - box_width + 1))
            break
    else:
        box_height = min(height, max(1, round(width / plan.ratio[0])))
        box_width = min(width, max(1, round(height * plan.ratio[1])))
        top, left = (height - box_height) // 2, (width - box_width) // 2

    jitter, order = (1.0, 1.0, 1.0), (0, 1, 2)
    if plan.jitter:
        jitter = tuple(float(np.float32(1 + plan.jitter * (2 * x - 1))) for x in rest[1:4])
        order = tuple(int(i) for i in np.argsort(rest[4:7], kind="stable"))
    return Crop(top, left, box_height, box_width, bool(rest[0] < plan.flip_p), jitter, order)


def cut(plan: CropPlan, image: Image.Image, crop: Crop) -> Image.Image:
    """The pixels of `crop`: jitter of the whole image, box, resampling to the plan's size, flip. RGB in, RGB out.

    Jitter comes first because contrast depends on the mean of the whole image (CAE v2's order). The box is cut out before
    it is resampled, as torchvision does, so that no pixel outside of it bleeds in.
    Raises BadInputError for an image so narrow that a centre crop would need gigabytes.
    """
    for index in crop.jitter_order:
        if crop.jitter[index] != 1.0:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
            image = enhance(image).enhance(crop.jitter[index])

    resample = RESAMPLE[plan.resample]
    if plan.kind == "center":
        resized = tuple(int(plan.resize * side / min(image.size)) for side in image.size)
        if math.prod(resized) > Image.MAX_IMAGE_PIXELS:
            raise BadInputError(f"{image.width} x {image.height} pixels are too narrow for a short side of {plan.resize}.")
        left, top = (round((side - plan.size) / 2) for side in resized)  # torchvision's rounding, half to even
        return image.resize(resized, resample).crop((left, top, left + plan.size, top + plan.size))

    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    image = image.crop(box).resize((plan.size, plan.size), resample)
    return ImageOps.mirror(image) if crop.flip else image


def load_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file's bytes to upright 8-bit RGB, or raise BadInputError with the reason.

    EXIF orientation is applied. Grey, palette, CMYK and 16-bit images are converted, alpha is dropped, of an animation the
    first frame is taken. Pixels of 32 bits are refused: whether white is 1, 255 or something else, no file says.
    """
    try:
        with of_image(name), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            is_16_bit = image.mode.startswith("I;16") or image.mode == "I" and image.format == "PPM"
            upright = ImageOps.exif_transpose(image)
            if is_16_bit:
                upright = Image.fromarray((np.asarray(upright, "float64") * (255 / 65535) + 0.5).astype("uint8"))
            if upright.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no agreed range. Save it with 8 or 16 bits")
            if upright.mode == "P":
                upright = upright.convert("RGBA")  # Pillow warns of every palette with alpha that goes straight to RGB
            return upright.convert("RGB")
    except UnidentifiedImageError as error:  # its own text holds an address
        raise BadInputError(f"{name}: none of the formats {', '.join(FORMATS)}, or damaged at its beginning") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise BadInputError(
            f"{name}: {error}. Images of more than {most:,} pixels are not decoded; put a smaller copy in its place"
        ) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on malformed files
        raise BadInputError(f"{name}: {type(error).__name__}: {error}") from error


def encode(image: Image.Image, crop_format: str) -> bytes:
    """The stored bytes of a cut crop: a JPEG (4:4:4) or plain RGB rows."""
    quality = CROP_FORMATS[crop_format]
    if quality is None:
        return image.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
