"""From `--weights` to a filled model: files in the layouts that teachers are published in, or seeded random numbers.

Loading is strict. A name in the file is the tower's, or is known to belong to something else, or is an error;
a name of the model that the file lacks is an error. Nothing is unpickled: torch.load runs with weights_only,
TorchScript archives have their own reader, and safetensors hold no code.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..durable import sha256_file
from ..errors import BadInputError, UsageError


@dataclass(frozen=True)
class KeyRules:
    """How the names in a published file map to the tower's own."""

    keep: str = ""
    """Only names with this prefix belong to the tower; the prefix is cut off. Empty: all of them."""
    ignore: tuple[str, ...] = ()
    """Names that belong to something else; with a dot at the end, all names that begin so. Looked at before `keep`."""
    inside: tuple[str, ...] = ()
    """Entries of the file to go into first, one within the other, such as `("state_dict",)`; skipped where absent."""


@dataclass(frozen=True)
class LoadedWeights:
    """Where the numbers in a model came from."""

    source: str
    """The file's name, or `random:SEED`."""
    sha256: str
    ignored: tuple[str, ...] = ()
    """Names in the file that were left out by the rules."""


def load_weights(model: nn.Module, weights: str | os.PathLike, rules: KeyRules) -> LoadedWeights:
    """Fill all parameters of `model` from a file or, for `random:SEED`, with seeded numbers.

    Raises UsageError for a malformed seed, BadInputError for a file that is missing, damaged, no weights
    file, or whose names and shapes are not exactly the model's.
    """
    if str(weights).startswith("random:"):
        random_weights(model, parse_seed(str(weights)))
        return LoadedWeights(str(weights), sha256_tensors(model.state_dict()))

    path = Path(weights)
    tensors, ignored, foreign = select(read_file(path), rules)
    fill(model, tensors, path, rules.keep, foreign)
    return LoadedWeights(path.name, sha256_file(path), tuple(ignored))


def parse_seed(weights: str) -> int:
    """SEED of `random:SEED`."""
    seed = weights.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit() and int(seed) < 2**63):
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


def read_file(path: Path) -> dict:
    """The names and tensors of a weights file on the CPU: safetensors, a torch state dict, or a TorchScript archive.

    The kind is found from the bytes, not from the file's ending. A torch file may be a dictionary of
    dictionaries.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BadInputError(f"--weights {path}: {what}. Give the path of a weights file, or random:SEED for a trial.")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # eight bytes of length, then the JSON header of safetensors
            return load_file(path)
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own: truncated, foreign, or holding more than tensors
        raise _unreadable(path, error) from error
    if not isinstance(found, dict):
        raise BadInputError(f"--weights {path}: holds a {type(found).__name__}, not a dictionary of tensors.")
    return found


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unreadable(path: Path, error: Exception) -> BadInputError:
    # torch's own text is not passed on whole: it advises to switch weights_only off
    with open(path, "rb") as file:
        start = file.read(12)
    if isinstance(error, UnpicklingError) and start[:1] in (b"P", b"\x80"):
        reason = (
            "it holds Python objects beside its tensors, and reading those would run code. Open it where you trust it, and "
            "save its state dict as safetensors"
        )
    elif start[:2] == b"PK" or start[8:9] == b"{":
        first = re.split(r"[.\n]", str(error))[0]
        reason = f"it is damaged, cut short, or of another kind ({first}). Compare its size with the published one"
    else:
        reason = f"it begins with {start!r}, as no weights file does. Perhaps a web page was saved in its place"
    return BadInputError(
        f"--weights {path} ({path.stat().st_size:,} bytes) cannot be used: {reason}. Weights are read from safetensors, torch "
        "state dicts and TorchScript archives."
    )


def select(found: dict, rules: KeyRules) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Split the names of a file: the tower's tensors under the tower's names, what the rules ignore, and the rest."""
    for entry in rules.inside:
        found = found[entry] if isinstance(found.get(entry), dict) else found
    tensors, ignored, foreign = {}, [], []
    for name, value in found.items():
        name = str(name)
        if any(name.startswith(known) if known.endswith(".") else name == known for known in rules.ignore):
            ignored.append(name)
        elif name.startswith(rules.keep):
            tensors[name.removeprefix(rules.keep)] = value
        else:
            foreign.append(name)
    return tensors, sorted(ignored), foreign


def fill(model: nn.Module, tensors: dict, path: Path, prefix: str = "", foreign: Iterable[str] = ()) -> None:
    """Copy `tensors` into the model's parameters as float32; names, shapes and kind must be exactly the model's.

    prefix, foreign: for the message only: how names begin in the file, and further names that nothing asked
    for.
    """
    own = model.state_dict()
    shared = sorted(own.keys() & tensors.keys())
    shapes = {name: tuple(getattr(tensors[name], "shape", ())) for name in shared}
    complaints = [
        _listed("missing", [prefix + name for name in own.keys() - tensors.keys()]),
        _listed("unexpected", [prefix + name for name in tensors.keys() - own.keys()] + list(foreign)),
        _listed(
            "of another shape",
            [f"{prefix}{n}: {shapes[n]} instead of {tuple(own[n].shape)}" for n in shared if shapes[n] != own[n].shape],
        ),
        _listed("not floating point", [prefix + name for name in shared if not _is_float(tensors[name])]),
    ]
    if any(complaints):
        raise BadInputError(
            f"--weights {path} does not fit this teacher: {'; '.join(filter(None, complaints))}. "
            "Give the file published for it (`teacher-cache teachers` names it)."
        )
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if damaged := [prefix + name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise BadInputError(f"--weights {path}: {_listed('with NaN or infinite values', damaged)}.")
    model.load_state_dict(tensors, strict=True)


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _listed(what: str, names: Iterable[str]) -> str:
    """`3 missing (a, b, c)`, the first few names; empty for none."""
    names = sorted(names)
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {what} ({shown})" if names else ""
