"""What a store was made with, beside what was asked of it: software, device, batches. On record, and no part of its identity.

None of it makes another teacher, but each may move the last bit of a number; so a note is given where a store is continued with
something else. This is no promise that nothing else matters.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from functools import cache
from pathlib import Path

from ..device import device_name
from ..format.spec import MadeWith

PACKAGES = ("torch", "timm", "open_clip_torch", "numpy", "pillow", "zarr", "numcodecs", "ffcv")


def software() -> dict[str, str]:
    """Versions of what is installed of all that a teacher's output depends on, the decoder of crops among them."""
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {"python": platform.python_version(), **versions, "jpeg_decoder": jpeg_decoder()}


def _version(package: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def jpeg_decoder() -> str:
    """Which library FFCV decodes JPEGs with, e.g. `libjpeg-turbo 2.1.5 (build 20230203)`: it says so itself.

    It is the system's (never Pillow's, which brings its own), so no package knows its version, and it has no call that tells it.
    """
    from ..kernels.decoder import DECODER  # loads it

    loaded = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "turbojpeg" in line}
    for path in [*sorted(loaded), DECODER]:  # the latter if it was linked into FFCV itself
        try:
            found = re.search(rb"libjpeg-turbo version ([0-9][\w.]* \(build \w+\))", Path(path).read_bytes())
        except OSError:
            continue  # replaced by an update since it was loaded
        if found:
            return f"libjpeg-turbo {found[1].decode()}"
    return "unknown"


def made_with(teacher, batch_size: int) -> MadeWith:
    """How this process runs a teacher (teachers.base.Teacher)."""
    return MadeWith(batch_size, bool(teacher.is_compiled), device_name(teacher.device))


def changes(then: tuple[dict, MadeWith | None], now: tuple[dict, MadeWith | None]) -> list[str]:
    """`torch: 2.5.0 then, 2.6.0 now` for all that two records both say and that differs. Each: software, and how it was run."""
    a, b = ({**software, **(made.to_json() if made else {})} for software, made in (then, now))
    return [f"{name}: {a[name]} then, {b[name]} now" for name in a if name in b and a[name] != b[name]]
