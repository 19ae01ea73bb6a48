"""Is it the same run? Two descriptions of a configuration or of data, compared, and their differences in words."""

from __future__ import annotations

import json
import re
import reprlib

from ..config import TrainConfig
from ..devices.micro_batches import takes_statistics
from ..errors import RunMismatchError

WORDS = {
    "crops_id": "crops",
    "order": "order of the rows",
    "store": "targets",
    "live": "teacher run on the spot",
    "weights_sha256": "weights of the teacher",
    "probe_sha256": "output of the teacher on the probe image",
    "shared_sha256": "quantiser of the targets",
    "dtype": "dtype of the targets",
}
"""What people call the values of a data source's identity; all others go by their own names."""


def require_same_config(holder: str, there: dict, given: TrainConfig) -> None:
    """`require_same` of configurations, for what a run depends on: not on how its steps are cut up.

    there: what TrainConfig.to_json gave, by this version or an older one, or any other JSON object.
    """
    there, given_json = TrainConfig.completed(there), given.to_json()
    if not takes_statistics(given):
        there, given_json = ({**config, "accumulate": given.accumulate} for config in (there, given_json))
    require_same(holder, "configuration", there, given_json)


def require_same(holder: str, what: str, there: dict, given: dict) -> None:
    """RunMismatchError that names both sides of every value in which two JSON objects differ.

    holder: whose values `there` are, as the start of a sentence.  what: "configuration" or "data".
    """
    differing = difference_lines(there, json.loads(json.dumps(given)))
    if differing:
        other = "other data" if what == "data" else f"another {what}"
        raise RunMismatchError(
            f"{holder} belongs to a run with {other}:\n  " + "\n  ".join(differing) +
            "\nGo on with what it was begun with, or start a new run in another directory." +
            ("" if what == "data" else " Under way, --change KEY=VALUE changes optim.* and weights of losses.")
        )  # fmt: skip


def difference_lines(there: dict, given: dict, name: str = "") -> list[str]:
    """A line for each value that differs: `weights of the teacher: sha256 ab12cd34ef56 in the run, sha256 98... given`.

    `there` comes from a file and may be any JSON; it is followed no deeper than `given`, which is ours, goes.
    """
    lines = []
    for key in sorted(there.keys() | given.keys()):
        one, two = there.get(key), given.get(key)
        label = name + WORDS.get(key, _text(key))
        if one == two:
            continue
        if key == "views" and isinstance(one, list) and isinstance(two, list):
            lines += _views(one, two)
        elif isinstance(one, dict) and isinstance(two, dict):
            lines += difference_lines(one, two, f"{label}.")
        elif isinstance(one, list) and isinstance(two, list) and any(isinstance(item, dict) for item in two):
            lines += difference_lines(_numbered(one), _numbered(two), f"{label}.")
        else:
            lines.append(f"{label}: {_text(one)} in the run, {_text(two)} given")
    return lines


def _views(one: list, two: list) -> list[str]:
    """Views are named by the sha256 of their crops, in order."""
    if len(one) != len(two):
        return [f"views: {len(one)} in the run, {len(two)} given"]
    return difference_lines(_numbered(one, "crops of view "), _numbered(two, "crops of view "))


def _numbered(items: list, prefix: str = "") -> dict:
    return {f"{prefix}{index}": item for index, item in enumerate(items)}


def _text(value) -> str:
    """A JSON value for people: short, and nothing in it that a terminal would obey."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return ",".join(map(_text, value[:20])) + ",..." * (len(value) > 20)
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"sha256 {value[:12]}"
    if isinstance(value, str) and len(value) <= 80 and value.isprintable():
        return value
    return reprlib.repr(value)[:80]
