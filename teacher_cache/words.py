"""Values as messages show them: paths that can be pasted into a shell, bytes that can be read."""

from __future__ import annotations

import shlex


def quoted(word: object) -> str:
    """A path or another word as a shell takes it for one: `'my cache'`."""
    return shlex.quote(str(word))


def human(n_bytes: float) -> str:
    """1234567 -> `1.23 MB` (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n_bytes) < 999.5 or unit == "TB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")
