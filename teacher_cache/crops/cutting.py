"""How crops are drawn and cut. A crop is a pure function of (plan, image name, view): any worker, in any order, on any
machine, draws the same box, flip and jitter. Pillow does the pixels, in the order the papers do them.

Gives up: colour jitter of hue (no method here uses it), and any augmentation that is not baked into the crop.
"""

from __future__ import annotations

import hashlib
import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import BadInputError
from ..format.crop_plan import CROP_FORMATS, Crop, CropPlan
from ..terminal.image_warnings import of_image

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""As Pillow calls those of a crop plan."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
"""What is decoded, whatever the file is called. Others are seldom meant, and Pillow hands some to outside programs (EPS)."""

TEXT_BYTES = 64 << 20
"""Of text and profiles in a PNG, unpacked. Pillow refuses a picture for one text of more than 1 MiB, as image generators and
editors write them (prompts, histories); its bound on all texts of a file together is this one."""
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = TEXT_BYTES  # for the whole process: Pillow has no other way


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
