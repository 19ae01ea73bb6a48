"""TensorBoard, by torch's SummaryWriter: event files in `tensorboard/` of the run.

What follows a resume is written behind a mark (purge_step) by which TensorBoard drops what older files have of the same steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import ClassVar

from torch.utils.tensorboard import SummaryWriter

from ..files.run_files import require_own
from .follow import Ended, Kept, RunToLog
from .rows import Row

FOLDER = "tensorboard"


class ToTensorBoard:
    """Steps that are taken again take the place of what was written of them before."""

    name: ClassVar[str] = "tensorboard"

    def __init__(self, run: RunToLog):
        self._run, self._folder = run, run.folder / FOLDER
        self._kept = Kept(run.folder, self.name)
        self._writer: SummaryWriter | None = None

    @staticmethod
    def require() -> None:
        """The import has shown that it is there."""

    def open(self) -> int:
        require_own(self._folder)
        has = int(self._kept.read().get("step", -1))
        if self._writer is None:
            has = min(has, self._run.step - 1)
        else:  # it goes on behind an error, and what it has is of this run's own steps
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=has + 1, flush_secs=3600)  # `add` flushes
        self._writer.flush()
        return has

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in {"epoch": row.epoch, **row.values}.items():
                self._writer.add_scalar(name, value, row.step)
        self._writer.flush()
        self._kept.write({"step": rows[-1].step})

    def close(self, ended: Ended) -> None:
        self._writer.close()

    def where(self) -> str:
        return f"tensorboard --logdir {self._folder}"
