"""A Ray cluster, and the workers that are started on it: one for each GPU, or each CPU slot.

Ray finds nodes, starts workers on them, starts them again and passes calls.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import NoSpaceError, TeacherCacheError, UsageError
from ..terminal.progress import note
from .blocks import TRIES
from .dealing import Block
from .ray_workers import Receipt

POLL_S = 2.0
WAIT_S = 30.0
"""After so long without a worker one says what is waited for."""
AGAIN = {"max_restarts": TRIES - 1, "max_task_retries": TRIES - 1}
"""How often Ray starts a worker again that died, and makes it do its call again. Not one whose arguments lie in its store."""


class _FirstLines(io.StringIO):
    """Where Ray prints what happens to nodes and workers, with pages of its logs: their first sentences are said, on stderr."""

    def write(self, text: str) -> int:
        if line := re.sub(r"\x1b\[[0-9;]*m", "", text).strip().partition("\n")[0].partition(". ")[0]:
            say_once(line)
        return len(text)


@contextmanager
def connected(address: str) -> Iterator:
    """Ray, connected to a cluster while the block runs. One of this machine alone leaves nothing in anybody's home."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}.items():  # the latter says things at the very end
        os.environ.setdefault(name, value)
    if address == "local" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to ~/.ray/auth_token
    import ray

    before = signal.getsignal(signal.SIGTERM)
    options = {"include_dashboard": False} if address == "local" else {}
    with contextlib.redirect_stdout(_FirstLines()):
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            why = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"--address {address}: no Ray cluster answers ({why}). Start one with: ray start --head, and on every other node "
                "ray start --address HOST:6379; or give --address local for this machine alone."
            ) from error
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray has put its own in the place of ours
            yield ray
        except ray.exceptions.RayError as error:
            raise TeacherCacheError(f"The Ray cluster fails: {_last_line(error)} What is made is kept.") from error
        finally:
            ray.shutdown()  # and with it the workers


class Pool:
    """A worker for each GPU, or each CPU slot, of the cluster as it is now.

    A worker that does not fit is kept and given nothing, so that no other one is started in its place.
    """

    def __init__(self, ray, resource: str, options: dict, kind: type, *arguments):
        self.ray, self.resource = ray, resource
        slot = {"num_gpus": 1} if resource == "GPU" else {"num_cpus": 1}
        n_beside = max((int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]), default=1)
        self._start = lambda: ray.remote(**slot, **options)(kind).remote(*arguments, n_beside=max(1, n_beside))
        self.workers: list = []
        self.idle: list = []
        self.refused: list[str] = []
        self.calls: dict = {}
        self.n_calls, self.n_deaths, self._began = 0, 0, time.monotonic()

    def end(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.workers, self.idle, self.refused, self.calls = [], [], [], {}

    def grow(self, *orders, most: int | None = None) -> None:
        """Start a worker in every slot that has none, or until `most` may fit. orders: what they are started with."""
        n_slots = int(self.ray.cluster_resources().get(self.resource, 0))
        while len(self.workers) < (n_slots if most is None else min(n_slots, most + len(self.refused))):
            self.workers.append(worker := self._start())
            self.calls[worker.start.remote(*orders)] = worker, None
        if self.refused and len(self.refused) == len(self.workers) >= n_slots:
            raise UsageError(f"No worker fits. {self.refused[0]}")
        if not self.idle and not self.n_calls and time.monotonic() - self._began > WAIT_S:
            say_once(
                f"No worker is ready yet: the {n_slots} {self.resource} slots of the cluster are taken, or it is still loading."
            )

    def give(self, block: Block, *more) -> None:
        worker = self.idle.pop(0)
        self.calls[worker.make.remote(*block, *more)] = worker, block

    def outcomes(self) -> Iterator[tuple[Block | None, Receipt]]:
        """Calls that have ended since, or do within POLL_S; block: None for a worker that has started, or has not."""
        calls = list(self.calls)
        if not calls or not self.ray.wait(calls, timeout=POLL_S)[0]:
            return
        for call in self.ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
            worker, block = self.calls.pop(call)
            try:
                receipt = self.ray.get(call)
            except self.ray.exceptions.RayActorError as error:
                self.workers.remove(worker)
                self.ray.kill(worker)  # one that is only out of reach must not come back into a slot that another gets
                self.n_deaths += 1
                if self.n_deaths > TRIES * (1 + len(self.workers)):
                    raise
                receipt = Receipt("A worker", "failed", _last_line(error))
            except self.ray.exceptions.RayTaskError as error:
                self.idle.append(worker)
                receipt = Receipt("A worker", "failed", f"{type(error.cause).__name__}: {error.cause}")
            else:
                self.n_calls, self.n_deaths = self.n_calls + 1, 0
                if receipt.outcome == "refused":
                    self.refused.append(f"{receipt.who} is given no work: {receipt.words}")
                else:
                    self.idle.append(worker)
            if receipt.outcome == "failed":
                say_once(f"{receipt.who} failed: {receipt.words}")
            for line in (*receipt.lines, *self.refused):
                say_once(line)
            if receipt.outcome == "stop":
                raise NoSpaceError(receipt.words)
            yield block, receipt


said: set[str] = set()


def say_once(line: str) -> None:
    """Say what was not said before: every worker has the same lines."""
    if line not in said:
        said.add(line)
        note(line)


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
