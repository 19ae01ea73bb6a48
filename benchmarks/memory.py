"""What a training run holds in memory as its cache grows: peak anonymous memory (RssAnon of /proc/PID/status) of student-train on
1 GB and on 100 GB of targets, in sparse files. Mapped pages of the cache are the kernel's to take back, and are not counted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from pipelines.feed.order import Order
from teacher_cache.format.spec import TeacherSpec
from teacher_cache.words import human

from . import made_up, measure, sparse

PRESET, BATCH = "maskalign-b16-random", 8  # reads five layers; black crops have no attention to sample by


def peak_anonymous(command: list[str]) -> int:
    """Run a command and return the highest RssAnon it was seen with, in bytes; looked at 50 times a second."""
    with subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        status, peak = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.02)
        if process.returncode:
            raise click.ClickException(f"{' '.join(command)} failed: {process.stderr.read()[-2000:]}")
    return peak


def train(cache: Path, n_steps: int, out: Path) -> int:
    options = ["--cache", str(cache), "--preset", PRESET, "--tiny", "--teacher", made_up.NAME, "--max-steps", str(n_steps)]
    return peak_anonymous([sys.executable, "-m", "student", *options, "--device", "cpu", "--out", str(out)])


def row_bytes(teacher: TeacherSpec) -> int:
    spec = made_up.store_spec(teacher, 1, "last5")
    return sum(spec.row_bytes(array, teacher) for array in spec.array_names)


@click.command()
@measure.options
def main(tiny: bool, rounds: int, scratch: Path | None):
    """Peak anonymous memory of a trainer on 100 GB of cache over that on 1 GB. At most two rounds are run."""
    where = measure.environment()
    teacher, n_steps, shard_rows = (made_up.SMALL, 4, 16) if tiny else (made_up.VIT_B16, 100, 512)
    sizes = (200_000, 2_000_000) if tiny else (10**9, 10**11)
    crop_size = 28  # of both grids, 4 x 4 and 14 x 14, the smallest multiple
    with measure.scratch_folder(scratch, 0 if tiny else 2 << 30) as folder:
        caches = {}
        for n_bytes in sizes:
            n_rows = n_bytes // row_bytes(teacher)
            cache = sparse.sparse_cache(folder / str(n_bytes), n_rows, crop_size)
            rows = np.concatenate([rows.ravel() for _, rows in Order(n_rows, BATCH, seed=0).steps(0, n_steps)])
            sparse.add_sparse_targets(cache.view(0), teacher, shard_rows=shard_rows, readable=set(rows.tolist()))
            caches[human(n_bytes)] = (cache, n_rows)
        peaks: dict[str, list[int]] = {name: [] for name in caches}
        for number in range(min(rounds, 2)):
            for name, (cache, _) in caches.items():
                peaks[name].append(train(cache.path, n_steps, folder / f"run-{name}-{number}"))
    small, large = peaks
    ratios = [b / a for a, b in zip(peaks[small], peaks[large], strict=True)]
    figures = {
        f"peak RssAnon, {name}": {"unit": "MB", "median": float(np.median(found)) / 1e6, "lowest": min(found) / 1e6,
                                  "highest": max(found) / 1e6}
        for name, found in peaks.items()
    }  # fmt: skip
    conditions = [
        f"student-train --preset {PRESET} --tiny, {n_steps} steps of {BATCH} crops with five int8 layers",
        ", ".join(f"{name}: {n_rows:,} rows" for name, (_, n_rows) in caches.items()) + f", shards of {shard_rows}",
    ]
    claim = measure.claim(f"peak anonymous memory at {large} / {small}", ratios, 1.2, at_most=True)
    measure.report("memory", [claim], figures, conditions, where)


if __name__ == "__main__":
    main()
