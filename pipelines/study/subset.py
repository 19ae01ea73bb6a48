"""Which images the study uses: drawn from each class alike, by a seed, and laid out as folders of their own."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import tarfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from student.seeds import position_seed
from teacher_cache.crops.images import scan
from teacher_cache.errors import MismatchError, UsageError
from teacher_cache.files.durable import ASIDE, canonical_json, sha256_file, sync_folder

from ..feed.labelled import LabelledImages

DONE = "subset.json"
"""Says what was drawn; its presence means that all of it is there."""
ARCHIVE = "archive.sha256"
"""Beside train/ and test/ of an archive: of which."""
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Subset:
    """How many images of each split; 0: all of them."""

    n_train: int = 5000
    n_test: int = 2000
    seed: int = 0


def fingerprints(data: Path) -> dict[str, str]:
    """Split -> `fingerprint` of its images."""
    return {split: fingerprint(data / split) for split in SPLITS}


def fingerprint(folder: Path) -> str:
    """SHA-256 of which images a folder has, by names, sizes and labels, as records of student-eval have it."""
    return LabelledImages(folder, 32).fingerprint()  # no image is read, so that the side says nothing


def drawn_of_each(labels: np.ndarray, n: int, seed: int, purpose: str) -> np.ndarray:
    """int64, ascending: `n` rows of `labels`, from each class as many as of any other, or one more.

    UsageError if a class has too few.
    """
    classes = np.unique(labels)
    chosen = []
    for place, label in enumerate(classes.tolist()):
        members = np.flatnonzero(labels == label)
        wanted = n // len(classes) + (place < n % len(classes))
        if wanted > len(members):
            raise UsageError(f"{n:,} images of {len(classes)} classes: one class has {len(members):,} alone. Ask for fewer.")
        key = np.array([position_seed(purpose, seed, label) % 2**63, 0], "uint64")
        noise = np.random.Philox(key=key).random_raw(len(members))
        chosen.append(members[np.argsort(noise, kind="stable")[:wanted]])
    return np.sort(np.concatenate(chosen))


def unpack(data: Path, into: Path) -> Path:
    """The folder with train/ and test/ that `data` is, or that it is unpacked to, once, if it is an archive.

    UsageError for anything else and for a damaged archive, MismatchError if another one was unpacked there.
    """
    if data.is_dir():
        folder = data
    elif data.is_file() and tarfile.is_tarfile(data):
        folder, sha256 = into / "unpacked", sha256_file(data)
        if not folder.exists():
            aside = into / f"unpacked{ASIDE}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                with tarfile.open(data) as archive:
                    archive.extractall(aside, filter="data")
            except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
                shutil.rmtree(aside)
                raise UsageError(f"--data {data}: it cannot be unpacked ({error}). Copy it anew.") from error
            (aside / ARCHIVE).write_text(sha256)
            aside.rename(folder)
            sync_folder(into)
        elif not (folder / ARCHIVE).exists():
            raise MismatchError(f"{folder} does not say from which archive it was unpacked. Move it away, or give another --out.")
        elif (found := (folder / ARCHIVE).read_text()) != sha256:
            raise MismatchError(
                f"{folder} was unpacked from another archive, of sha256 {found[:12]}; {data} has {sha256[:12]}. Give that one, "
                "or another --out."
            )
    else:
        raise UsageError(
            f"--data {data}: give an archive, or a folder, of images as train/CLASS/NAME.jpg and test/CLASS/NAME.jpg."
        )
    if missing := [split for split in SPLITS if not (folder / split).is_dir()]:
        raise UsageError(
            f"--data {data}: it has no {missing[0]}/. Images must lie as train/CLASS/NAME.jpg and test/CLASS/NAME.jpg."
        )
    return folder


def lay_out(data: Path, folder: Path, subset: Subset, prints: dict[str, str]) -> Path:
    """Copy the drawn images of `data` to train/ and test/ below `folder`, and return it; one that is complete stays as it is.

    data: as `unpack` gives it, and prints: its `fingerprints`. Raises MismatchError where `folder` holds other images than would
    be drawn, UsageError where fewer are there.
    """
    claim: dict[str, object] = asdict(subset)
    wanted = {}
    for split, n in (("train", subset.n_train), ("test", subset.n_test)):
        images = scan(data / split).images
        rows = drawn_of_each(images.labels, n, subset.seed, split) if n else range(len(images.names))
        wanted[split] = [images.names[row] for row in rows]
        claim[split] = prints[split]
    done = folder / DONE
    if done.is_file():
        if (found := json.loads(done.read_text())) != claim:
            raise MismatchError(f"{folder} holds other images ({found}) than are asked for ({claim}). Give another --out.")
        return folder
    aside = folder.with_name(folder.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    for split, names in wanted.items():
        for name in names:
            target = aside / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / split / name, target)
    (aside / DONE).write_bytes(canonical_json(claim))
    aside.rename(folder)
    sync_folder(folder.parent)
    return folder
