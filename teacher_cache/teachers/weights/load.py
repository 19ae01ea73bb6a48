"""From `--weights` to a filled model: files in the layouts that teachers are published in, or seeded random numbers.

Loading is strict (file_parts.py). A name in the file is the model's, or is known to belong to something else, or is an
error; a name of the model that the file lacks is an error. What strictness cannot see: names and shapes do not tell how
many heads a ViT has, which activation it was trained with, nor which of two trainings of one architecture a file holds.
Where a file shows that in another way (a wrapper, a position table, a part beside the tower), the modules beside this
one look there and say so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...errors import BadInputError, UsageError
from ...files.durable import sha256_file
from .. import TeacherEntry
from .files import read_file
from .parts import Layout, choose, listed, split_key
from .renaming import in_own_names

PUBLISHED = "Give the file published for it (`teacher-cache teachers` names it)."


@dataclass(frozen=True)
class LoadedWeights:
    """Where the numbers in a model came from."""

    source: str
    """The file's name, `FILE#KEY`, or `random:SEED`."""
    sha256: str
    """Of the file where it alone says which weights are meant, also by a needless KEY; else of the tensors."""
    ignored: tuple[str, ...] = ()
    """Names in the file that were left out by the rules."""
    how: str = ""
    """What about the file is worth saying: the part that was taken, float kinds narrower than the model's."""


def require_weights(entry: TeacherEntry, weights: str | os.PathLike | None) -> str | os.PathLike:
    """The weights, or UsageError saying which file this teacher needs."""
    if weights is None:
        raise UsageError(
            f"Teacher {entry.name} needs its weights, which are not shipped here: {entry.weights_from}. Add --weights PATH. "
            "For a trial without the file: --weights random:0."
        )
    return weights


def is_random(weights: str | os.PathLike) -> bool:
    return str(weights).startswith("random:")


def load_weights(
    model: nn.Module,
    weights: str | os.PathLike,
    layouts: Iterable[Layout] = (Layout(),),
    pickled: Iterable[str] = (),
    expected: str = PUBLISHED,
) -> LoadedWeights:
    """Fill all parameters of `model` from a file or, for `random:SEED`, with seeded numbers.

    weights:  PATH, PATH#KEY (see file_parts.py) or random:SEED
    layouts:  those that the file may have; the first one that has names in the file counts first
    pickled:  see `TeacherEntry.pickled`
    expected: a sentence for errors: which file to give
    Raises UsageError for a malformed seed, or a key that is not there or is needed; BadInputError for a file that is missing,
    damaged, no weights file, or whose names and shapes are not exactly the model's.
    """
    if is_random(weights):
        random_weights(model, parse_seed(str(weights)))
        return LoadedWeights(str(weights), sha256_tensors(model.state_dict()))

    given, layouts = str(weights), tuple(layouts)
    path, key = split_key(given)
    own = model.state_dict()
    reading = in_own_names(read_file(path, pickled), own)
    found, layouts = reading.found, tuple(replace(layout, ignore=layout.ignore + reading.ignore) for layout in layouts)
    if reading.title:
        expected = f"It was read as {reading.title} and renamed: names that are not in it are this teacher's own. {expected}"
    part = choose(found, key, layouts, own, given, expected)
    tensors = {name: tensor.float() for name, tensor in part.tensors.items()}
    if damaged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        is_half = any(part.tensors[name].dtype == torch.float16 for name in damaged)
        overflow = " Perhaps they were beyond 65,504, where float16 ends: give the file in float32." if is_half else ""
        names = listed("with NaN or infinite values", map(part.name_in_file, damaged))
        raise BadInputError(f"--weights {given}: {names}.{overflow}")
    model.load_state_dict(tensors, strict=True)

    says_itself = key is None or _is_chosen_without_key(part, found, layouts, own)
    narrow = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.tensors.values()} & {"float16", "bfloat16"})
    taken = [f"in the names of {reading.title}"] * bool(reading.title)
    taken += ([f"from {part.key}"] if part.key else []) + [f"stored as {kind}" for kind in narrow]
    return LoadedWeights(
        path.name if key is None else f"{path.name}#{key}",
        sha256_file(path) if says_itself else sha256_tensors(model.state_dict()),
        tuple(sorted(part.ignored)),
        ", ".join(taken),
    )


def _is_chosen_without_key(part, found: dict, layouts: tuple[Layout, ...], own: dict[str, Tensor]) -> bool:
    """Whether the file would give the very same tensors if no key were given."""
    try:
        alone = choose(found, None, layouts, own, "", "")
    except (BadInputError, UsageError):
        return False
    return all(alone.tensors[name] is tensor for name, tensor in part.tensors.items())


def parse_seed(weights: str) -> int:
    """SEED of `random:SEED`."""
    seed = weights.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 20 and int(seed) < 2**63):
        raise UsageError(f"--weights {weights}: the seed must be a whole number from 0, as in --weights random:0.")
    return int(seed)


def random_weights(model: nn.Module, seed: int) -> None:
    """Fill `model` with numbers that depend on its parameters' names and shapes and on `seed` alone.

    Not an initialisation to train from: weights are drawn wide enough (1 / sqrt(inputs)) that attention is
    not flat and tokens differ, norms get a scale near 1 and a shift that is not zero, so that a test which
    drops either fails. The global random state is neither read nor changed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            numbers = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and parameter.ndim > 1:
                numbers /= (parameter.numel() / parameter.shape[0]) ** 0.5
            elif name.endswith(("weight", "gamma")):  # scales of norms, LayerScale
                numbers = 1 + 0.1 * numbers
            else:  # biases, position tables, class tokens, projections
                numbers *= 0.1
            parameter.copy_(numbers)


def sha256_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and little-endian bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
