"""What fitting the quantiser takes in memory and on disk: the sample of all 24 layers of a CLIP ViT-L/14, of random tokens."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from teacher_cache.encoding.fit import FIT_ROWS, Sample, fit, fit_bytes
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.words import human

from . import made_up, measure

MOST = 1_100_000_000
"""Bytes of memory that a fit may add."""
ROWS = 32
"""Rows that are added at a time."""


def _memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@click.command()
@measure.options
def main(tiny: bool, rounds: int, scratch: Path | None):
    """Peak memory that a fit adds, of `--layers last24` of a CLIP ViT-L/14; at most 1.1 GB. One round is run."""
    where = measure.environment()
    teacher = replace(made_up.VIT_B16, dim=1024, depth=24, heads=16)
    teacher = made_up.SMALL if tiny else teacher
    spec = ExtractPlan(layers="last24").store_spec(teacher, 64 if tiny else 1_281_167)
    n_rows = min(FIT_ROWS, spec.n_rows)
    draws = np.random.default_rng(0)
    with measure.scratch_folder(scratch, 2 * fit_bytes(spec, teacher)) as folder, Sample(folder, spec, teacher) as sample:
        shape = (ROWS, len(spec.layers), sample.n_drawn, teacher.dim)
        tokens = draws.standard_normal(shape, "float32")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before, started = _memory("VmRSS"), time.perf_counter()
        for start in range(0, n_rows, ROWS):
            sample.add(tokens[: min(ROWS, n_rows - start)])
        fit(sample, spec)
        seconds, added = time.perf_counter() - started, max(1, _memory("VmHWM") - before)
    figures = {
        "sample on disk": {"unit": "MB", "median": fit_bytes(spec, teacher) / 1e6},
        "memory added": {"unit": "MB", "median": added / 1e6},
        "time": {"unit": "s", "median": seconds},
    }  # fmt: skip
    conditions = [f"{n_rows:,} rows, {sample.n_drawn} tokens of each, {len(spec.layers)} layers, width {teacher.dim}"]
    claim = measure.claim(f"memory that a fit adds / {human(MOST)}", [added / MOST], 1.0, at_most=True)
    measure.report("fit-memory", [claim], figures, conditions, where)


if __name__ == "__main__":
    main()
