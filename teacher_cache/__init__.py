"""Run a frozen vision teacher once over baked crops; keep its tokens and attention in a compressed zarr store."""

import sys

if sys.byteorder != "little":
    raise ImportError(
        "teacher-cache works on little-endian machines only: a cache holds little-endian numbers, which compiled loops read "
        f"as they lie. This one is {sys.byteorder}-endian. Read its arrays with zarr there (docs/format.md)."
    )
