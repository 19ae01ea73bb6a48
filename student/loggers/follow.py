"""Loggers follow metrics.jsonl, each in a thread of its own: the file is the truth, and what a logger lacks of it, it is sent.

So one that is added later, or that failed for a while, catches up; one that hangs holds up nothing but itself; and one that fails
costs no step of the run. What it has is asked of the logger itself or stands in `loggers/NAME.json` of the run, never in memory
alone: a run that was killed and takes steps again sends none of them twice.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from ..config import TrainConfig
from ..errors import ConfigError
from ..files.logs import METRICS
from ..files.run_files import LARGEST_JSON, require_held, require_own, write_whole
from .rows import Row, Rows

LOOK_EVERY_S = 2.0
"""Seconds between two looks at the file."""
RETRY_S = 60.0
"""Seconds until a logger that failed is tried again."""
MOST_ROWS = 500
"""That are sent at once."""
CLOSE_S = 120.0
"""Seconds that all loggers together have, when training has ended, to send what is left."""

Ended = Literal["finished", "stopped", "failed"]
"""How training ended: at its last step, by a person or a scheduler, by an error."""


@dataclass(frozen=True)
class RunToLog:
    """What a logger knows of the run."""

    folder: Path
    config: TrainConfig
    identity: dict
    """Of its data."""
    step: int
    """Completed steps when logging begins."""


class Logger(Protocol):
    """Where values of a run go."""

    name: ClassVar[str]

    def __init__(self, run: RunToLog): ...

    @staticmethod
    def require() -> None:
        """Raise ConfigError where something is missing that can be told without a run."""
        ...

    def open(self) -> int:
        """Begin, or go on; the step up to which it has everything, -1 for none. Called again behind an error of `add`."""
        ...

    def add(self, rows: Sequence[Row]) -> None:
        """Take these rows, of ascending steps, all later than any before."""
        ...

    def close(self, ended: Ended) -> None: ...

    def where(self) -> str:
        """Where a person looks at it, in words."""
        ...


class Kept:
    """What a logger must remember of a run: a JSON object in `loggers/NAME.json` of the run."""

    def __init__(self, folder: Path, name: str):
        self._path = folder / "loggers" / f"{name}.json"

    def read(self) -> dict:
        """What was kept, {} if nothing was. Raises ConfigError if it cannot be read."""
        require_own(self._path.parent)
        require_own(self._path)
        try:
            found = json.loads(self._path.read_bytes()[:LARGEST_JSON])
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
            return found
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self._path} cannot be read ({error}). Delete it: the logger begins anew.") from error

    def write(self, values: dict) -> None:
        self._path.parent.mkdir(exist_ok=True)
        write_whole(self._path, (json.dumps(values) + "\n").encode())


class Followers:
    """All loggers of a run. Nothing is logged until `open`.

    say: told where each logger can be looked at, and when one fails, once until it works again.
    unsent: behind `close`, a sentence for each logger that lacks something.
    """

    def __init__(self, kinds: Sequence[type[Logger]], say: Callable[[str], None]):
        self._kinds, self._say = kinds, say
        self._followers: list[_Follower] = []
        self.unsent: list[str] = []

    def open(self, run: RunToLog) -> None:
        """Open every logger, or raise what keeps one from it."""
        opened: list[_Follower] = []
        try:
            for kind in self._kinds:
                logger = kind(run)
                opened.append(_Follower(logger, logger.open(), run.folder / METRICS, self._say))
                self._say(f"log      {logger.name}: {logger.where()}")
        except BaseException:
            for follower in opened:
                with contextlib.suppress(Exception):
                    follower.logger.close("failed")
            raise
        self._followers = opened
        for follower in opened:
            follower.start()

    def close(self, ended: Ended, whole: bool) -> None:
        """Send what is left, and wait for that, but not for ever. whole: nothing more will be said of the last step."""
        deadline = time.monotonic() + CLOSE_S
        for follower in self._followers:
            follower.end(ended, whole)
        for follower in self._followers:
            follower.join(max(0.0, deadline - time.monotonic()))
            if lacking := follower.lacking():
                self.unsent.append(lacking)
        self._followers = []


class _Follower(threading.Thread):
    def __init__(self, logger: Logger, sent: int, metrics: Path, say: Callable[[str], None]):
        super().__init__(name=f"logger {logger.name}", daemon=True)
        self.logger, self._metrics, self._say = logger, metrics, say
        self._rows, self._sent = Rows(metrics), sent
        self._error, self._retry_at = "", 0.0
        self._ending = threading.Event()
        self._ended: Ended = "stopped"
        self._whole = False

    def end(self, ended: Ended, whole: bool) -> None:
        self._ended, self._whole = ended, whole
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(LOOK_EVERY_S):
            if time.monotonic() >= self._retry_at:
                self._send(whole=False)
        self._send(whole=self._whole)
        self._try(lambda: self.logger.close(self._ended))

    def lacking(self) -> str:
        """What it did not get, a sentence; nothing if it has all."""
        if not self._error and not self.is_alive():
            return ""
        why = self._error or f"it is not done after {CLOSE_S:.0f} s"
        behind = f"it has the steps up to {self._sent:,}" if self._sent >= 0 else "it has no step"
        return f"{self.logger.name}: {why}; {behind}. The run is whole; the same command sends the rest."

    def _send(self, whole: bool) -> None:
        while self._try(lambda: self._send_some(whole)):
            pass

    def _send_some(self, whole: bool) -> bool:
        """Send at most MOST_ROWS; whether there may be more."""
        require_held(self._metrics)  # what another trainer writes is sent by that one
        if self._error:
            has = self.logger.open()
            if has < self._sent:  # it lost what it had been sent
                self._rows = Rows(self._metrics)
            self._sent = has
        reading = copy.copy(self._rows)  # what is read counts as read when the logger has it
        rows = reading.read(MOST_ROWS, whole)
        if new := [row for row in rows if row.step > self._sent]:
            self.logger.add(new)
            self._sent = new[-1].step
        self._rows, self._error = reading, ""
        return len(rows) >= MOST_ROWS

    def _try(self, work: Callable[[], bool | None]) -> bool:
        try:
            return bool(work())
        except Exception as error:  # noqa: BLE001  (whatever a logger raises, the run goes on)
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            if not self._error:
                again = "" if self._ending.is_set() else f" Training goes on; it is tried again every {RETRY_S:.0f} s."
                self._say(f"{self.logger.name}: {text}.{again}")
            self._error, self._retry_at = text, time.monotonic() + RETRY_S
            return False
