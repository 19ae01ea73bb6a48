"""What fitting the quantiser holds in memory, beside the teacher: its peak of anonymous memory over the bound that `estimate` and
docs/design/0005 state. Tokens are made up: only their number and width count.
"""

from __future__ import annotations

import multiprocessing
import re
import threading
from pathlib import Path

import click
import numpy as np

from teacher_cache.estimate import human
from teacher_cache.fitting import FIT_MEMORY, Sample
from teacher_cache.planning import ExtractPlan
from teacher_cache.teachers import TEACHERS

from . import measure

CASES = {"clip-b16, last5": ("clip-b16", "last5"), "clip-l14, last24": ("clip-l14", "last24")}
N_IMAGES = 1_281_167
BATCH = 64


def _anonymous() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _peak(teacher_name: str, layers: str, n_images: int, queue) -> None:
    """Fit made-up tokens in this process; puts the bytes by which its anonymous memory grew at most."""
    teacher = TEACHERS[teacher_name].spec()
    spec = ExtractPlan(layers=layers).store_spec(teacher, n_images)
    random = np.random.default_rng(0)
    shape = (len(spec.layers), spec.n_tokens(teacher), teacher.dim)
    row = random.standard_normal(shape, "float32")
    before, peak, done = _anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    sample = Sample(spec, teacher, "auto")
    for start in range(0, sample.plan.n_rows, BATCH):
        for number in range(start, min(start + BATCH, sample.plan.n_rows)):
            rows = np.array([number])
            drawn, whole = sample.places(rows, None)
            sample.keep(rows, row[None][:, :, drawn[0]], row[None][: len(whole)])
    sample.fit()
    done.set()
    watcher.join()
    queue.put((peak[0] - before, sample.plan.n_rows * sample.plan.n_tokens))


@click.command()
@measure.options
def main(tiny: bool, rounds: int, scratch: Path | None):
    """Peak memory of the fit over its bound, for five layers of a ViT-B and 24 of a ViT-L. At most two rounds are run."""
    where = measure.environment()
    claims, figures, context = [], {}, multiprocessing.get_context("spawn")
    for name, (teacher, layers) in CASES.items():
        peaks = []
        for _ in range(min(rounds, 2)):
            queue = context.Queue()
            process = context.Process(target=_peak, args=(teacher, layers, 400 if tiny else N_IMAGES, queue))
            process.start()
            grown, n_tokens = queue.get()
            process.join()
            peaks.append(grown)
        figures[f"peak, {name}"] = {"unit": "MB", "median": float(np.median(peaks)) / 1e6, "lowest": min(peaks) / 1e6,
                                    "highest": max(peaks) / 1e6}  # fmt: skip
        figures[f"tokens a layer, {name}"] = n_tokens
        claims.append(measure.claim(f"memory of the fit / bound, {name}", [peak / FIT_MEMORY for peak in peaks], 1, at_most=True))
    conditions = [f"growth of RssAnon while made-up tokens are fitted; the bound is {human(FIT_MEMORY)}"]
    measure.report("fit-memory", claims, figures, conditions, where)


if __name__ == "__main__":
    main()
