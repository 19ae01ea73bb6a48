"""Rows for which a teacher gives something that is no number: its batch is run again as it was, then such rows in fp32.

One crop of a million may be enough for a block of a large teacher to overflow in bf16. Each such row is run alone, so that what
it becomes depends on nothing but its crop; the store keeps on record which rows these are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..errors import BadInputError
from ..format.spec import most_fp32_rows
from .commits import NO_ROWS


def finite_rows(output):
    """bool tensor [B]: for which rows a teacher's output (teachers.base.TeacherOutput) is finite."""
    finite = output.tokens.isfinite().flatten(1).all(1)
    return finite if output.attention is None else finite & output.attention.isfinite().all(1)


def finite_output(teacher, images, rows: np.ndarray, layers, name_of: Callable[[int], str], forced: np.ndarray = NO_ROWS):
    """A teacher's output for a batch, all finite, and which of `rows` were made in fp32 for that, ascending.

    images: uint8 [B, side, side, 3] on the teacher's device. name_of: the image of a row. forced: rows, of these or others, that
    a bf16 teacher runs in fp32 whatever it says: those that were so before.
    Raises BadInputError, with row and image, if not even fp32 gives numbers.
    """
    output = teacher(images, layers)
    if finite_rows(output).all() and not np.isin(rows, forced).any():
        return output, NO_ROWS
    return rerun(teacher, images, rows, layers, name_of, forced)


def rerun(teacher, images, rows: np.ndarray, layers, name_of: Callable[[int], str], forced: np.ndarray = NO_ROWS):
    """`finite_output` of a batch that has been run already, and in which something was not finite or is forced."""
    output = teacher(images, layers)
    broken = ~finite_rows(output).cpu().numpy()
    if teacher.precision == "fp32":
        if broken.any():
            raise _error(teacher, rows, broken, name_of)
        return output, NO_ROWS
    broken |= np.isin(rows, forced)
    tokens, attention = output.tokens.clone(), None if output.attention is None else output.attention.clone()
    still = np.zeros(len(rows), bool)
    for place in np.flatnonzero(broken).tolist():
        alone = teacher(images[place : place + 1], layers, precision="fp32")
        still[place] = not finite_rows(alone).all()
        tokens[place] = alone.tokens[0]
        if attention is not None:
            attention[place] = alone.attention[0]
    if still.any():
        raise _error(teacher, rows, still, name_of)
    return replace(output, tokens=tokens, attention=attention), rows[broken].astype("int64")


def _error(teacher, rows: np.ndarray, broken: np.ndarray, name_of: Callable[[int], str]) -> BadInputError:
    row = int(rows[broken][0])
    return BadInputError(
        f"{teacher.spec.name} gives non-finite values in fp32 for row {row}, {name_of(row)} ({broken.sum()} of {len(rows)} rows "
        f"of its batch). Its weights {teacher.spec.weights} may be damaged: compare their SHA-256 with the publisher's, it is "
        f"{teacher.spec.weights_sha256}. Or leave the image out: move it out of the folder of images, and make a new cache in "
        "another folder."
    )


def require_few(fp32_rows: int, n_rows: int, what: str, teacher_name: str, advice: str) -> None:
    """Raise BadInputError if more of `n_rows` rows had to be made in fp32 than a store may have."""
    if fp32_rows > most_fp32_rows(n_rows):
        raise BadInputError(
            f"{teacher_name} gives non-finite values in bf16 for {fp32_rows:,} of the {n_rows:,} rows of {what}, more than "
            f"{most_fp32_rows(n_rows):,}: bf16 is wrong for this teacher. {advice}"
        )
