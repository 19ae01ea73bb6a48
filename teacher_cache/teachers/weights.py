"""From `--weights` to a filled model: files in the layouts that teachers are published in, or seeded random numbers.

Loading is strict. A name in the file is the model's, or is known to belong to something else, or is an error; a name
of the model that the file lacks is an error. What strictness cannot see: names and shapes do not tell how many heads
a ViT has, which activation it was trained with, nor which of two trainings of one architecture a file holds. Where a
file shows that in another way (a wrapper, a position table, a part beside the tower), the modules beside this one
look there and say so.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..durable import sha256_file
from ..errors import BadInputError, UsageError
from . import TeacherEntry
from .weight_files import read_file

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layout:
    """How the names in a published file map to the model's own."""

    keep: tuple[tuple[str, str], ...] = (("", ""),)
    """(beginning in the file, beginning in the model) of names that belong to the model; the first pair that fits counts."""
    ignore: tuple[str, ...] = ()
    """Names that belong to something else, as shell patterns; looked at before `keep`."""
    require: tuple[str, ...] = ()
    """Names of something else that must be there: without them the file is another model's that has the same tower."""
    inside: tuple[str, ...] = ()
    """Entries of the file to go into first, one within the other, such as `("state_dict",)`; skipped where absent."""

    def unwrap(self, found: dict) -> dict:
        for entry in self.inside:
            inner = dict.get(found, entry)
            found = inner if isinstance(inner, dict) else found
        return {str(name): value for name, value in dict.items(found)}

    def own_name(self, name: str) -> str | None:
        """The model's name for a name in the file; None if it is not the model's."""
        return next((own + name.removeprefix(start) for start, own in self.keep if name.startswith(start)), None)

    def name_in_file(self, own_name: str) -> str:
        return next(start + own_name.removeprefix(own) for start, own in self.keep if own_name.startswith(own))


@dataclass(frozen=True)
class LoadedWeights:
    """Where the numbers in a model came from."""

    source: str
    """The file's name, or `random:SEED`."""
    sha256: str
    ignored: tuple[str, ...] = ()
    """Names in the file that were left out by the rules."""


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
    model: nn.Module, weights: str | os.PathLike, layouts: Iterable[Layout] = (Layout(),), pickled: Iterable[str] = ()
) -> LoadedWeights:
    """Fill all parameters of `model` from a file or, for `random:SEED`, with seeded numbers.

    layouts: those that the file may have; the first one that has names in the file counts
    pickled: see `TeacherEntry.pickled`
    Raises UsageError for a malformed seed, BadInputError for a file that is missing, damaged, no weights
    file, or whose names and shapes are not exactly the model's.
    """
    if is_random(weights):
        random_weights(model, parse_seed(str(weights)))
        return LoadedWeights(str(weights), sha256_tensors(model.state_dict()))

    path = Path(weights)
    ignored = _fill(model, read_file(path, pickled), layouts, path)
    return LoadedWeights(path.name, sha256_file(path), tuple(ignored))


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


def _fill(model: nn.Module, found: dict, layouts: Iterable[Layout], path: Path) -> list[str]:
    """Copy what belongs to the model into its parameters, as float32; returns the names left out by rule, sorted."""
    for layout in layouts:
        inner = layout.unwrap(found)
        if any(layout.own_name(name) is not None for name in inner):
            break

    tensors, ignored, foreign = {}, [], []
    for name, value in inner.items():
        own_name = layout.own_name(name)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in layout.ignore):
            ignored.append(name)
        elif own_name is None or own_name in tensors:
            foreign.append(name)
        else:
            tensors[own_name] = value
    _require_fit(model, tensors, foreign, [name for name in layout.require if name not in inner], layout, path)

    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if damaged := [layout.name_in_file(name) for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise BadInputError(f"--weights {path}: {_listed('with NaN or infinite values', damaged)}.")
    model.load_state_dict(tensors, strict=True)
    return sorted(ignored)


def _require_fit(model: nn.Module, tensors: dict, foreign: list[str], absent: list[str], layout: Layout, path: Path) -> None:
    """Raise BadInputError, listing what differs by its name in the file, unless all names, shapes and kinds are the model's."""
    own, name_in_file = model.state_dict(), layout.name_in_file
    missing = [name_in_file(name) for name in own.keys() - tensors.keys()]
    foreign = foreign + [name_in_file(name) for name in tensors.keys() - own.keys()]
    shared = own.keys() & tensors.keys()
    shapes = {name: tuple(getattr(tensors[name], "shape", ())) for name in shared}
    reshaped = [f"{name_in_file(n)}: {shapes[n]} instead of {tuple(own[n].shape)}" for n in shared if shapes[n] != own[n].shape]
    unusable = [name_in_file(name) for name in shared if not _is_plain_float(tensors[name])]
    complaints = [
        _listed("missing", missing + absent),
        _listed("unexpected", foreign),
        _listed("of another shape", reshaped),
        _listed("not floating point", unusable),
    ]
    if any(complaints):
        raise BadInputError(
            f"--weights {path} does not fit this teacher: {'; '.join(filter(None, complaints))}. "
            "Give the file published for it (`teacher-cache teachers` names it)."
        )


def _is_plain_float(value) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in FLOATS


def _listed(what: str, names: Iterable[str]) -> str:
    """`3 missing (a, b, c)`, the first few names; empty for none."""
    names = sorted(names)
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {what} ({shown})" if names else ""
