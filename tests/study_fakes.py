"""Images and records for the tests of the study."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.study import records
from pipelines.study.cells import Cell
from pipelines.study.records import Scale

STUDY = {"format": records.FORMAT, "scale": asdict(Scale()), "images": {"train": "a", "test": "b"}}


def write_splits(folder: Path, n_train: int = 16, n_test: int = 8) -> Path:
    """train/ and test/ of two classes, dark and bright noise: each image a function of its place."""
    for split, n in (("train", n_train), ("test", n_test)):
        for label, name in enumerate(("dark", "bright")):
            (folder / split / name).mkdir(parents=True)
            for index in range(n // 2):
                draws = np.random.default_rng([label, index, split == "test"])
                pixels = draws.integers(0, 120, (32, 32, 3)) + 100 * label
                Image.fromarray(pixels.astype("uint8")).save(folder / split / name / f"{index:03d}.png")
    return folder


def made_record(cell: Cell, knn: float, linear: float | None = None, target_bytes: float = 1000.0, seconds: float = 10.0) -> dict:
    """A record as a cell would leave it, of crops of 100 bytes and 50 images."""
    found = [("knn", "mean", knn), ("knn", "cls", knn - 0.01), ("linear", "mean", knn if linear is None else linear)]
    evaluations = [{"evaluator": name, "readout": readout, "protocol": f"{name} of a test", "main": "m",
                    "results": {"m": {"mean": value}}} for name, readout, value in found]  # fmt: skip
    storage = {"views": cell.views, "seconds": 4.0, "whole": True, "crop_bytes_a_crop": 100.0,
               "target_bytes_a_crop": target_bytes, "bytes": 50 * cell.views * (100 + target_bytes)}  # fmt: skip
    return {
        "format": records.FORMAT, "cell": asdict(cell), "name": cell.name, "study": STUDY, "commands": ["x"], "commit": "abc",
        "hardware": {"cpu": "c", "n_cpus": 2, "gpu": None, "device": "cpu"}, "epochs": 8, "teacher": None, "run": None,
        "seconds": {"extraction": 4.0, "training": seconds, "evaluation": 1.0}, "storage": storage, "evaluations": evaluations,
    }  # fmt: skip
