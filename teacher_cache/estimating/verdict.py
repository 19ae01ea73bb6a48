"""Does a cache pay? Numbers in, a verdict out: no disk, no teacher, nothing measured here.

    cached   extraction once, then runs x epochs x images at the student's rate, or the disk's if that is slower
    live     runs x epochs x images at the rate of student and teacher one after the other

Both on one device. What is not known stays None, and the verdict says which option would give it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..words import human


@dataclass(frozen=True)
class Use:
    """What the cache is for."""

    n_images: int
    n_views: int
    epochs: int | None
    """Of one run."""
    runs: int
    bytes_per_crop: int
    """What a training step reads for a crop: pixels and those targets that the student looks at."""
    total_bytes: int
    """Of the cache."""
    free_bytes: int
    """Of the disk it shall lie on."""

    @property
    def passes(self) -> int | None:
        """Epochs of all runs."""
        return None if self.epochs is None else self.epochs * self.runs


@dataclass(frozen=True)
class Rates:
    """Crops a second on one device, and bytes a second of the disk; None where it is not known."""

    teacher: float | None = None
    """The frozen teacher's forward pass alone: what each live step pays."""
    extraction: float | None = None
    """All of extraction: decoding, teacher, quantising, writing. Where it is not known, the teacher's."""
    student: float | None = None
    """A training step without teacher and without waiting for data."""
    disk: float | None = None
    """Random reads, bytes/s."""


@dataclass(frozen=True)
class Verdict:
    """What follows; times in seconds, None where a rate is missing."""

    extraction_s: float | None
    cached_s: float | None
    live_s: float | None
    saved_s: float | None
    needed_bytes_per_s: float | None
    """What the student reads if it never waits."""
    cached_rate: float | None
    """Crops a second that the student reaches on this disk."""
    break_even_epochs: float | None
    """Epochs of all runs after which extraction is paid for; infinite if never."""
    pays: bool | None
    sentences: tuple[str, ...]
    unknown: tuple[str, ...]
    """What is not known, and the option that gives it."""


def hours(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `9.1 days`."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.3g} days"


def judge(use: Use, rates: Rates) -> Verdict:
    """Compare training from a cache with running the teacher in every step."""
    extraction_rate = rates.extraction or rates.teacher
    extraction_s = use.n_images * use.n_views / extraction_rate if extraction_rate else None
    supply = rates.disk / use.bytes_per_crop if rates.disk else None  # crops/s
    cached_rate = min(rates.student, supply or math.inf) if rates.student else None
    slower_s = 1 / cached_rate - 1 / rates.student if cached_rate else 0.0  # a crop, by the disk

    break_even = _break_even(use, rates, extraction_s, slower_s)
    saved_s = cached_s = live_s = None
    if use.passes is not None and extraction_s is not None and rates.teacher:
        n_crops = use.passes * use.n_images
        saved_s = n_crops * (1 / rates.teacher - slower_s) - extraction_s
        if cached_rate:
            cached_s = extraction_s + n_crops / cached_rate
            live_s = n_crops * (1 / rates.student + 1 / rates.teacher)
    pays = None if use.passes is None or break_even is None else use.passes > break_even
    return Verdict(
        extraction_s, cached_s, live_s, saved_s, rates.student * use.bytes_per_crop if rates.student else None, cached_rate,
        break_even, pays, tuple(_sentences(use, rates, break_even, pays, saved_s, cached_s, live_s, supply)),
        tuple(_unknown(use, rates)),
    )  # fmt: skip


def _break_even(use: Use, rates: Rates, extraction_s: float | None, slower_s: float) -> float | None:
    """Epochs of all runs after which extraction is paid for.

    The teacher runs once a view in extraction and once an epoch in live training: unless the disk is slow, its rate is no matter.
    """
    if not rates.teacher:
        return None if slower_s else float(use.n_views)
    gain_s = use.n_images * (1 / rates.teacher - slower_s)  # an epoch
    return extraction_s / gain_s if gain_s > 0 else math.inf


def _sentences(use: Use, rates: Rates, break_even: float, pays: bool | None, saved_s, cached_s, live_s, supply):
    """The verdict, the plainest first."""
    runs = f"{use.runs} run{'s' * (use.runs > 1)}"
    if break_even is None:
        yield "Whether caching pays depends on the teacher's rate, because the disk is slow."
    elif pays is None:
        yield f"Caching pays {_from(break_even)}, all runs together."
    else:
        planned = f"{runs} of {use.epochs} epochs"
        condition = "" if rates.disk and rates.student else ", if the disk keeps up"
        if cached_s is not None:
            why = f"{planned} take {hours(cached_s)} with the extraction, {hours(live_s)} with the teacher in every step"
        elif saved_s is not None:
            why = f"over {planned} it {'saves' if saved_s > 0 else 'costs'} {hours(abs(saved_s))}"
        else:
            why = f"over {planned} the teacher runs {use.n_views} times over the images, not {use.passes}"
        disk = f" It takes {human(use.total_bytes)} of disk." if pays else ""
        yield f"Caching {'pays' if pays else 'LOSES'}{condition}: {why}.{disk}"
        yield f"It would pay {_from(break_even)}, all runs together; {use.passes:,} are planned."
    if rates.student and supply is not None and supply < rates.student:
        yield (
            f"The disk is slower than the student: it gives {supply:,.0f} crops/s of {human(use.bytes_per_crop)}, the student "
            f"takes {rates.student:,.0f}. It would wait {1 - supply / rates.student:.0%} of its time. Store fewer layers, or put "
            "the cache on a faster disk."
        )
    if use.epochs is not None and use.n_views > use.epochs:
        yield (
            f"{use.n_views} views are more than the {use.epochs} epochs of a run, which reads one view an epoch: views "
            f"{use.epochs} to {use.n_views - 1} would never be read. Give --views {use.epochs}."
        )
    if use.total_bytes > use.free_bytes:
        yield (
            f"It does not fit: {human(use.total_bytes - use.free_bytes)} short. Make room, or store less: fewer --views, "
            "--layers last, --dtype klt, --tokens visible:K."
        )


def _from(break_even: float) -> str:
    """`from 2 epochs on`: the first whole number above."""
    if math.isinf(break_even):
        return "never"
    first = math.floor(break_even) + 1
    return f"from {first:,} epoch{'s' * (first > 1)} on"


def _unknown(use: Use, rates: Rates):
    if not rates.teacher:
        yield "hours of extraction, and what they save: --gpu-rate CROPS_PER_S, or --measure"
    if not rates.student:
        yield "hours of training, and the bytes/s it reads: --student-rate CROPS_PER_S, or --measure with --preset"
    if not rates.disk:
        yield "whether the disk keeps up: --measure"
    if use.epochs is None:
        yield "whether it pays: --epochs, or --preset"
