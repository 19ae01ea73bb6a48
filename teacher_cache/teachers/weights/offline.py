"""Weights that timm or open_clip would download, where the environment says that nothing may be.

`HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` are the Hugging Face hub's; timm and open_clip fetch some files from plain addresses
as well, which know neither. Here both hold for both: what is in the local caches loads, all else is one sentence at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from ...errors import BadInputError

VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""In the order in which huggingface_hub looks at them; the first that is not empty counts."""

Result = TypeVar("Result")


def offline_setting() -> str | None:
    """`HF_HUB_OFFLINE=1`, as it is set; None where downloading is allowed."""
    name = next((name for name in VARIABLES if os.environ.get(name)), None)
    is_set = name is not None and os.environ[name].upper() in constants.ENV_VARS_TRUE_VALUES
    return f"{name}={os.environ[name]}" if is_set else None


def downloaded(name: str, what: str, advice: str, fetch: Callable[[], Result], cached_at: Path | None = None) -> Result:
    """What `fetch` gives, or BadInputError saying why there are no weights and what to do.

    what:      which file it is and where it comes from, for people
    advice:    which file to pass as `--weights`, for people
    cached_at: for a file from a plain address, where it would be if it had been fetched before
    """
    setting = offline_setting()
    missing = (
        f"The weights of {name} are not here, and {setting} forbids to download them. Pass --weights PATH with {what}, "
        f"or {advice}; for a trial without one: --weights random:0."
    )
    if setting and cached_at is not None and not cached_at.is_file():
        raise BadInputError(missing)
    try:
        with _hub_offline(setting is not None):
            return fetch()
    except Exception as error:  # each source has its own exceptions for no network, no file, no access
        if setting and cached_at is None:
            raise BadInputError(missing) from error
        if _is_gated(error):
            raise BadInputError(
                f"The weights of {name} are gated: {what} is given only to accounts that its owner has let in. Ask for that "
                f"on its page there and log in (hf auth login), or pass --weights PATH with it, or {advice}; for a trial without "
                "one: --weights random:0."
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInputError(
            f"The weights of {name} could not be downloaded ({reason}). Fetch {what} on a machine with network and pass "
            f"--weights PATH, or {advice}; for a trial without one: --weights random:0."
        ) from error


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub refused a file for want of rights; libraries raise errors of their own from its."""
    while error is not None and not isinstance(error, GatedRepoError):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Tell the hub, which looked at the environment when it was imported and not since."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
