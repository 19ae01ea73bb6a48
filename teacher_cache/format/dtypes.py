"""What `--dtype` can be, and how it is spelled."""

from __future__ import annotations

import re

from ..errors import UsageError

PLAIN = ("float16", "int8", "int4")
DTYPES = (*PLAIN, "klt:BITS")
"""klt: coded by a transform (transform.py), BITS a value on average, from 1 to 6."""
DEFAULT_KLT = "klt:3.2"
"""What `klt` alone means."""


def klt_bits(dtype: str) -> float | None:
    """BITS of `klt:BITS`; None of any other dtype. UsageError for a number that is none, or not from 1 to 6."""
    if dtype.partition(":")[0] != "klt":
        return None
    found = re.fullmatch(r"klt:([1-6](?:\.[0-9]{1,2})?)", dtype)
    if found is None or float(found[1]) > 6:
        raise UsageError(f"dtype {dtype}: give klt:BITS, bits a value from 1 to 6 with at most two decimals, such as klt:3.2.")
    return float(found[1])


def dtype_of(text: str) -> str:
    """A dtype as it was given, in the one spelling that stores have: klt is klt:3.2, and klt:3.0 is klt:3."""
    if text in PLAIN:
        return text
    bits = klt_bits(DEFAULT_KLT if text == "klt" else text)
    if bits is None:
        raise UsageError(f"dtype is one of {', '.join(DTYPES)}; given {text}.")
    return f"klt:{bits:g}"
