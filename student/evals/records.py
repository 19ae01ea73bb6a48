"""Results on record: a JSON line each, which says all that a figure depends on; and tables of figures that can be compared.

evaluator, protocol   which one; how, with every setting
what, about, weights  as it was asked for; in words; SHA-256 of architecture and weights
readout, layer        which token, or the mean of the patches; of which layer
image_size, decoder, precision
data                  {"train": of the images, "val": the same}, each {"fingerprint", "images", "name"}; and "classes"
share, seeds          of the training images; those that were taken
main                  name of the result that tables rank by
numbers               names of results that are no shares of 1
results               {name: {"mean", "deviation" (of the seeds, n - 1; null for one), "values"}}
seconds, made_by      how long it took; versions
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import RunError

FORMAT = 1
NEEDED = ("evaluator", "protocol", "what", "weights", "readout", "layer", "data", "share", "seeds", "main", "results")
LEFT_OUT = "at "
"""Beginning of the names of results that tables do not show: each rate of a grid."""


def summed_up(by_seed: Sequence[dict[str, float]]) -> dict[str, dict]:
    """{name: {"mean", "deviation", "values"}} of the results of all seeds; a name that some lack is of the others."""
    names = list(dict.fromkeys(name for values in by_seed for name in values))
    found = {}
    for name in names:
        values = [results[name] for results in by_seed if name in results]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {"mean": statistics.fmean(values), "deviation": deviation, "values": values}
    return found


def append(path: Path, records: Iterable[dict]) -> None:
    """Add a line for each record, all at once or none, durably. Raises OSError if it cannot be written."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell() and _last_byte(path) != b"\n":
            lines = b"\n" + lines  # a line that was cut short stays one of its own
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def read(path: Path) -> list[dict]:
    """The records of a file. Raises RunError, with the line, for what is none."""
    found = []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise RunError(f"{path} cannot be read as records ({error.strerror}). Give a file that --record has written.") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no file of records: it is not text. Give a file that --record has written.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
            if missing := [name for name in NEEDED if name not in record]:
                raise ValueError(f"it lacks {missing[0]!r}")
            float(record["results"][record["main"]]["mean"])
            record["data"]["val"]["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{path}: line {number} is no record of student-eval ({error}). Delete that line.") from error
        found.append(record)
    return found


def groups(records: Iterable[dict]) -> list[list[dict]]:
    """Records that can be ranked against each other: of one protocol, layer, share, number of seeds and data; the best first.

    Of several of the same weights and readout in a group, the last counts.
    """
    found: dict[tuple, dict[tuple, dict]] = {}
    for record in records:
        data = record["data"]
        prints = tuple((data.get(side) or {}).get("fingerprint") for side in ("train", "val"))
        key = (record["evaluator"], record["protocol"], record["layer"], record["share"], len(record["seeds"]), prints)
        found.setdefault(key, {})[record["weights"], record["readout"], record["what"]] = record
    return [sorted(group.values(), key=_rank) for group in found.values()]


def _rank(record: dict) -> tuple:
    value = record["results"][record["main"]]["mean"]
    return (math.isnan(value), -value, record["what"], record["readout"])


def title(group: Sequence[dict]) -> str:
    """What the records of a group have in common."""
    first = group[0]
    data, n = first["data"], len(first["seeds"])
    sides = [f"{side} {data[side]['name']} ({data[side]['images']:,})" for side in ("train", "val") if data.get(side)]
    extra = f", {first['share']:.3%} of train".replace(".000%", "%") if first["share"] != 1 else ""
    return f"{first['protocol']}\n{', '.join(sides)}{extra}{f', {n} seeds' if n > 1 else ''}"


def columns(group: Sequence[dict]) -> list[str]:
    """Names of the results that a table of the group shows."""
    names = dict.fromkeys(name for record in group for name in record["results"])
    return [name for name in names if not name.startswith(LEFT_OUT)]


def cell(record: dict, name: str) -> str:
    """A result as text: `94.9%`, `94.9% ± 0.3`, `0.05`; empty where there is none."""
    result = record["results"].get(name)
    if result is None:
        return ""
    if name in record.get("numbers", ()):
        return f"{result['mean']:.4g}"
    spread = "" if result["deviation"] is None else f" ± {100 * result['deviation']:.1f}"
    return f"{result['mean']:.1%}{spread}"
