"""A table, metrics.csv in the run: a row a step, a column a value, empty where a step has none."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from typing import ClassVar

from ..files.run_files import aside, publish, require_own
from .follow import Ended, RunToLog
from .rows import Row

FILE = "metrics.csv"


class ToCsv:
    """Written anew from metrics.jsonl when a run goes on."""

    name: ClassVar[str] = "csv"

    def __init__(self, run: RunToLog):
        self._path = run.folder / FILE
        self._columns: list[str] = []

    @staticmethod
    def require() -> None:
        """Needs nothing."""

    def open(self) -> int:
        require_own(self._path)
        self._columns = ["step", "epoch"]
        self._rewrite([])
        return -1

    def add(self, rows: Sequence[Row]) -> None:
        new = dict.fromkeys(name for row in rows for name in row.values if name not in self._columns)
        if new:
            self._columns += new
            with open(self._path, newline="") as file:
                self._rewrite(csv.DictReader(file))
        with open(self._path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerows({"step": row.step, "epoch": row.epoch, **row.values} for row in rows)

    def _rewrite(self, rows: Iterable[dict]) -> None:
        with open(aside(self._path), "x", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        publish(self._path)

    def close(self, ended: Ended) -> None:
        """Nothing is open."""

    def where(self) -> str:
        return str(self._path)
