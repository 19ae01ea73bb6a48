"""What a teacher says of one fixed picture: whether two machines, or two versions of its library, run the same network."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import BadInputError, MismatchError
from ..format.layout import PROBE
from ..store.nonfinite import finite_output
from ..store.store import Store

PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Relative L2 difference of the probe's output that another machine may show."""


def require_same_probe(store: Store, teacher) -> None:
    """Raise MismatchError if the teacher does not answer to the probe image as it did when the store was begun."""
    before, now = store.small_array(PROBE), probe_output(teacher, store.spec.layers)
    difference = float(np.linalg.norm(now - before) / np.linalg.norm(before))
    tolerance, then = PROBE_TOLERANCE[store.manifest.precision], store.manifest.software
    if not difference <= tolerance:
        raise MismatchError(
            f"{store.path}: {teacher.spec.name} answers to the probe image {difference:.2g} (relative L2) differently from when "
            f"the store was begun; up to {tolerance} is rounding. Software then: {then}. Continue on a machine "
            f"with that software, or delete {store.path}."
        )


def probe_image(size: int) -> np.ndarray:
    """A fixed picture without meaning: uint8 [size, size, 3], smooth gradients and stripes, the same everywhere."""
    y, x = np.mgrid[:size, :size]
    channels = [(x * 255) // size, (y * 255) // size, ((x * 7 + y * 3) % 64) * 4]
    return np.stack(channels, -1).astype("uint8")


def probe_output(teacher, layers: tuple[int, ...]) -> np.ndarray:
    """float32 [L, D]: mean whitened token of each layer on the probe image at the teacher's own size."""
    image = torch.from_numpy(probe_image(teacher.spec.image_size))[None].to(teacher.device)
    try:
        output, _ = finite_output(teacher, image, np.zeros(1, "int64"), layers, lambda _: "the probe image")
    except BadInputError as error:
        raise BadInputError(
            f"{teacher.spec.name} answers to the probe image with non-finite values, in fp32 too: the weights "
            f"{teacher.spec.weights} are damaged. Give others."
        ) from error
    return output.tokens[0].mean(1).cpu().numpy()
