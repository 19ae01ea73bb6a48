"""The directory of one run: what it is, and who is training in it.

config.json          written first: the config and the identity of the data as the run was begun, what a directory is checked by;
                     written again when something is changed under way
trainer.lock/        the claim of the trainer that works here (teacher_cache/files/claims.py); gone when none does
metrics.jsonl        one JSON object a step, in order, each step once however often the run was resumed; and one a probe (logs.py)
loggers/             what loggers must remember; what they write here is beside it: tensorboard/, wandb/, mlflow.db, metrics.csv
checkpoint-NNNNNNNN.safetensors
failed-NNNNNNNN.json what is known of a step that failed, see failures.py
*.partial            being written, each by a trainer of its own; a trainer that was killed may leave one, the next removes it
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import timm
import torch

from teacher_cache.files.claims import ClaimHeldError, claimed, is_name_of
from teacher_cache.files.durable import make_folder

from ..config import TrainConfig
from ..errors import RunError, RunMismatchError
from . import changes as history
from .checkpoint import CHECKPOINT, latest_checkpoint, recorded_description
from .logs import METRICS, ProbeReport, StepLogs, StepReport
from .provenance import require_same, require_same_config
from .run_files import LARGEST_JSON, PARTIAL, refusal_explained, require_held, require_own, write_whole

CONFIG = "config.json"
LOCK = "trainer.lock"


class RunDirectory:
    """Creates `path`, or opens it again if it holds the same run, for this trainer alone until `close`.

    A trainer of another host, which cannot be seen, is watched for some minutes, and then taken for dead if its claim has not
    moved. Raises RunMismatchError if the directory holds another run or other files or if another trainer is at work in it,
    RunError if its config.json is damaged.
    """

    def __init__(self, path: Path, config: TrainConfig, identity: dict):
        self.path = Path(path)
        self._config, self._identity = config, identity
        self._logs: StepLogs | None = None
        self._require_run_or_nothing()
        try:
            make_folder(self.path)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):  # ENOENT: below /proc
                raise
            raise RunError(f"{self.path}: cannot be made ({error.strerror}). Choose an --out that can be written to.") from error
        self._claim = ExitStack()
        try:
            self._claim.enter_context(claimed(self.path / LOCK, f"The run {self.path}"))
        except ClaimHeldError as error:
            raise RunMismatchError(
                f"{self.path} is in use: {error.holder} is training there. Wait for it, or stop it: after kill -TERM its "
                "last step is saved, and the same command goes on from there."
            ) from error
        self._is_held = True
        try:
            if (self.path / CONFIG).exists():
                self._require_same_run()
            for leftover in self.path.glob(f"*{PARTIAL}"):
                if not is_name_of(leftover.name, LOCK):  # somebody asks for the run, and is about to be refused
                    leftover.unlink()
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        self._is_held = False
        self._claim.close()

    def _require_run_or_nothing(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunMismatchError(f"{self.path} is a file. Choose a directory.")
        with refusal_explained(self.path):
            names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        is_run = CONFIG in names or any(map(CHECKPOINT.fullmatch, names))
        if not is_run and not all(map(_is_left_before_config, names)):
            raise RunMismatchError(f"{self.path} is not empty and holds no run of a student. Choose another directory.")

    def _require_same_run(self) -> None:
        there = read_description(self.path)
        config, identity = there["config"], there["identity"]
        require_same_config(f"The directory {self.path}", config, self._config)
        require_same(f"The directory {self.path}", "data", identity, self._identity)

    def describe(self, data_from: str = "", changes: Sequence[history.Change] = (), pixels: dict | None = None,
                 init: dict | None = None) -> bool:  # fmt: skip
        """Write config.json unless it is there and says the same of `changes`; whether this begins the run.

        For when a checkpoint that is here has proved to be of this run. data_from: see Trainer. changes: all of the run, from its
        begin. pixels, init: see checkpoint.Description.
        """
        is_new = not (self.path / CONFIG).exists()
        if is_new:
            made_by = {"torch": torch.__version__, "timm": timm.__version__}
            description = {"config": self._config.to_json(), "identity": self._identity, "made_by": made_by}
            description |= {"pixels": pixels} if pixels else {}
            description |= {"init": init} if init else {}
            description |= {"data_from": data_from} if data_from else {}
        else:
            description = read_description(self.path)
        if is_new or history.to_json(changes) != description.get("changes", []):
            description |= {"changes": history.to_json(changes)} if changes else {}
            if not changes:
                description.pop("changes", None)
            write_whole(self.path / CONFIG, (json.dumps(description, indent=2) + "\n").encode())
        return is_new

    def open_logs(self, step: int) -> None:
        """Start logging behind `step`; lines of later steps, which a resumed run will take again, are cut off."""
        if not self._is_held:
            raise RunError(f"This trainer has let go of {self.path}. Make another one to go on.")
        self._logs = StepLogs(self.path, step)

    @property
    def probed(self) -> int | None:
        """The last step that the log has a probe of; None without one, and before the log is open."""
        return self._logs.probed if self._logs else None

    def write(self, report: StepReport) -> None:
        """Log one step. RunError if another trainer has taken the run over."""
        require_held(self.path / METRICS)
        self._logs.write(report)

    def write_probe(self, report: ProbeReport) -> None:
        """Log what a probe found, durably. RunError if another trainer has taken the run over."""
        require_held(self.path / METRICS)
        self._logs.write_probe(report)

    def sync(self) -> None:
        """Make the log durable, before a checkpoint says that its steps are done."""
        self._logs.sync()

    def close(self) -> None:
        """End logging, and let another trainer in."""
        try:
            if self._logs is not None:
                self._logs.close()
        finally:
            self._let_go()


def _is_left_before_config(name: str) -> bool:
    """Whether this is all that a trainer killed in its first moments can leave."""
    return is_name_of(name, LOCK) or name.startswith(CONFIG) and name.endswith(PARTIAL)


def recorded_changes(folder: str | Path) -> tuple[history.Change, ...] | None:
    """What config.json says was changed in the run in `folder`; None if it is not there. RunError as `read_description`."""
    if not (Path(folder) / CONFIG).exists():
        return None
    return history.from_json(read_description(folder).get("changes", []), f"{Path(folder) / CONFIG}")


def recorded_identity(folder: str | Path) -> dict | None:
    """The identity of the data that the run in `folder` was begun with, of config.json or else its newest checkpoint; None if
    there is no run, or none that can be read, of which going on with it says more.
    """
    try:
        return read_description(folder)["identity"]
    except (RunError, OSError):
        newest = latest_checkpoint(folder)
        description = newest and recorded_description(newest)
        return description and description.identity


def read_description(folder: str | Path) -> dict:
    """What config.json says of the run in `folder`: `config` and `identity` of its data as it was begun, `made_by`, `changes`
    if anything was changed since, `init` if the encoder began from weights, and, if known, `pixels` (of both see
    checkpoint.Description) and `data_from`.

    Raises RunError if it is missing or cannot be read as that.
    """
    path = Path(folder) / CONFIG
    try:
        require_own(path)
        with refusal_explained(path), open(path, "rb") as file:
            there = json.loads(file.read(LARGEST_JSON))
        if not isinstance(there["config"], dict) or not isinstance(there["identity"], dict):
            raise TypeError("config and identity must be objects")
        return there
    except FileNotFoundError as error:
        raise RunError(f"{folder} is no run of student-train: {_instead(Path(folder))}. Give the folder of its --out.") from error
    except NotADirectoryError as error:
        raise RunError(f"{folder} is a file. Give the folder of a run: the --out of student-train.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read as the description of a run ({error!r}). Delete it: the command that began the run "
            "writes it again."
        ) from error


def _instead(folder: Path) -> str:
    """What is there in the place of a run."""
    if not folder.exists():
        return "there is no such folder"
    if (folder / "cache.json").exists():
        return "it is a cache"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"it has no {CONFIG}; it holds {', '.join(names[:3])}{' ...' * (len(names) > 3)}" if names else "it is empty"
