"""What the end of an epoch costs: the first step of an epoch over the steps within, in a run that takes as long for a step as the
loader does for a batch. A loader that stops where an epoch ends, and begins anew when it is asked, makes it about 2.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path

import click

from pipelines.feed.cached_source import CachedSource
from student.batch import Needs

from . import made_up, measure

NEEDS = Needs((-5, -4, -3, -2, -1), attention=True)


def step_times(source: CachedSource, first: int, last: int, work_s: float) -> list[float]:
    """Seconds of each step, of which `work_s` are the student's; its first batch is not counted."""
    times = []
    with contextlib.closing(source.micro_batches(first, last)) as batches:
        next(batches)
        time.sleep(work_s)
        for _ in range(first + 1, last):
            started = time.perf_counter()
            next(batches)
            time.sleep(work_s)
            times.append(time.perf_counter() - started)
    return times


@click.command()
@measure.options
def main(tiny: bool, rounds: int, scratch: Path | None):
    """Seconds of the first step of an epoch over those within."""
    where = measure.environment()
    teacher, batch, n_steps, n_epochs = (made_up.SMALL, 4, 4, 2) if tiny else (made_up.VIT_B16, 64, 8, 4)
    n_rows = batch * n_steps
    with measure.scratch_folder(scratch, 0 if tiny else 2 << 30) as folder:
        cache = made_up.make_cache(folder, n_rows, teacher.image_size)
        made_up.add_targets(cache, teacher, shard_rows=batch)
        source = CachedSource(cache, [made_up.NAME], [NEEDS], batch_size=batch)
        alone = statistics.median(step_times(source, 0, n_steps, 0.0))  # warms up, too
        first, within = [], []
        for _ in range(rounds):
            times = step_times(source, 0, n_epochs * n_steps, alone)  # time i is that of step i + 1
            first.append([t for step, t in enumerate(times, 1) if step % n_steps == 0])
            within.append([t for step, t in enumerate(times, 1) if step % n_steps])
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(first, within, strict=True)]
    seconds = {"unit": "ms", "median": 1e3 * alone, "lowest": 1e3 * alone, "highest": 1e3 * alone}
    conditions = [f"{n_epochs} epochs of {n_steps} steps of {batch} crops of {teacher.image_size} px with five int8 layers; warm"]
    claims = [measure.claim("first step of an epoch / steps within", ratios, 1.2, at_most=True)]
    measure.report("epoch-ends", claims, {"a batch, when nothing else runs": seconds}, conditions, where)


if __name__ == "__main__":
    main()
