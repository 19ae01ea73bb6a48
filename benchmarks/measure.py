"""What all benchmarks share: runs that take turns, ratios within a round, and one JSON document as the last line.

Other work on a machine slows a run down, so a figure alone says little. Here the variants take turns, A B C A B C ..., and a
ratio is taken within each round, of runs that followed one another; reported is the median of the rounds, with the lowest and
highest.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "numba", "ffcv", "zarr", "numcodecs", "timm", "tensorstore", "lmdb", "webdataset", "litdata")


@dataclass(frozen=True)
class Claim:
    """A ratio, and what it should be."""

    name: str
    ratio: float
    """Median of the rounds."""
    goal: float | None
    """None: for information."""
    lowest: float
    highest: float
    at_most: bool = False
    """Whether the ratio should be at most the goal; else at least."""

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal

    @property
    def margin(self) -> float:
        """Above 1 where the goal is met; the further, the more."""
        if self.goal is None or self.ratio == 0:
            return float("inf")
        return self.goal / self.ratio if self.at_most else self.ratio / self.goal

    def to_json(self) -> dict:
        return {**asdict(self), "met": self.met}


def claim(name: str, ratios: list[float], goal: float | None, at_most: bool = False) -> Claim:
    """The claim that `ratios`, one a round, make."""
    return Claim(name, statistics.median(ratios), goal, min(ratios), max(ratios), at_most)


class Rounds:
    """Rates of several variants, one a round each. `rates`: name -> items/s of every round."""

    def __init__(self, rates: dict[str, list[float]]):
        self.rates = rates

    def each(self, formula: Callable[..., float]) -> list[float]:
        """`formula` of the rates of each round, which it gets as a dict."""
        return [formula(dict(zip(self.rates, of_round, strict=True))) for of_round in zip(*self.rates.values(), strict=True)]

    def over(self, one: str, other: str) -> list[float]:
        """rate of `one` / rate of `other`, in each round."""
        return self.each(lambda rates: rates[one] / rates[other])

    def figures(self, unit: str = "rows/s") -> dict:
        """Median, lowest and highest rate of every variant."""
        return {
            name: {"unit": unit, "median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}
            for name, rates in self.rates.items()
        }


def rate_of(run: Callable[[], int]) -> float:
    """Items/s of one run, which returns how many items it was."""
    started = time.perf_counter()
    return run() / (time.perf_counter() - started)


def take_turns(variants: dict[str, Callable[[], float]], n_rounds: int) -> Rounds:
    """Run all variants once to warm up, then `n_rounds` times in turn.

    Each does its work and returns how many items it was, which over its wall time is its rate; or, negative, the rate it has
    measured itself.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(n_rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            n_items = run()
            rate = -n_items if n_items < 0 else n_items / (time.perf_counter() - started)
            if number:
                rates[name].append(rate)
    return Rounds(rates)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    if given := os.environ.get("COMMIT"):  # of a checkout that has come without its repository
        return given
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return (head or "unknown") + ("+changes" if git(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except OSError:
        return "unknown"


def gpu_name() -> str | None:
    """Of the first CUDA device, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def environment() -> dict:
    """Hardware, versions, commit and command, and how busy the machine was."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    script = sys.modules["__main__"].__spec__
    called = f"python -m {script.name.removesuffix('.__main__')}" if script else Path(sys.argv[0]).name
    return {
        "hardware": {"cpu": _cpu(), "n_cpus": len(os.sched_getaffinity(0)), "memory_gb": round(memory / 1e9), "gpu": gpu_name()},
        "versions": {"python": platform.python_version(), "kernel": platform.release(),
                     **{package: version(package) for package in PACKAGES}},
        "commit": _commit(),
        "command": " ".join([called, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load_average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def report(name: str, claims: list[Claim], figures: dict, conditions: list[str], where: dict) -> None:
    """Print what was found for people, then as one line of JSON: `ratio` and `goal` are those of the claim with the least margin.

    where: `environment()` before the measurement. figures: JSON values.
    """
    for line in conditions:
        click.echo(f"  {line}")
    for key, value in figures.items():
        text = ", ".join(f"{k} {_short(v)}" for k, v in value.items()) if isinstance(value, dict) else _short(value)
        click.echo(f"  {key}: {text}")
    for each in claims:
        verdict = "" if each.met is None else "  met" if each.met else "  MISSED"
        wanted = "" if each.goal is None else f"  (goal {'<=' if each.at_most else '>='} {each.goal:g})"
        click.echo(f"  {each.name}: {each.ratio:.3g} [{each.lowest:.3g} .. {each.highest:.3g}]{wanted}{verdict}")
    nearest = min(claims, key=lambda each: each.margin)
    document = {"name": name, "ratio": nearest.ratio, "goal": nearest.goal, "met": all(each.met is not False for each in claims),
                "claims": [each.to_json() for each in claims], "figures": figures, "conditions": conditions, **where}  # fmt: skip
    click.echo(json.dumps(document))


def not_run(name: str, why: str) -> None:
    """Say that a benchmark does not fit this machine, in words and as the last line."""
    click.echo(f"  {name}: not run: {why}")
    click.echo(json.dumps({"name": name, "ratio": None, "goal": None, "not_run": why, **environment()}))


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def options(function: Callable) -> Callable:
    """`--tiny`, `--rounds` and `--scratch` for a benchmark's command."""
    for option in (
        click.option("--scratch", type=click.Path(path_type=Path), help="Where its files go, and are deleted. [default: /tmp]"),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Times that each variant is run."),
        click.option("--tiny", is_flag=True, help="As small as can be: that the script works, not what it measures."),
    ):
        function = option(function)
    return function


@contextmanager
def scratch_folder(parent: Path | None, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder that is deleted afterwards. Ends the program if `needed_bytes` are not free there."""
    parent = parent or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise click.ClickException(
            f"{parent} has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed. Give another: --scratch DIR."
        )
    with tempfile.TemporaryDirectory(prefix="teacher-cache-bench-", dir=parent) as folder:
        yield Path(folder)
