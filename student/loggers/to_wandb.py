"""Weights & Biases, online or offline (WANDB_MODE). A run of ours is one run there, by an id that is kept.

Online the server says which step it has. Offline the files of earlier processes say it: when a process is killed, W&B's own loses
what it has not written yet, and which steps that were nobody else knows.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from ..errors import ConfigError
from .follow import Ended, Kept, RunToLog
from .rows import Row

PROJECT = "teacher-cache"
"""Where a run goes, unless WANDB_PROJECT says otherwise."""


class ToWandb:
    """Once it has a step, W&B takes nothing more of it: so none is sent twice."""

    name: ClassVar[str] = "wandb"

    def __init__(self, run: RunToLog):
        self._run = run
        self._kept = Kept(run.folder, self.name)
        self._id = ""
        self._there = None

    @staticmethod
    def require() -> None:
        if os.environ.get("WANDB_MODE", "online") in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "W&B knows no login on this machine. Log in (`wandb login`, or WANDB_API_KEY=...), or set WANDB_MODE=offline, "
                "which keeps the run here for `wandb sync`."
            )

    def open(self) -> int:
        if self._there is not None:
            self._there.finish()
        self._id = self._kept.read().get("id") or secrets.token_hex(4)
        self._kept.write({"id": self._id})
        has = max((record.history.step.num for record in offline_history(self._run.folder, self._id)), default=-1)
        config = {**self._run.config.to_json(), "crops_id": self._run.identity.get("crops_id")}
        try:
            self._there = wandb.init(
                id=self._id, resume="allow", project=os.environ.get("WANDB_PROJECT") or PROJECT, config=config,
                name=os.environ.get("WANDB_NAME") or self._run.folder.resolve().name, dir=str(self._run.folder),
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  (of its service, of the network, of its settings)
            raise ConfigError(
                f"W&B cannot be logged to ({type(error).__name__}: {error}). Mend that, set WANDB_MODE=offline, or leave it out."
            ) from error
        return has if self._there.offline else self._there.starting_step - 1

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._there.log({"epoch": row.epoch, **row.values}, step=row.step)

    def close(self, ended: Ended) -> None:
        self._there.finish(exit_code=int(ended == "failed"))

    def where(self) -> str:
        if self._there.offline:
            return f"offline; wandb sync {self._run.folder / 'wandb'}/offline-run-*-{self._id} sends it"
        return str(self._there.url)


def offline_history(folder: Path, run_id: str) -> Iterator[Record]:
    """What was logged of a run offline, in order: records of wandb's protocol, `history` with its step and items.

    Of a file that ends in the middle, what is whole.
    """
    for path in sorted((folder / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")):
        for data in _framed(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                yield record


def _framed(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format behind a header of 7 bytes, as wandb writes it.

    Blocks of 32 KiB; a piece of a record has a checksum (4 bytes), its length (2) and its kind (1): whole, first, middle, last.
    """
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # no room for a piece: filled with zeros
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if kind not in (1, 2, 3, 4) or place + 7 + length > len(data):
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
