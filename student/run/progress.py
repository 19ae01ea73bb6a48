"""What a person watching a run sees: a bar on a terminal, now and then a plain line in a log file."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files.logs import StepReport


class StepDisplay:
    """Shows steps as they finish, with loss, speed and the share of time spent waiting for data.

    Where `console` is no terminal, one line every `line_every` steps.
    """

    def __init__(self, first_step: int, last_step: int, line_every: int, console: Console | None = None):
        self._console = console or Console()
        self._last_step = last_step
        self._line_every = line_every
        self._bar = None
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=last_step, completed=first_step)
            self._bar.start()

    def show(self, report: StepReport) -> None:
        line = f"loss {report.loss:.4f}  {report.images_per_s:.0f} images/s  {report.wait_share:.0%} waiting for data"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, description=line)
        elif report.step % self._line_every == 0 or report.step == self._last_step:
            done = f"step {report.step}/{self._last_step}  epoch {report.epoch:.2f}"
            self._console.print(f"{done}  {line}", highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print a line of its own; a bar stays below it."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
