"""Image files of many kinds, made from one picture: those that cannot be decoded, and those that can, with the pixels they hold.

The pixels of a valid kind are known because it was made from them, or are found by another way than Pillow (OpenCV, arithmetic).
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from fakes import image_of
from PIL import Image

RGB = np.asarray(image_of(5))
HEIGHT, WIDTH = RGB.shape[:2]
GREY = (RGB.astype("float64") @ [0.3, 0.6, 0.1]).round().astype("uint8")
WIDE = (GREY.astype("uint16") << 8) + np.arange(WIDTH, dtype="uint16") * 3 % 251  # 16 bits, the lower ones not zero
assert HEIGHT != WIDTH


def saved(pixels, format: str, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)).save(buffer, format, **options)
    return buffer.getvalue()


def grey_as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


# --- kinds that cannot be decoded --------------------------------------------------------------------------------------

PNG, JPEG, WEBP, TIFF = (saved(RGB, format) for format in ("PNG", "JPEG", "WEBP", "TIFF"))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, data: bytes = b"", *chunks: bytes) -> bytes:
    """A PNG with 8-bit grey pixels that says it has this size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def flat_rows(width: int, height: int) -> bytes:
    """The compressed rows of a black grey PNG, made without holding them."""
    compressor, row = zlib.compressobj(9), bytes(1 + width)
    return b"".join([*(compressor.compress(row) for _ in range(height)), compressor.flush()])


def with_bytes(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def at(data: bytes, marker: bytes) -> int:
    assert marker in data
    return data.index(marker)


BAD_BYTES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "empty": lambda: ("x.jpg", b""),
    "one byte": lambda: ("x.jpg", b"\xff"),
    "zeros": lambda: ("x.png", bytes(1000)),
    "noise": lambda: ("x.jpg", np.random.default_rng(0).bytes(5000)),
    "text": lambda: ("x.jpg", b"not an image\n" * 20),
    "web page": lambda: ("x.png", b"<!DOCTYPE html><html><body>404</body></html>"),
    "svg": lambda: ("x.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    "pdf": lambda: ("x.jpg", saved(RGB, "PDF")),
    "postscript": lambda: ("x.tif", saved(RGB, "EPS")),
    "icon": lambda: ("x.png", saved(RGB, "ICO")),
    "jpeg 2000": lambda: ("x.jpg", saved(RGB, "JPEG2000")),
    "zip": lambda: ("x.jpg", b"PK\x03\x04" + bytes(300)),
    "jpeg, cut in its pixels": lambda: ("x.jpg", JPEG[: len(JPEG) * 2 // 3]),
    "jpeg, cut in its header": lambda: ("x.jpg", JPEG[:100]),
    "jpeg without its start": lambda: ("x.jpg", JPEG[20:]),
    "jpeg of height 0": lambda: ("x.jpg", with_bytes(JPEG, at(JPEG, b"\xff\xc0") + 5, b"\0\0")),
    "jpeg that says 65535 x 65535": lambda: ("x.jpg", with_bytes(JPEG, at(JPEG, b"\xff\xc0") + 5, b"\xff" * 4)),
    "jpeg without tables": lambda: ("x.jpg", JPEG.replace(b"\xff\xdb", b"\xff\xe9")),
    "png, cut in its pixels": lambda: ("x.png", PNG[: len(PNG) // 2]),
    "png, cut in its header": lambda: ("x.png", PNG[:20]),
    "png with a flipped bit": lambda: ("x.png", with_bytes(PNG, 100, bytes([PNG[100] ^ 1]))),
    "png of width 0": lambda: ("x.png", png_of_size(0, 10, zlib.compress(b""))),
    "png without pixels": lambda: ("x.png", png_of_size(30, 30)),
    "png that says 100000 x 100000": lambda: ("x.png", png_of_size(100_000, 100_000, zlib.compress(bytes(100)))),
    "decompression bomb": lambda: ("x.png", png_of_size(20_000, 20_000, flat_rows(20_000, 20_000))),
    "text bomb": lambda: ("x.png", png_of_size(8, 8, zlib.compress(bytes(72)),
                                               png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 28), 1)))),
    "webp, cut": lambda: ("x.webp", WEBP[: len(WEBP) // 2]),
    "bmp that says -2^31 rows": lambda: ("x.bmp", with_bytes(saved(RGB, "BMP"), 22, struct.pack("<i", -(2**31)))),
    "bmp, cut": lambda: ("x.bmp", saved(RGB, "BMP")[:600]),
    "ppm, cut": lambda: ("x.ppm", saved(RGB, "PPM")[:600]),
    "ppm that says 10^9 x 10^9": lambda: ("x.ppm", b"P6 1000000000 1000000000 255\n"),
    "tiff, cut": lambda: ("x.tif", TIFF[: len(TIFF) // 2]),
    "tiff whose directory is itself": lambda: ("x.tif", b"II*\0" + struct.pack("<I", 8) + struct.pack("<HI", 0, 8)),
    "tiff of 32-bit floats": lambda: ("x.tif", saved(GREY.astype("float32"), "TIFF")),
    "tiff of 32-bit numbers": lambda: ("x.tif", saved(GREY.astype("int32"), "TIFF")),
    "tiff of 3-bit samples": lambda: ("x.tif", TIFF.replace(b"\x08\0\x08\0\x08\0", b"\x03\0\x03\0\x03\0")),
}  # fmt: skip
"""Kind -> file name and bytes."""


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


BAD_ENTRIES: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "link to nowhere": lambda path: path.symlink_to("nowhere.jpg"),
    "link to itself": _loop,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}
"""Kind -> what makes an entry that is called x.jpg."""

BAD = (*BAD_BYTES, *BAD_ENTRIES)


def make_bad(kind: str, folder: Path) -> str:
    """Put a file of this kind into `folder`; returns its name."""
    if kind in BAD_ENTRIES:
        BAD_ENTRIES[kind](folder / "x.jpg")
        return "x.jpg"
    name, data = BAD_BYTES[kind]()
    (folder / name).write_bytes(data)
    return name


# --- kinds that can be decoded -----------------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


TURNED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1], 8: lambda a: a.transpose(1, 0, 2)[::-1],
}  # fmt: skip
"""EXIF orientation -> stored pixels [H, W, 3] as they are meant to be seen."""


def by_opencv(data: bytes) -> np.ndarray:
    """The stored pixels of a JPEG, without EXIF's turn, RGB."""
    return cv2.imdecode(np.frombuffer(data, "u1"), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[..., ::-1]


INK = np.concatenate([255 - RGB, GREY[..., None] // 3], -1)  # CMYK
INK_AS_RGB = ((255.0 - INK[..., :3]) * (255.0 - INK[..., 3:]) / 255).round().astype("uint8")
FRAMES = [Image.fromarray(frame) for frame in (RGB[::-1], 255 - RGB)]
EVEN_PALETTE = Image.fromarray(GREY // 4 * 4).quantize(64)
LINE = np.tile(RGB[:1], (1, 70, 1))[:, :3000]
ALPHA = np.dstack([RGB, np.full((HEIGHT, WIDTH), 9, "uint8")])
GREY_ALPHA = np.dstack([GREY, 255 - GREY])


def _turned(format: str, orientation: int):
    data = saved(RGB, format, exif=exif(orientation), lossless=True)
    return data, TURNED[orientation](RGB), 0


def _turned_jpeg(orientation: int):
    data = saved(RGB, "JPEG", quality=95, subsampling=0, exif=exif(orientation))
    return data, TURNED[orientation](by_opencv(data)), 2


def _jpeg(pixels=RGB, **options):
    data = saved(pixels, "JPEG", quality=95, **options)
    return data, by_opencv(data), 2


def _palette(**options):
    return saved(EVEN_PALETTE, "PNG", **options), grey_as_rgb(np.asarray(EVEN_PALETTE.convert("L"))), 0


def _wide_rgb_png():
    wide = RGB.astype("uint16") * 257
    return cv2.imencode(".png", wide[..., ::-1])[1].tobytes(), RGB, 0


VALID: dict[str, tuple[str, Callable[[], tuple[bytes, np.ndarray, int]]]] = {
    "png": ("x.png", lambda: (PNG, RGB, 0)),
    "png called jpg": ("x.jpg", lambda: (PNG, RGB, 0)),
    "jpeg called png": ("x.png", lambda: _jpeg(subsampling=0)),
    "capital ending": ("X.PNG", lambda: (PNG, RGB, 0)),
    "name in Chinese, with blanks": ("图 片 😀.png", lambda: (PNG, RGB, 0)),
    "name of 255 bytes": ("x" * 251 + ".png", lambda: (PNG, RGB, 0)),
    "data behind the end": ("x.png", lambda: (PNG + bytes(100), RGB, 0)),
    "jpeg": ("x.jpg", lambda: _jpeg(subsampling=0)),
    "jpeg, progressive": ("x.jpg", lambda: _jpeg(subsampling=0, progressive=True)),
    "jpeg, grey": ("x.jpg", lambda: _jpeg(GREY)),
    "jpeg, CMYK": ("x.jpg", lambda: (saved(INK, "JPEG", "CMYK", quality=100, subsampling=0), INK_AS_RGB, 6)),
    "jpeg, turned (EXIF 3)": ("x.jpg", lambda: _turned_jpeg(3)),
    "jpeg, turned (EXIF 6)": ("x.jpg", lambda: _turned_jpeg(6)),
    "jpeg, orientation 9, which there is not": ("x.jpg", lambda: (saved(RGB, "JPEG", exif=exif(9)), by_opencv(JPEG), 2)),
    **{f"png, turned (EXIF {n})": ("x.png", lambda n=n: _turned("PNG", n)) for n in range(2, 9)},
    "webp, turned (EXIF 8)": ("x.webp", lambda: _turned("WEBP", 8)),
    "tiff, turned (tag 6)": ("x.tif", lambda: (saved(RGB, "TIFF", tiffinfo={274: 6}), TURNED[6](RGB), 0)),
    "png, RGBA": ("x.png", lambda: (saved(ALPHA, "PNG"), RGB, 0)),
    "png, palette": ("x.png", _palette),
    "png, palette with a transparent colour": ("x.png", lambda: _palette(transparency=3)),
    "png, grey": ("x.png", lambda: (saved(GREY, "PNG"), grey_as_rgb(GREY), 0)),
    "png, grey with alpha": ("x.png", lambda: (saved(GREY_ALPHA, "PNG", "LA"), grey_as_rgb(GREY), 0)),
    "png, 1 bit": ("x.png", lambda: (saved(GREY > 99, "PNG"), grey_as_rgb((GREY > 99) * np.uint8(255)), 0)),
    "png, 16-bit grey": ("x.png", lambda: (saved(WIDE, "PNG"), grey_as_rgb((WIDE / 257 + 0.5).astype("u1")), 0)),
    "png, 16-bit RGB": ("x.png", _wide_rgb_png),
    "png, animated": ("x.png", lambda: (saved(RGB, "PNG", save_all=True, append_images=FRAMES), RGB, 0)),
    "webp, lossless": ("x.webp", lambda: (saved(RGB, "WEBP", lossless=True), RGB, 0)),
    "webp, animated": ("x.webp", lambda: (saved(RGB, "WEBP", lossless=True, save_all=True, append_images=FRAMES), RGB, 0)),
    "tiff, several pages": ("x.tiff", lambda: (saved(RGB, "TIFF", save_all=True, append_images=FRAMES), RGB, 0)),
    "tiff, LZW": ("x.tif", lambda: (saved(RGB, "TIFF", compression="tiff_lzw"), RGB, 0)),
    "tiff, CMYK": ("x.tif", lambda: (saved(INK, "TIFF", "CMYK"), INK_AS_RGB, 1)),
    "tiff, 16-bit grey": ("x.tif", lambda: (saved(WIDE, "TIFF"), grey_as_rgb((WIDE / 257 + 0.5).astype("u1")), 0)),
    "bmp": ("x.bmp", lambda: (saved(RGB, "BMP"), RGB, 0)),
    "ppm": ("x.ppm", lambda: (saved(RGB, "PPM"), RGB, 0)),
    "ppm, 16-bit grey": ("x.pgm", lambda: (cv2.imencode(".pgm", WIDE)[1].tobytes(),
                                           grey_as_rgb((WIDE / 257 + 0.5).astype("u1")), 0)),
    "1 x 1": ("x.png", lambda: (saved(RGB[:1, :1], "PNG"), RGB[:1, :1], 0)),
    "3000 x 1": ("x.png", lambda: (saved(LINE, "PNG"), LINE, 0)),
    "gif called jpg": ("x.jpg", lambda: (saved(EVEN_PALETTE, "GIF"), grey_as_rgb(np.asarray(EVEN_PALETTE.convert("L"))), 0)),
    "95 million pixels": ("x.png", lambda: (png_of_size(10_000, 9_500, flat_rows(10_000, 9_500)),
                                            np.zeros((9_500, 10_000, 3), "u1"), 0)),
}  # fmt: skip
"""Kind -> file name, and what makes its bytes, the upright RGB pixels [H, W, 3] in it, and how far a level may be off."""
