"""What loggers are given: metrics.jsonl, read behind where it was read to, all that is said of a step in one row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..files.logs import LONGEST_LINE, read_line


@dataclass(frozen=True)
class Row:
    """One step, by the names that loggers use."""

    step: int
    epoch: float
    values: dict[str, float]


def values_of(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl by the names that loggers use. A slash stands once: MLflow takes the rest for folders."""
    if "probe" in line:
        probe = line["probe"]
        named = {f"val/{probe['name']}_{name.replace('/', '_')}": value for name, value in probe["values"].items()}
        return {f"val/{probe['name']}": probe["values"][probe["main"]], **named}
    values = {f"train/{name}": line[name] for name in ("loss", "lr", "images_per_s", "wait_share")}
    return values | {f"train/{name.replace('/', '_')}": value for name, value in line["parts"].items()}


def _row_of(line: bytes) -> Row | None:
    """What one line says of its step; None if it is no line of ours."""
    try:
        found = read_line(line)
        return found and Row(found["step"], found["epoch"], values_of(found))
    except (KeyError, TypeError, AttributeError):
        return None


class Rows:
    """Reads `metrics` on and on while it grows. A copy reads on by itself."""

    def __init__(self, metrics: Path):
        self._metrics, self._offset = metrics, 0
        self._held: Row | None = None

    def read(self, most: int, whole: bool) -> list[Row]:
        """The next rows, about `most` of them. The newest one is held back, because more may be said of its step, unless `whole`
        and the file is at its end.
        """
        rows = []
        with open(self._metrics, "rb") as file:
            file.seek(self._offset)
            while len(rows) < most and (line := file.readline(LONGEST_LINE)):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    break  # it is being written
                self._offset += len(line)
                if (row := _row_of(line)) is None:
                    continue
                if self._held and self._held.step == row.step:
                    self._held = replace(self._held, values=self._held.values | row.values)
                else:
                    rows += [self._held] if self._held else []
                    self._held = row
        if whole and len(rows) < most and self._held:
            rows.append(self._held)
            self._held = None
        return rows
