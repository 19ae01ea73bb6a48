"""FFCV's decoder of crops, libjpeg-turbo with the fast DCT: where it is, and one crop decoded by it without compiled loops."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..files.durable import crc32c
from .codes import BAD_CRC, BAD_JPEG, BAD_SIZE, OK


def _ffcv_library() -> ctypes.CDLL:
    """FFCV's compiled part alone: importing the package takes seconds, and torch."""
    package = find_spec("ffcv")
    if package is None:
        raise ModuleNotFoundError("No module named 'ffcv'", name="ffcv")
    (library,) = Path(package.submodule_search_locations[0]).glob("_libffcv*.so")
    return ctypes.CDLL(str(library))


library = _ffcv_library()
DECODER = library._name
"""Path of the library that decodes crops."""
_imdecode = library["imdecode"]  # by item: a function object of our own, whose types nobody else sets
_imdecode.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, *[ctypes.c_uint32] * 8]
_imdecode.restype = ctypes.c_int


def decode(data: np.ndarray, crc: int, is_jpeg: bool, out: np.ndarray) -> int:
    """Check and decode one encoded crop (uint8 [n_bytes]) into `out` (uint8 [size, size, 3], RGB); returns a code.

    The same as `loops.decode_one` to the bit, for a few crops: loading the loops takes longer than decoding hundreds.
    """
    height, width = out.shape[:2]
    if crc32c(data) != crc:
        return BAD_CRC
    if is_jpeg:  # the trailing arguments are the height and width of the cut, its offset, scale 1/1, no crop, no flip
        code = _imdecode(data.ctypes.data, len(data), height, width, out.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)
        return OK if code == 0 else BAD_JPEG
    if len(data) != out.size:
        return BAD_SIZE
    out.reshape(-1)[:] = data
    return OK
