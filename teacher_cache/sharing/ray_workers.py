"""What a worker of Ray does on its node: it checks that it fits, and makes the pieces that it is told to. Knows nothing of Ray.

It writes its shards itself, under the claim of their range; what it returns is a receipt of less than 1 kB. Nothing depends on
receipts: a shard is made when its commit record is there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..cache import Cache
from ..errors import ClaimLostError, MismatchError, NoSpaceError, NotInCacheError, UsageError
from ..extraction.cropping import CropJob, cut_part
from ..extraction.make import TargetRequest, plan_cache
from ..extraction.planning import CropRequest, in_words_of
from ..extraction.ranks import Process, share_processors
from ..extraction.record import software
from ..files.claims import ClaimHeldError
from ..files.range_claims import claimed_range
from ..format.layout import store_claims
from ..store import failures
from ..store.failures import Failure, in_words, is_of_a_shard
from ..terminal.progress import Progress, told_to
from .blocks import FRESH_FAILURES, THIS_MACHINE

MOST_CHARACTERS = 500
"""Of the words of a receipt, and of its lines together."""


@dataclass(frozen=True)
class Receipt:
    """What came of a call."""

    who: str
    outcome: str = "made"
    """`made`; `held`: by somebody else; `refused`: this node does not fit; `failed`: a piece; `stop`: nobody could go on."""
    words: str = ""
    lines: tuple[str, ...] = ()
    """What a single process would have printed."""


@dataclass(frozen=True)
class Plan:
    """What there is to make, as the first worker found it out; what every other one has to agree with."""

    lines: tuple[str, ...]
    job: CropJob | None
    """The crops that are missing."""
    n_rows: int
    shard_rows: int
    n_shards: int
    """Of each store."""
    stores: tuple[Path, ...]
    """By view."""
    weights_sha256: str
    software: dict[str, str]


class _Worker:
    """A process on a node. n_beside: how many share its processors, itself among them."""

    def __init__(self, n_beside: int = 1):
        self.who = f"process {os.getpid()} on {socket.gethostname()}"
        share_processors(n_beside)

    def _receipt(self, start: Callable[[], None], work: Callable[[], None] = lambda: None) -> Receipt:
        """Do both, and say how it ended, whatever happens. A full disk is everybody's fault; what any piece would meet here, and
        all that happens in `start`, the node's; the rest the piece's."""
        lines: list[str] = []
        outcome, words, is_started = "made", "", False
        with told_to(lines.append, None):
            try:
                start()
                is_started = True
                work()
            except (ClaimHeldError, ClaimLostError) as error:
                outcome, words = "held", str(error)
            except (NoSpaceError, NotInCacheError) as error:
                outcome, words = "stop", str(error)
            except Exception as error:
                is_of_piece = is_started and is_of_a_shard(error) and not isinstance(error, UsageError)
                outcome, words = "failed" if is_of_piece else "refused", in_words(error)
        return Receipt(self.who, outcome, _cut(words), tuple(_cut("\n".join(lines)).splitlines()))


class Extractor(_Worker):
    """Makes shards with a teacher, which it loads once."""

    def __init__(self, path: Path, crops: CropRequest, request: TargetRequest, n_beside: int = 1):
        super().__init__(n_beside)
        self.path, self.crops, self.request = path, crops, request
        self._work = None
        self._fillings: dict = {}
        self._n_fresh_failures = 0

    def start(self, plan: Plan | None = None, witness: Path | None = None) -> Receipt:
        """Load the teacher. plan, witness: as for `make`; None: there is none yet."""
        return self._receipt(lambda: self._start(plan, witness))

    def plan(self) -> Plan:
        """What there is to make. To be asked behind `start`."""
        spec = self._work.targets.plan.store_spec(self._described(), self._work.crops.n_images)
        job = self._work.crops.job
        return Plan(
            tuple(self._lines), None if job is None else replace(job), spec.n_rows, spec.shard_rows, spec.n_shards,
            self._work.targets.stores, self._work.targets.teacher.spec.weights_sha256, software(),
        )  # fmt: skip

    def make(self, view: int, first: int, last: int, plan: Plan, witness: Path) -> Receipt:
        """Make shards first, ..., last - 1 of a view's store. witness: a file that whoever gives the orders sees in the cache."""

        def work() -> None:
            filling, own = self._filling(view), range(first, last)
            what = f"The store {filling.path}"
            with filling.losses_explained(own), claimed_range(store_claims(filling.path), first, last, what) as claim:
                missing = [shard for shard in filling.store.unfinished() if shard in own]
                try:
                    if missing:
                        filling.make(missing, Progress(what, 0, "crops"), claim.report)
                        self._n_fresh_failures = 0
                except Exception as error:
                    self._require_sound(failures.blame(filling.store, own, error), error)
                    raise
                failures.forget(filling.path, own)
                if not filling.store.unfinished():
                    filling.complete()

        return self._receipt(lambda: self._start(plan, witness), work)

    def _require_sound(self, failed: tuple[Failure, int] | None, error: Exception) -> None:
        """Raise MismatchError if so many shards have failed here that it is not theirs."""
        self._n_fresh_failures += failed is not None and failed[0].counts and failed[1] == 1
        if self._n_fresh_failures >= FRESH_FAILURES:
            raise MismatchError(f"{THIS_MACHINE} {in_words(error)}") from error

    def _filling(self, view: int):
        """The store of a view, begun; what filling it needs is opened and compared once."""
        from ..extraction.extract import Filling

        if view not in self._fillings:
            targets = self._work.targets
            filling = Filling(Cache(self.path).finished_view(view), targets.name, targets.teacher, targets.plan, lambda _: None)
            filling.begin()
            self._fillings[view] = filling
        return self._fillings[view]

    def _described(self):
        return in_words_of(self.path, self._work.targets.name, self._work.targets.teacher.spec)

    def _start(self, plan: Plan | None, witness: Path | None) -> None:
        _require_seen(witness)
        if plan is not None:
            _require_software(plan)
        if self._work is None:
            from ..kernels import sigbus

            self._lines: list[str] = []
            with told_to(self._lines.append, None):
                self._work = plan_cache(self.path, self.crops, self.request, None, Process())
            sigbus.install()
        found = self._work.targets.teacher.spec
        if plan is not None and found.weights_sha256 != plan.weights_sha256:
            raise MismatchError(
                f"{found.weights} has sha256 {found.weights_sha256[:12]}, elsewhere {plan.weights_sha256[:12]}. Copy the same "
                "weights to every node."
            )


class Cutter(_Worker):
    """Cuts parts of the crop stage. witness: the claim of whoever gives the orders."""

    def __init__(self, job: CropJob, witness: Path, n_beside: int = 1):
        super().__init__(n_beside)
        self.job, self.witness = job, witness

    def start(self) -> Receipt:
        return self._receipt(self._start)

    def make(self, _: int, first: int, last: int) -> Receipt:
        """Cut and commit parts first, ..., last - 1."""

        def work() -> None:
            for part in range(first, last):
                if views := self.job.work.missing_views(part):
                    _require_seen(self.witness)
                    cut_part(self.job, part, views)

        return self._receipt(self._start, work)

    def _start(self) -> None:
        _require_seen(self.witness)
        if not self.job.images_dir.is_dir():
            raise MismatchError(f"{self.job.images_dir} is not there. Every node has to see the images under one path.")
        self.job.work.require_begun_alike(self.job.identity)


def _require_seen(witness: Path | None) -> None:
    if witness is not None and not witness.exists():
        raise MismatchError(
            f"{witness} is not there: either this node does not see the file system of the process that gives the orders, or "
            "that process is gone. Every node has to see one file system under one path."
        )


def _require_software(plan: Plan) -> None:
    here = software()
    if differing := [f"{name} {here.get(name)} (elsewhere {plan.software[name]})" for name in plan.software
                     if here.get(name) != plan.software[name]]:  # fmt: skip
        raise MismatchError(f"This node has other software, on which bytes may depend: {', '.join(differing)}. Install the same.")


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 4]} ..."
