"""One cell: its cache, its student, its evaluations, all by the commands a user types, and its record."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from teacher_cache.errors import TeacherCacheError, UsageError
from teacher_cache.terminal.signals import INTERRUPTED, STOPPED

from .. import records
from ..cells import KINDS, METHODS, Cell, overrides, wall_epochs
from ..records import Scale
from .machine import machine
from .making import cache_with
from .teaching import PLANS, WEIGHTS, train_teacher

KNN = ("--neighbours", "20")
FINETUNE = {"layer_decay": 0.75, "drop_path": 0, "warmup_epochs": 1, "magnitude": 0, "mixup": 0, "cutmix": 0, "erasing": 0}
"""Beside batch and epochs: few steps on small images bear no strong augmentation. Set before anything was run."""
FINETUNE_PEAK = 1e-3


class CellError(TeacherCacheError):
    """A command of a cell has ended with an error, which it has said."""


@dataclass
class Study:
    """A folder of cells, all of one scale and one set of images."""

    out: Path
    images: Path
    """With train/ and test/, as subset.lay_out left them."""
    all_train: Path
    """What teachers learn from."""
    scale: Scale
    about: dict
    """study.json."""
    device: str = "cpu"
    commands: list[str] = field(default_factory=list)
    """Of the cell that is under way."""
    _weights: dict[str, Path] = field(default_factory=dict)

    def run(self, cell: Cell) -> dict:
        """Do what is missing of a cell and put it on record; returns the record. Raises what its steps raise, CellError too."""
        self.commands, where = [], machine()
        if cell.wall and (epochs := self.epochs(cell)) == self.scale.epochs:
            record = {**records.read(records.record_path(self.out, cell.base.name)), "cell": cell.__dict__, "name": cell.name,
                      "same_run_as": cell.base.name}  # fmt: skip
            records.write(self.out, record)
            return record
        evaluations, work = self.out / "evaluations" / f"{cell.name}.jsonl", self.out / "runs" / cell.name
        evaluations.unlink(missing_ok=True)
        cost, epochs = None, None
        if cell.method == "teacher":
            what, extra = "demo", ("--weights", self.weights(cell.kind))
        elif cell.method == "random":
            what, extra = f"random:{cell.seed}", ("--like", METHODS["mae"])
        else:
            epochs = self.epochs(cell)
            cost = self.train(cell, epochs, work)
            what, extra = work, ()
        started = time.monotonic()
        self.evaluate(cell, what, extra, evaluations)
        seconds = {"extraction": cost["seconds"] if cost and cell.source == "cache" and cell.needs_teacher else 0.0,
                   "training": training_seconds(work, self.scale.batch_size) if cost else 0.0,
                   "evaluation": round(time.monotonic() - started, 1)}  # fmt: skip
        record = {
            "format": records.FORMAT, "cell": cell.__dict__, "name": cell.name, "study": self.about, "commands": self.commands,
            "epochs": epochs, "storage": cost, "seconds": seconds, **where,
            "run": json.loads((work / "config.json").read_text()) if cost else None,
            "teacher": self.teacher_facts(cell),
            "evaluations": [json.loads(line) for line in evaluations.read_text().splitlines()],
        }  # fmt: skip
        records.write(self.out, record)
        return record

    def weights(self, kind: str) -> Path:
        """The weights of a teacher, which is trained, or compared with what is asked for, when first asked."""
        assert kind in KINDS
        if kind not in self._weights:
            self._weights[kind] = train_teacher(PLANS[kind], self.all_train, self.out / "teachers" / kind, self.device)
        return self._weights[kind]

    def teacher_facts(self, cell: Cell) -> dict | None:
        """What is on record of the teacher that a cell, or its cache, has met."""
        path = self.out / "teachers" / cell.kind / WEIGHTS
        facts = path.with_suffix(".json")
        return json.loads(facts.read_text()) if cell.needs_teacher and facts.exists() else None

    def epochs(self, cell: Cell) -> int:
        """Those of the study, or for equal wall time as many as take as long as MAE's. CellError without the records of these."""
        if not cell.wall:
            return self.scale.epochs
        needed = [cell.base, Cell("mae", cell.seed)]
        paths = [records.record_path(self.out, other.name) for other in needed]
        if missing := [path.stem for path in paths if not path.exists()]:
            raise CellError(f"{cell.name} takes its epochs from the seconds of {' and '.join(missing)}: run these cells first.")
        own, mae = (records.read(path)["seconds"]["training"] for path in paths)
        return wall_epochs(self.scale.epochs, own, mae)

    def train(self, cell: Cell, epochs: int, run: Path) -> dict:
        """Make the cell's cache if need be and train its student; what the cache cost."""
        from student.cli.train import train

        images, weights = self.images / "train", None
        if cell.source == "fresh":
            weights = self.weights(cell.kind)
            cache, cost = cache_with(self.out / "caches" / "crops", images, epochs, None, None, self.device)
        else:
            weights = self.weights(cell.kind)
            folder = self.out / "caches" / f"{cell.kind}-{cell.code.replace(':', '')}"
            cache, cost = cache_with(folder, images, cell.views, cell.code, weights, self.device)
        live = () if cell.source == "cache" else ("--live", "--weights", weights)
        live += ("--raw-targets",) if cell.switch == "raw" else ()
        settings = [part for change in overrides(cell, epochs, self.scale.batch_size) for part in ("--set", change)]
        self.command(train, "student-train", "--cache", cache.path, "--preset", cell.preset, "--out", run, "--accept-mismatch",
                     "--views", cost["views"], "--device", self.device, "--keep-checkpoints", 1, *live, *settings)  # fmt: skip
        if not cell.needs_teacher or live:
            cost = {**cost, "target_bytes_a_crop": 0.0,
                    "bytes": round(cost["crop_bytes_a_crop"] * cache.n_images * cost["views"])}  # fmt: skip
        return cost

    def evaluate(self, cell: Cell, what, extra: tuple, evaluations: Path) -> None:
        from student.cli.evaluate import evaluate

        sides = ("--train", self.images / "train", "--val", self.images / "test", "--record", evaluations)
        frozen = (*sides, "--features", self.out / "features", "--device", self.device, *extra)
        self.command(evaluate, "student-eval", "knn", what, *frozen, *KNN)
        self.command(evaluate, "student-eval", "linear", what, *frozen, "--readout", "mean")
        if is_finetuned(cell, self.scale):
            batch = self.scale.finetune_batch
            settings = {"epochs": self.scale.finetune_epochs, "batch_size": batch, "base_rate": FINETUNE_PEAK * 256 / batch,
                        **FINETUNE}  # fmt: skip
            if settings["epochs"] <= settings["warmup_epochs"]:
                settings["warmup_epochs"] = 0
            changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value:g}")]
            self.command(evaluate, "student-eval", "finetune", what, "--out", self.out / "finetuned" / cell.name, *sides,
                         "--recipe", "mae-b", "--share", self.scale.finetune_share, "--workers", 1, "--device", self.device,
                         *extra, *changes)  # fmt: skip

    def command(self, command: click.Command, program: str, *arguments) -> None:
        """Print a command as a user would type it, and run it in this process. CellError where it ends with an error."""
        words = [str(argument) for argument in arguments]
        self.commands.append(" ".join([program, *words]))
        click.secho(f"\n$ {self.commands[-1]}", bold=True)
        try:
            command.main(args=words, prog_name=program, standalone_mode=False)
        except SystemExit as stop:
            if stop.code in (INTERRUPTED, STOPPED):
                raise
            if stop.code:
                raise CellError(f"{program} ended with exit code {stop.code}; what was wrong stands above.") from stop
        except click.ClickException as error:
            raise CellError(f"{program}: {error.format_message()}") from error


def is_finetuned(cell: Cell, scale: Scale) -> bool:
    """Whether a cell is one of the table of methods at equal epochs; a teacher runs frozen only."""
    main = cell.method == "random" or cell == Cell(cell.method, cell.seed) and cell.method in METHODS
    return main and cell.seed < scale.finetune_seeds


def training_seconds(run: Path, batch_size: int) -> float:
    """Seconds of all steps of a run, by its metrics.jsonl: without start, checkpoints, and whatever an interruption cost."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    if not lines:
        raise UsageError(f"{run / 'metrics.jsonl'} is empty. Delete the run and start the cell again.")
    return round(sum(batch_size / json.loads(line)["images_per_s"] for line in lines), 2)
