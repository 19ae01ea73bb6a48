"""Means, spread over seeds, and when a difference counts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DEVIATIONS = 2.0
"""A difference of means below so many pooled standard deviations is no ordering."""


@dataclass(frozen=True)
class Values:
    """Results of one cell over its seeds, shares of 1."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = f" ± {100 * self.deviation:.1f}" if self.deviation is not None else " (1 seed)"
        return f"{100 * self.mean:.1f}{spread}"


def pooled_deviation(cells: Iterable[Values]) -> float | None:
    """One standard deviation for all cells of a table: the square root of their variances' mean, weighted by n - 1; None where
    no cell has two seeds."""
    cells = [cell for cell in cells if len(cell.values) > 1]
    freedom = sum(len(cell.values) - 1 for cell in cells)
    if not freedom:
        return None
    return (sum((len(cell.values) - 1) * statistics.variance(cell.values) for cell in cells) / freedom) ** 0.5


def sign(one: Values, other: Values, deviation: float | None) -> str:
    """`>`, `<`, or `~` where no ordering may be claimed: two seeds of each, and more than DEVIATIONS pooled deviations."""
    if deviation is None or min(len(one.values), len(other.values)) < 2:
        return "~"
    difference = one.mean - other.mean
    if abs(difference) <= DEVIATIONS * deviation:
        return "~"
    return ">" if difference > 0 else "<"


def orderings(cells: dict[str, Values]) -> list[str]:
    """What may be claimed of cells of one table: a line `a > b, c` for each that is better than some."""
    deviation = pooled_deviation(cells.values())
    ranked: Sequence[str] = sorted(cells, key=lambda name: -cells[name].mean)
    lines = []
    for name in ranked:
        worse = [other for other in ranked if sign(cells[name], cells[other], deviation) == ">"]
        lines += [f"{name} > {', '.join(worse)}"] if worse else []
    return lines
