"""What is kept of a step that failed: failed-NNNNNNNN.json in the folder of the run, for people and for taking the step again.

NNNNNNNN is the number of the step, counted from 1. Everything in a step is a function of (seed, step), so no tensor is kept:

    error         what stopped the run
    process       where it happened, of `processes` that trained together
    view, rows    of all crops of the step, in order; where the data source can tell
    losses        of the micro-batches of all processes, in the same order; parts, gradient_norm: if the step came so far
    learning_rate, changes, seed, batch_size, micro_batches
    noise         what draws its masks: `student.masking.draw_noise(seed, step - 1, batch_size, n_patches)`
    drops         what drops branches: `student.modules.drop_path.draw_drops(seed, step - 1, batch_size, rates)`
    saved_step    the checkpoint from which the same command takes this step again, to the bit on a CPU (`--max-steps NNNNNNNN`)

`teacher-cache show --row I --row J CACHE` draws the crops and what the teacher says of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..files.run_files import write_whole


def write_failure(folder: Path, step: int, facts: dict) -> Path:
    """Write what is known of the step (from 1) that failed. A number that is not finite becomes text: JSON has none."""
    path = Path(folder) / f"failed-{step:08d}.json"
    write_whole(path, (json.dumps(_plain({"step": step, **facts}), indent=1, allow_nan=False) + "\n").encode())
    return path


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
