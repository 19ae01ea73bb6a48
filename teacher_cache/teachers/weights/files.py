"""The names and tensors of a weights file, without running what it holds.

Read are safetensors, torch files (zip, and the format before torch 1.6) and TorchScript archives; which one it is, its
bytes say. What a file could do besides holding tensors, and what stops it:

    a pickled object      torch.load(weights_only=True), and of what that allows only TENSOR_PARTS. What a teacher's official
                          file is known to pickle besides (`TeacherEntry.pickled`) becomes an inert stand-in
    a promise of memory   a zip may not unpack to more than its own size and SLACK, a pickle may not number what it has not
                          got; tensors larger than their storage and storages larger than their record are errors
    a flipped bit         zips have a CRC-32 a member, which torch writes and does not compare; here it is compared
    TorchScript code      is compiled and not called; an archive with `__setstate__`, which loading would call, is refused

Gives up: sparse, quantised and subclassed tensors. A TorchScript archive whose code is made to crash the compiler can end
the process; safetensors cannot.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import BadInputError

_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
TENSOR_PARTS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
        "torch.Size",
        "collections.OrderedDict",
        "__builtin__.set",
        "_codecs.encode",  # how pickles of protocol 2 hold bytes
    }
)
"""All that a pickled state dict needs; shorter than torch's own list, which has constructors that take a size."""

SLACK = 1 << 26
"""Bytes that the compressed members of a zip may unpack to beyond the file's size; TorchScript compresses its code."""


class StandIn:
    """Takes the place of a pickled object that is no tensor: accepts any arguments and any state, keeps none, does nothing."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


STAND_INS: dict[str, type] = {
    "argparse.Namespace": StandIn,
    "numpy.core.multiarray.scalar": StandIn,
    "numpy._core.multiarray.scalar": StandIn,
    "numpy.dtype": StandIn,
    "yacs.config.CfgNode": OrderedDict,  # the items of a dictionary may be set on a dictionary only
}
"""Name of a class in a pickle -> what is built in its place."""


def read_file(path: Path, pickled: Iterable[str] = ()) -> dict:
    """The names and tensors of a weights file, on the CPU. A torch file may be a dictionary of dictionaries.

    pickled: names of STAND_INS that this file may hold
    Raises BadInputError for a file that is missing, damaged, of another kind, or holds more than tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BadInputError(f"--weights {path}: {what}. Give the path of a weights file, or random:SEED for a trial.")
    start = b""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks about pickle protocols and the age of TorchScript
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{":  # eight bytes of length, then the JSON header of safetensors
                return load_file(path)
            if start[:2] == b"PK":
                return _read_zip(path, file, pickled)
            _refuse_foreign(path, _pickled_names(file, 5), pickled)  # three of header, the object, the storages' keys
            return _load(path, file, pickled)
    except BadInputError:
        raise
    except Exception as error:  # each reader has its own: truncated, foreign, inconsistent, without permission
        raise _unreadable(path, start, error) from error


def _read_zip(path: Path, file: BinaryIO, pickled: Iterable[str]) -> dict:
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size + SLACK:
            raise ValueError("it unpacks to far more than its own size")
        if broken := archive.testzip():
            raise ValueError(f"the checksum of its member {broken} does not fit")
        if _member(archive, "constants.pkl"):
            return _read_torchscript(path, archive)
        _refuse_foreign(path, _names_in_member(archive, "data.pkl"), pickled)
    return _load(path, file, pickled)


def _member(archive: zipfile.ZipFile, name: str) -> str | None:
    """The member of that name in the archive's only folder."""
    return next((member for member in archive.namelist() if member.split("/")[1:] == [name]), None)


def _names_in_member(archive: zipfile.ZipFile, name: str) -> list[str]:
    member = _member(archive, name)
    if not member:
        raise ValueError("a zip that holds no state dict")
    with archive.open(member) as stream:
        return list(_pickled_names(stream, 1))


def _pickled_names(stream: BinaryIO, n_pickles: int) -> Iterator[str]:
    """The names (`module.name`) of all that `n_pickles` pickles in a row would import, without building anything."""
    strings = ["", ""]
    for _ in range(n_pickles):
        for opcode, argument, place in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield argument.replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":  # of later protocols, which torch does not read; named all the same
                yield ".".join(strings)
            elif isinstance(argument, str):
                strings = [strings[1], argument]
            elif opcode.name.endswith("BINPUT") and argument > place:  # torch.jit makes room for as many
                raise ValueError("a pickle that numbers more objects than it has bytes")


def _refuse_foreign(path: Path, names: Iterable[str], pickled: Iterable[str]) -> None:
    allowed = TENSOR_PARTS.union(pickled)
    foreign = next((name for name in names if name not in allowed), None)
    if foreign:
        raise BadInputError(
            f"--weights {path} ({path.stat().st_size:,} bytes) cannot be used: it pickles {foreign} beside its tensors, and "
            "building that would run code. Give the published file, or open this one where you trust it and save its state "
            "dict as safetensors."
        )


def _load(path: Path, file: BinaryIO, pickled: Iterable[str]) -> dict:
    file.seek(0)
    with torch.serialization.safe_globals([(STAND_INS[name], name) for name in pickled]):
        found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise BadInputError(f"--weights {path}: holds a {type(found).__name__}, not a dictionary of tensors.")
    return found


def _read_torchscript(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    if any(b"__setstate__" in archive.read(name) for name in archive.namelist() if name.endswith(".py")):
        raise BadInputError(
            f"--weights {path}: this TorchScript archive has __setstate__, code that runs when it is loaded. Give the published "
            "file, or open this one where you trust it and save its state dict as safetensors."
        )
    for pickle in ("data.pkl", "constants.pkl"):
        _names_in_member(archive, pickle)  # torch.jit builds none of them; read for the lengths and numbers
    tensors = dict(torch.jit.load(path, map_location="cpu").state_dict())
    # torch.jit takes a storage's size from the pickle and does not compare it with the record's
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    records = Counter(member.file_size for member in archive.infolist() if member.filename.split("/")[1:2] == ["data"])
    if Counter(storages.values()) - records:
        raise ValueError("its tensors are not as large as their records")
    return tensors


def _unreadable(path: Path, start: bytes, error: Exception) -> BadInputError:
    if isinstance(error, PermissionError):
        reason = f"{error.strerror}. Make it readable"
    elif start[:2] == b"PK" or start[8:] == b"{" or start[:1] == b"\x80":
        # of torch's own text only the first clause: it goes on to advise to switch weights_only off
        first = re.split(r"[.\n]", str(error))[0]
        reason = f"it is damaged, cut short, or of another kind ({first}). Compare its size with the published one"
    else:
        reason = f"it begins with {start!r}, as no weights file does. Perhaps a web page was saved in its place"
    return BadInputError(
        f"--weights {path} ({path.stat().st_size:,} bytes) cannot be used: {reason}. Weights are read from safetensors, torch "
        "state dicts and TorchScript archives."
    )
