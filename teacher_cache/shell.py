"""Commands that messages suggest: what they name is quoted, so that they can be pasted as they stand."""

from __future__ import annotations

import shlex


def quoted(word: object) -> str:
    """A path or another word as a shell takes it for one: `'my cache'`."""
    return shlex.quote(str(word))
