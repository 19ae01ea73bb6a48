"""student-train --probe: from its words to a probe, with all that can be wrong found before training."""

from __future__ import annotations

from pathlib import Path

from teacher_cache.errors import BadInputError, MismatchError, UsageError
from teacher_cache.words import human

KNN = "knn:"
SIDES = ("train", "val")


def probe_of(words: str, every: int, image_size: int, device: str):
    """The student.run.probing.Probe of `knn:DIR`, its images read. Raises UsageError, with the option, for what cannot be one."""
    import numpy as np

    from pipelines.feed.labelled import LabelledImages

    from ..evals.probe import MOST_BYTES, Kept, KNNProbe
    from ..run.probing import Probe
    from .evaluating.job import told_of_both

    if not words.startswith(KNN) or words == KNN:
        raise UsageError(f"--probe {words}: give knn:DIR, a folder with train/ and val/, which are folders of class folders.")
    folder = Path(words.removeprefix(KNN))
    if missing := [side for side in SIDES if not (folder / side).is_dir()]:
        there = f"it has no folder {missing[0]}/" if folder.is_dir() else "there is no such folder"
        raise UsageError(f"--probe {words}: {there}. Give a folder with train/ and val/, which are folders of class folders.")
    try:
        train, val = (LabelledImages(folder / side, image_size) for side in SIDES)
        n_classes = len(train.classes)
        train.only(val.classes)
        if len(val.classes) < 2:
            raise BadInputError(f"{folder / 'val'} has one class: there is nothing to tell apart. Give two or more.")
        n_bytes = sum(len(images) * 3 * image_size**2 for images in (train, val))
        if n_bytes > MOST_BYTES:
            raise BadInputError(
                f"{len(train) + len(val):,} images of {image_size} px are {human(n_bytes)} in memory, at most "
                f"{human(MOST_BYTES)} are kept. Give fewer: a few thousand tell enough."
            )
        sides = [
            Kept(np.concatenate(list(images.pixels())), np.array(images.labels), images.mean, images.std)
            for images in (train, val)
        ]
    except (BadInputError, MismatchError, UsageError) as error:
        raise UsageError(f"--probe {words}: {error}") from error
    about = {**told_of_both(train, val, n_classes), "image_size": image_size, "decoder": val.decoder}
    return Probe(KNNProbe(*sides, about, device=device), every)
