"""What is kept of a study: what it is, and of each cell one JSON file that says all its figures depend on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from teacher_cache.errors import MismatchError, UsageError
from teacher_cache.files.durable import make_folder, write_whole

STUDY, RECORDS = "study.json", "records"
FORMAT = 1
NEEDED = ("format", "cell", "name", "study", "commands", "commit", "hardware", "seconds", "evaluations")


@dataclass(frozen=True)
class Scale:
    """How large a study is; the defaults are for two CPUs. Cells of one folder are all of one scale and one set of images."""

    n_train: int = 5000
    n_test: int = 2000
    """Images of each split, drawn from each class alike; 0: all."""
    epochs: int = 8
    batch_size: int = 64
    finetune_epochs: int = 4
    finetune_share: float = 0.2
    """Of the training images that fine-tuning learns from."""
    finetune_batch: int = 32
    finetune_seeds: int = 2
    """Of each method only the first so many are fine-tuned."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "finetune_epochs", "finetune_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if self.n_train < 0 or self.n_test < 0 or not 0 < self.finetune_share <= 1:
            raise UsageError("n_train and n_test must not be negative, and finetune_share must be in 0..1.")


def require_same(folder: Path, scale: Scale, images: dict[str, str]) -> dict:
    """What a study of these is; MismatchError that names what differs if `folder` holds another.

    images: split -> fingerprint of all images that were given.
    """
    wanted = {"format": FORMAT, "scale": asdict(scale), "images": images}
    path = folder / STUDY
    if path.exists():
        found = json.loads(path.read_text())
        odd = [f"{part} {key}" for part in ("scale", "images") for key, value in wanted[part].items()
               if found.get(part, {}).get(key) != value]  # fmt: skip
        if odd or found.get("format") != FORMAT:
            raise MismatchError(
                f"{folder} holds a study of other {', '.join(odd) or 'format'} than asked for. Give the data and settings it "
                "was begun with, which are in study.json, or another --out."
            )
        return found
    return wanted


def begin(folder: Path, scale: Scale, images: dict[str, str]) -> dict:
    """`require_same`, and write down what was not."""
    wanted = require_same(folder, scale, images)
    if not (folder / STUDY).exists():
        make_folder(folder)
        write_whole(folder / STUDY, json.dumps(wanted, indent=1, sort_keys=True).encode())
    return wanted


def record_path(folder: Path, name: str) -> Path:
    return folder / RECORDS / f"{name}.json"


def write(folder: Path, record: dict) -> None:
    """Put a cell on record; its presence means that the cell is done."""
    make_folder(folder / RECORDS)
    write_whole(record_path(folder, record["name"]), json.dumps(record, indent=1, sort_keys=True).encode())


def read(path: Path) -> dict:
    """One record. UsageError, with the file, for what is none."""
    try:
        record = json.loads(path.read_text())
        missing = [name for name in NEEDED if name not in record]
        if missing or record["format"] != FORMAT or record["name"] != path.stem:
            raise ValueError(f"it lacks {missing[0]!r}" if missing else "its format or its name is another")
        for found in record["evaluations"]:
            if not math.isfinite(found["results"][found["main"]]["mean"]):
                raise ValueError(f"{found['evaluator']} is no number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no record of a cell ({error}). Delete it, and run the study again.") from error
    return record


def read_all(folder: Path) -> dict[str, dict]:
    """{name: record} of all cells that are done. UsageError where there are none, or where one is of another study."""
    records = {path.stem: read(path) for path in sorted((folder / RECORDS).glob(record_path(folder, "*").name))}
    if not records:
        raise UsageError(f"{folder} holds no records. Make them: python -m pipelines.study run --data DIR --out {folder}")
    studies = {json.dumps(record["study"], sort_keys=True) for record in records.values()}
    if len(studies) != 1:
        raise UsageError(f"{folder} holds records of {len(studies)} studies, of other images or scale. Keep those of one.")
    return records


def accuracy(record: dict, evaluator: str, readout: str = "mean") -> float | None:
    """0..1 of the evaluator's main result; None if the cell was not measured so."""
    for found in record["evaluations"]:
        if found["evaluator"] == evaluator and (evaluator == "finetune" or found["readout"] == readout):
            return found["results"][found["main"]]["mean"]
    return None
