"""The presets: one function each, named like the preset, in the file of its paper. `recipe(name)` finds it."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from teacher_cache.errors import UnknownNameError

from ..recipe import Recipe
from .mae import mae_b16, mae_demo, mae_s16
from .maskalign import maskalign_b16, maskalign_demo
from .mr_mae import mr_mae_b16, mr_mae_demo

PRESETS: dict[str, Callable[[], Recipe]] = {
    function.__name__.replace("_", "-"): function
    for function in (mae_s16, mae_b16, mr_mae_b16, maskalign_b16, mae_demo, mr_mae_demo, maskalign_demo)
}


def recipe(name: str) -> Recipe:
    """The recipe of a preset; UnknownNameError lists the known ones."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UnknownNameError(f"There is no preset {name!r}.{hint} Known: {', '.join(PRESETS)}.")
    return PRESETS[name]()
