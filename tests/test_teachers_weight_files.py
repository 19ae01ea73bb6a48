"""A weights file is read as tensors and nothing else: no code of it runs, what it pickles besides is inert or refused by name,
and no damage to it is more than one sentence."""

import argparse
import builtins
import functools
import io
import json
import os
import pickle
import random
import re
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from teacher_fakes import arguments, optimizer_state, save, yacs_config
from torch import Tensor, nn

from teacher_cache.errors import BadInputError
from teacher_cache.teachers import TEACHERS, load_teacher
from teacher_cache.teachers.timm_vit import build_vit
from teacher_cache.teachers.weights.files import STAND_INS, StandIn, read_file
from teacher_cache.teachers.weights.load import Layout, load_weights, random_weights

MARK = Path(tempfile.gettempdir()) / "teacher-cache-a-weights-file-ran-code"


@pytest.fixture
def state():
    model = build_vit(TEACHERS["demo"])
    random_weights(model, 0)
    return model.state_dict()


class Small(nn.Module):
    """Five tensors, for files of a few kilobytes."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return self.norm(self.linear(x)) * self.scale.sum()


def save_script(module: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():  # that tracing is deprecated
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module.eval(), torch.zeros(1, 8)), path)


KINDS = {
    "safetensors": lambda model, path: save_file(model.state_dict(), path),
    "torch": lambda model, path: torch.save(model.state_dict(), path),
    "legacy torch": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "TorchScript": save_script,
}


@contextmanager
def little_memory():
    """Fails if the process held, at any moment within, 100 MB more than before."""

    def resident(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < 100_000


# --- kinds


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_tensors(kind, tmp_path):
    """Safetensors, both torch formats and TorchScript are told apart by their bytes and read to equal tensors."""
    model = Small()
    KINDS[kind](model, tmp_path / "weights.bin")
    found = read_file(tmp_path / "weights.bin")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_web_page(path, state):
    path.write_text("<!DOCTYPE html><html>404</html>")


def an_empty_file(path, state):
    path.write_bytes(b"")


def a_truncated_torch_file(path, state):
    torch.save(state, path)
    cut_in_half(path)


def a_truncated_safetensors_file(path, state):
    save_file(state, path)
    cut_in_half(path)


def a_zip_of_something_else(path, state):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def a_pickle_of_no_state_dict(path, state):
    path.write_bytes(pickle.dumps(["hello"], protocol=2))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (a_web_page, "begins with b'<!DOCTYPE'"),
        (an_empty_file, "begins with b''"),
        (a_truncated_torch_file, "cut short"),
        (a_truncated_safetensors_file, "cut short"),
        (a_zip_of_something_else, "a zip that holds no state dict"),
        (a_pickle_of_no_state_dict, "of another kind"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_size(write, says, state, tmp_path):
    """What is no weights file, or half of one, is BadInputError with path, size and what would do."""
    path = tmp_path / "weights.pt"
    write(path, state)
    with pytest.raises(BadInputError) as caught:
        load_teacher("demo", path)
    message = str(caught.value)
    assert f"{path} ({path.stat().st_size:,} bytes)" in message and says in message and "safetensors" in message
    assert "\n" not in message and "weights_only" not in message


def test_a_torch_file_of_a_lone_tensor_is_refused(tmp_path):
    """A tensor alone is not a dictionary of tensors, and the message says so."""
    torch.save(torch.zeros(3), tmp_path / "weights.pt")
    with pytest.raises(BadInputError, match="holds a Tensor, not a dictionary"):
        load_teacher("demo", tmp_path / "weights.pt")


def test_a_wrong_path_is_said_to_be_one(tmp_path):
    """A path that does not exist, and a folder, are told apart; both errors say what to give."""
    with pytest.raises(BadInputError, match=re.escape(f"{tmp_path / 'no.pt'}: does not exist. Give the path")):
        load_teacher("demo", tmp_path / "no.pt")
    with pytest.raises(BadInputError, match="is a folder"):
        load_teacher("demo", tmp_path)


# --- what is pickled beside tensors

BESIDE = {
    "argparse.Namespace": arguments,
    "yacs.config.CfgNode": lambda: yacs_config(MODEL=yacs_config(TYPE="moby"), TAGS=["a"]),
    "numpy._core.multiarray.scalar": optimizer_state,
}
NUMPY = tuple(name for name in STAND_INS if name.startswith("numpy"))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_known_objects_become_inert_stand_ins(name, options, tmp_path):
    """Namespaces, yacs configurations and numpy scalars are read where the entry allows them, and are not those afterwards."""
    path = save({"tensor": torch.ones(2), "beside": BESIDE[name]()}, tmp_path / "file.pth", **options)
    found = read_file(path, ("argparse.Namespace", "yacs.config.CfgNode", *NUMPY))
    assert torch.equal(found["tensor"], torch.ones(2))
    beside = found["beside"]
    if name == "argparse.Namespace":
        assert type(beside) is StandIn and not hasattr(beside, "arch")
    elif name == "yacs.config.CfgNode":
        assert type(beside) is OrderedDict and dict(beside)["MODEL"] == {"TYPE": "moby"}
    else:
        assert type(beside["param_groups"][0]["lr"]) is StandIn and beside["state"][0]["step"] == 3


def test_numpys_scalars_are_known_by_their_older_name_too(tmp_path):
    """Files of 2021 name numpy.core where numpy now has numpy._core."""
    torch.save(optimizer_state(), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    with pytest.raises(BadInputError, match="it pickles numpy.core.multiarray.scalar"):
        read_file(tmp_path / "old.pth")
    assert type(read_file(tmp_path / "old.pth", NUMPY)["param_groups"][0]["lr"]) is StandIn


@pytest.mark.parametrize("name", BESIDE)
def test_only_the_names_of_the_entry_are_let_through(name, tmp_path):
    """The same files are refused, by the name of what they hold, for a teacher whose official file does not hold it."""
    path = save({"tensor": torch.ones(2), "beside": BESIDE[name]()}, tmp_path / "file.pth")
    others = tuple(known for known in STAND_INS if known not in (name, *(NUMPY if name.startswith("numpy") else ())))
    with pytest.raises(BadInputError, match=f"it pickles {re.escape(name)} beside.*would run code.*as safetensors") as caught:
        read_file(path, () if name == "argparse.Namespace" else others)
    assert "\n" not in str(caught.value)


def test_what_others_have_declared_safe_is_refused_all_the_same(tmp_path):
    """A class that some library added to torch's own list of safe ones is not built from a weights file."""
    torch.save({"tensor": torch.ones(2), "path": Path("a")}, tmp_path / "file.pth")
    kind = type(Path("a"))
    named = f"it pickles {re.escape(f'{kind.__module__}.{kind.__name__}')}"  # the module has another name from Python 3.13 on
    with torch.serialization.safe_globals([kind]), pytest.raises(BadInputError, match=named):
        read_file(tmp_path / "file.pth")


def test_torchs_list_of_safe_classes_is_left_as_it_was(tmp_path):
    """The stand-ins are known to torch only while a file is read."""
    path = save({"args": arguments()}, tmp_path / "file.pth")
    before = set(torch.serialization.get_safe_globals())
    read_file(path, ("argparse.Namespace", *NUMPY))
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace(a=1).a == 1


# --- what would run


class Calls:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


DANGEROUS = {
    "posix.system": Calls(os.system, f"touch {MARK}"),
    f"{open.__module__}.open": Calls(open, str(MARK), "w"),
    "__builtin__.eval": Calls(eval, f"open({str(MARK)!r}, 'w')"),
    "__builtin__.getattr": Calls(getattr, Small, "forward"),
    "functools.partial": Calls(functools.partial, os.system, f"touch {MARK}"),
    "torch.serialization.load": Calls(torch.load, str(MARK)),
    "__builtin__.bytearray": Calls(builtins.bytearray, 10**11),
    "torch.FloatTensor": Calls(torch.FloatTensor, 10**6, 10**5),
    "torch._utils._rebuild_sparse_tensor": Calls(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ()),
}


def in_zip(state, danger, path):
    torch.save({**state, "args": danger}, path)


def in_legacy(state, danger, path):
    torch.save({**state, "args": danger}, path, _use_new_zipfile_serialization=False)


def alone(state, danger, path):
    path.write_bytes(pickle.dumps(danger, protocol=2))


def in_a_later_protocol(state, danger, path):
    torch.save({**state, "args": danger}, path, pickle_protocol=4)


@pytest.mark.parametrize("write", [in_zip, in_legacy, alone, in_a_later_protocol])
@pytest.mark.parametrize("name", DANGEROUS)
def test_a_pickle_that_would_run_code_is_refused_and_does_not(name, write, tmp_path):
    """Whatever a pickle would call, it is named and not called; that holds for calls that only take memory."""
    write({"weight": torch.zeros(2)}, DANGEROUS[name], tmp_path / "weights.pt")
    module, _, function = name.rpartition(".")
    with little_memory(), pytest.raises(BadInputError) as caught:
        read_file(tmp_path / "weights.pt", STAND_INS)
    message = str(caught.value)
    named = f"it pickles {module.replace('__builtin__', 'builtins') if write is in_a_later_protocol else module}.{function}"
    assert named in message or write is in_a_later_protocol  # there, other names may stand before it
    assert "would run code" in message and "\n" not in message
    assert not MARK.exists()


class Sets(nn.Module):
    """Loading it calls its own __setstate__."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]):
        print("ran")
        self.weight, self.training = state

    def forward(self, x):
        return x


def test_torchscript_that_runs_when_loaded_is_refused(tmp_path, capfd):
    """An archive with __setstate__ is refused before anything of it is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Sets()), tmp_path / "weights.pt")
        torch.jit.load(tmp_path / "weights.pt")
    assert "ran" in capfd.readouterr().out  # so the danger is real
    with pytest.raises(BadInputError, match="has __setstate__, code that runs when it is loaded"):
        read_file(tmp_path / "weights.pt")
    assert "ran" not in capfd.readouterr().out


class Shadowed(OrderedDict):
    """Pickled, it becomes an OrderedDict with attributes that hide its methods."""

    def __reduce__(self):
        return OrderedDict, (), dict.fromkeys(("items", "get", "keys", "__iter__"), torch.Size), None, iter(self.items())


def test_a_dictionary_whose_methods_were_replaced_is_read_by_its_items(tmp_path):
    """What a pickle hangs on a dictionary is not called: names and tensors are those of its items."""
    model = Small()
    torch.save(Shadowed(state_dict=Shadowed(model.state_dict())), tmp_path / "weights.pt")
    assert read_file(tmp_path / "weights.pt").items is torch.Size
    loaded = Small()
    load_weights(loaded, tmp_path / "weights.pt", [Layout(inside=("state_dict",))])
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


# --- what would take memory


def safetensors_header(header: dict | bytes, length: int | None = None, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def rewritten(kind: str, tmp_path: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """A zip of `kind` whose members went through change(name, data); its checksums are right."""
    KINDS[kind](Small(), tmp_path / "sound")
    with zipfile.ZipFile(tmp_path / "sound") as sound, zipfile.ZipFile(tmp_path / "weights", "w", compression) as archive:
        for name in sound.namelist():
            archive.writestr(name, change(name, sound.read(name)))
    return tmp_path / "weights"


def in_pickle(old: bytes, new: bytes):
    def change(name, data):
        assert not name.endswith("/data.pkl") or old in data
        return data.replace(old, new, 1) if name.endswith("/data.pkl") else data

    return change


def short_record(name, data):
    return data[:16] if name.endswith("/data/0") else data


HUGE = b"J\x00\x00\x00\x40"  # BININT 2**30


@pytest.mark.parametrize(
    "data",
    [
        safetensors_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors_header({"a": {"dtype": "F32", "shape": [2**31, 2**31, 2**31], "data_offsets": [0, 4]}}, body=bytes(4)),
        safetensors_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, body=bytes(4)),
        safetensors_header(b"{}", length=2**60),
        safetensors_header(b"{" + b'"a":{' * 100_000),
        safetensors_header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, body=bytes(1)),
    ],
    ids=["huge tensor", "overflow", "backwards", "huge header", "deep header", "odd dtype"],
)
def test_a_safetensors_header_cannot_promise_more_than_there_is(data, tmp_path):
    """Sizes that the file has not got are one sentence, and no memory."""
    (tmp_path / "weights").write_bytes(data)
    with little_memory(), pytest.raises(BadInputError):
        load_weights(Small(), tmp_path / "weights")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("torch", in_pickle(b"K\x40t", HUGE + b"t")),  # elements of a storage
        ("torch", in_pickle(b"K\x08K\x08\x86", HUGE + b"K\x08\x86")),  # shape of a tensor
        ("torch", in_pickle(b"K\x08K\x01\x86", HUGE + b"K\x01\x86")),  # its strides
        ("torch", short_record),
        ("TorchScript", in_pickle(b"K\x40t", HUGE + b"t")),
        ("TorchScript", in_pickle(b"(K\x08K\x08t", b"(" + HUGE + b"K\x08t")),
        ("TorchScript", in_pickle(b"q\x01", b"r\x00\x00\x00\x20")),  # the number of a memorised object
        ("TorchScript", short_record),
    ],
    ids=["elements", "shape", "strides", "record", "script elements", "script shape", "script memo", "script record"],
)
def test_a_zip_cannot_promise_more_than_it_has(kind, change, tmp_path):
    """With every checksum right, sizes in a pickle that the records have not got are one sentence, and no memory."""
    path = rewritten(kind, tmp_path, change)
    with little_memory(), pytest.raises(BadInputError, match="damaged"):
        load_weights(Small(), path)


@pytest.mark.parametrize("kind", ["torch", "TorchScript"])
def test_a_zip_bomb_is_not_unpacked(kind, tmp_path):
    """A zip of kilobytes that would unpack to 80 MB is refused by its table of contents; a compressed sound one loads."""
    path = rewritten(kind, tmp_path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    load_weights(Small(), path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("sound/data/99", "w") as member:
        for _ in range(80):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**18
    with little_memory(), pytest.raises(BadInputError, match="unpacks to far more than its own size"):
        load_weights(Small(), path)


@pytest.mark.parametrize("old", [b"K\x40Nt", b"K\x08K\x08\x86"], ids=["elements", "shape"])
def test_the_older_torch_format_cannot_promise_more_than_it_has(old, tmp_path):
    """A legacy file whose pickle asks for 4 GB gets none of them written to."""
    KINDS["legacy torch"](Small(), tmp_path / "weights")
    data = (tmp_path / "weights").read_bytes()
    assert old in data
    (tmp_path / "weights").write_bytes(data.replace(old, HUGE + old[2:], 1))
    with little_memory(), pytest.raises(BadInputError, match="damaged"):
        load_weights(Small(), tmp_path / "weights")


@pytest.mark.parametrize("kind", ["torch", "TorchScript"])
def test_a_flipped_bit_in_a_zip_is_noticed(kind, tmp_path):
    """torch writes a checksum for every member and compares none; here a single flipped bit of a tensor is refused."""
    KINDS[kind](Small(), tmp_path / "weights")
    data = bytearray((tmp_path / "weights").read_bytes())
    place = data.index(Small().scale.detach().numpy().tobytes())
    data[place + 5] ^= 1
    (tmp_path / "weights").write_bytes(data)
    with pytest.raises(BadInputError, match="damaged"):
        load_weights(Small(), tmp_path / "weights")


# --- any damage


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to five accidents."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if not changed:
            break
        place, length = rng.randrange(len(changed)), rng.randrange(1, 64)
        match rng.randrange(6):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place] = rng.randrange(256)
            case 2:
                changed[place : place + 8] = rng.choice([b"\xff" * 8, bytes(8), rng.randbytes(8)])
            case 3:
                del changed[place : place + length]
            case 4:
                del changed[place:]
            case 5:
                changed[place:place] = changed[rng.randrange(len(changed)) :][:length]
    return bytes(changed)


def mutated_member(data: bytes, rng: random.Random) -> bytes:
    """A zip with one mutated member and right checksums, so that what reads the member meets the damage."""
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as sound, zipfile.ZipFile(rewritten, "w") as archive:
        target = rng.choice([name for name in sound.namelist() if name.endswith((".pkl", ".py")) or "/data/" in name])
        for name in sound.namelist():
            archive.writestr(name, mutated(sound.read(name), rng) if name == target else sound.read(name))
    return rewritten.getvalue()


@pytest.mark.parametrize(
    ("kind", "mutate"),
    [(kind, mutated) for kind in KINDS] + [(kind, mutated_member) for kind in ("torch", "TorchScript")],
    ids=[*KINDS, "torch, inside", "TorchScript, inside"],
)
def test_no_damage_is_more_than_one_sentence(kind, mutate, tmp_path):
    """60 damaged files of each kind, 360 in all: BadInputError in one line, or five finite tensors; never more, nor memory."""
    path, rng, refused = tmp_path / "weights", random.Random(kind), 0
    KINDS[kind](Small(), path)
    sound = path.read_bytes()
    with little_memory():
        for _ in range(60):
            path.write_bytes(mutate(sound, rng))
            model = Small()
            try:
                load_weights(model, path)
            except BadInputError as error:
                assert "\n" not in str(error)
                refused += 1
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert refused > 30  # so the damage was some
