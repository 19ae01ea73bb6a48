"""What crops.npy says of each crop of a view."""

from __future__ import annotations

import numpy as np

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
