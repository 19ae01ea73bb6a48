"""float32 that is float32: for a while, no matrix product and no convolution of this process rounds its inputs.

cuDNN's convolutions, a patch embedding among them, use TF32 unless told otherwise, matrix products if told so, and both keep 10
bits of 23; oneDNN on a CPU may be told to use bfloat16. A cache should not depend on what else its process wants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import backends

_MATMULS_AND_CONVOLUTIONS = (
    (backends.cuda.matmul, backends),
    (backends.cudnn.conv, backends.cudnn),
    (backends.mkldnn.matmul, backends.mkldnn),
    (backends.mkldnn.conv, backends.mkldnn),
)
"""Where torch keeps the precision of an operation, and of what it follows while its own is "none"."""


@contextmanager
def full_float32() -> Iterator[None]:
    """TF32 and bfloat16 are off inside for float32 operations; afterwards the process's settings are what they were.

    By torch's `fp32_precision` alone, which works whether the process has used that, the older `allow_tf32` and
    `set_float32_matmul_precision`, or both; reading the older ones where the newer were used is an error, so they are not read.
    """
    before = [operation.fp32_precision for operation, _ in _MATMULS_AND_CONVOLUTIONS]
    for operation, _ in _MATMULS_AND_CONVOLUTIONS:
        operation.fp32_precision = "ieee"
    try:
        yield
    finally:
        for (operation, followed), precision in zip(_MATMULS_AND_CONVOLUTIONS, before, strict=True):
            operation.fp32_precision = "none"
            if operation.fp32_precision != precision or followed.fp32_precision == "none":
                operation.fp32_precision = precision
