"""What reading a row comes to: a code where no exception can be raised, and the error that a code becomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import CacheCorruptError, CropNotCachedError

OK, BAD_CRC, BAD_JPEG, BAD_SIZE, MISSING, CUT_SHORT, NOT_OPEN = range(7)
"""BAD_SIZE also covers a shard index that points outside of its file."""


def check_crops(errors: np.ndarray, rows: np.ndarray, path: Path) -> None:
    """Raise CacheCorruptError for the first crop that failed, if any did."""
    for i in np.flatnonzero(errors)[:1]:
        reason = {BAD_CRC: "its CRC-32C does not fit", BAD_JPEG: "the JPEG decoder refuses it", BAD_SIZE: "its size is wrong"}
        raise CacheCorruptError(
            f"{path}: the crop of row {rows[i]} is damaged ({reason[int(errors[i])]}); {np.count_nonzero(errors)} of the "
            f"{len(rows)} rows read. Run teacher-cache verify on this cache."
        )


def check_rows(errors: np.ndarray, rows: np.ndarray, path: Path) -> None:
    """Raise for the first row of an array that failed, if any did: CropNotCachedError or CacheCorruptError."""
    for i in np.flatnonzero(errors)[:1]:
        assert errors[i] != NOT_OPEN, f"{path}: the shard of row {rows[i]} was not opened"
        if errors[i] == MISSING:
            raise CropNotCachedError(f"{path}: row {rows[i]} was never extracted. Run teacher-cache extract to finish the store.")
        reason = {BAD_CRC: "its CRC-32C does not fit", BAD_SIZE: "the shard's index is wrong",
                  CUT_SHORT: "its shard was cut short, or its disk failed, while it was read"}  # fmt: skip
        raise CacheCorruptError(
            f"{path}: row {rows[i]} is damaged ({reason[int(errors[i])]}). Run teacher-cache verify on this cache."
        )
