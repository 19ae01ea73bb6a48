"""Malformed caches, weights and runs, sealed and vouched for as if they were right: an error of our own, never a traceback.

Each case is run in a child that may take a gigabyte of addresses more than it has, so that memory taken for a made-up number
shows.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
import warm
from forks import Ended, fork, run_forked
from safetensors.torch import load_file, save_file

from pipelines.presets import PRESETS, recipe
from student.files.checkpoint import latest_checkpoint
from teacher_cache.cache import Cache
from teacher_cache.errors import TeacherCacheError
from teacher_cache.files.durable import read_sealed, seal
from teacher_cache.store.reader import READERS, StoreReader
from teacher_cache.teachers.demo import BUILT_IN

MEMORY = 1 << 30
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 2**31, 2**40, 2**63, 2**64, 10**30, "", "x", "..", "../../x", "/etc/passwd",
    "a\0b", "é\ud800", "nan", "a" * 5000, "0" * 64, [], {}, [[]], [1], [2**40] * 3, ["x"] * 3, [None], {"a": 1},
    {"../x": "0" * 64}, {"x": {}},
]  # fmt: skip


# --- mutations -------------------------------------------------------------------------------------------------------


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes with bits flipped, a piece cut out, doubled, moved, zeroed or replaced by noise, or cut off."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((1, 4, 40, 4000)))
        piece = bytes(data[start:stop])
        how = draw.randrange(6)
        if how == 0 and piece:
            data[start] ^= 1 << draw.randrange(8)
        elif how == 5:
            del data[start:]
        else:
            data[start:stop] = [b"", piece * 2, piece[::-1], bytes(len(piece)), draw.randbytes(len(piece))][how - 1 if how else 0]
    return bytes(data)


def places(value, path=()) -> list[tuple]:
    """The way to every member and item of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in [(*path, key), *places(item, (*path, key))]]


def mutated(value, draw: random.Random):
    """A JSON value with something replaced by a hostile value, removed, renamed, added or put in another place."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        *way, last = draw.choice(places(value) or [("x",)])
        parent = value
        for key in way:
            parent = parent[key]
        how = draw.choice(("replace", "replace", "replace", "remove", "add", "swap"))
        if how == "remove" and last in (parent if isinstance(parent, dict) else range(len(parent))):
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[draw.choice(("unheard of", "", "../x"))] = draw.choice(HOSTILE)
        elif how == "swap":
            other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[last], parent[other] = parent[other], parent[last]
        else:
            parent[last] = draw.choice(HOSTILE)
    return value


# --- in a child ------------------------------------------------------------------------------------------------------


def limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def exit_codes(commands: list[tuple]) -> list[int]:
    """Run commands one after the other; their exit codes. Any exception but SystemExit ends the child with a traceback."""
    limit_memory()
    codes = []
    for program, *arguments in commands:
        try:
            warm.run_program(program, *arguments)
        except SystemExit as ended:
            codes.append(ended.code or 0)
    return codes


def said_well(ended: Ended, allowed=(0, 1, 2)) -> list[int]:
    """The exit codes of commands that ended as commands may, whatever was wrong."""
    ended.ok()
    assert "Traceback" not in ended.output and set(ended.value) <= set(allowed), ended
    n_errors = sum(line.startswith("Error: ") for line in ended.output.splitlines())
    assert n_errors <= sum(code != 0 for code in ended.value), ended.output
    return ended.value


def read_everything(cache: Path) -> str:
    """Read every row of every store by every reader; what stopped it, in one word."""
    limit_memory()
    try:
        opened = Cache(cache)
        opened.images()
        for view in opened.views():
            for name in view.store_names():
                for reader in READERS:
                    store = StoreReader(view.store_path(name), reader)
                    view.require_own(store.manifest)
                    for array in store.spec.array_names:
                        store.read(array, range(min(len(store), 1000)))
    except TeacherCacheError as error:
        assert str(error)
        return type(error).__name__
    return "read"


# --- caches ----------------------------------------------------------------------------------------------------------

EXTRACT = ("--teacher", "fake", "--layers", "last2", "--shard-rows", 8)


@pytest.fixture(scope="module")
def cache(image_folder, tmp_path_factory) -> Path:
    """A sound cache of one view."""
    path = tmp_path_factory.mktemp("cache") / "c"
    run_forked("teacher-cache", "extract", *EXTRACT, "--images", image_folder, path).says(code=0)
    return path


def small_files(cache: Path) -> list[Path]:
    """Everything but crops and shards: what says how these are to be read."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in files if path.name != "crops.beton" and not path.name.startswith("c.")]


def vouch(cache: Path, file: Path) -> None:
    """Make the file that lists `file` list what is in it now."""
    store = next((parent for parent in file.parents if parent.suffix == ".zarr"), None)
    if file.name == "shards.npy":
        owner, way, name = store / "complete.json", (), "shards_sha256"
    elif store is not None:
        owner, way, name = store / "store.json", ("files",), file.relative_to(store).as_posix()
    else:
        owner = file.with_name("cache.json" if file.parent == cache else "checksums.json")
        way, name = ("files",), file.name
    value = inner = read_sealed(owner)
    for key in way:
        inner = inner[key]
    if name in inner:
        inner[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        owner.write_bytes(seal(value))


@pytest.mark.soak("malformed manifest, list or record of a cache, vouched for", full=250, short=5)
def test_cache(seed, cache, image_folder, tmp_path, fell):
    """Whatever the small files of a cache say, commands and readers end with a sentence and take no memory for it."""
    draw, copied = random.Random(seed), shutil.copytree(cache, tmp_path / "c")
    file = draw.choice(small_files(copied))
    data = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.8:
        sealed = "crc32c" in json.loads(data)
        value = mutated(read_sealed(file) if sealed else json.loads(data), draw)
        try:
            file.write_bytes(seal(value) if sealed else json.dumps(value).encode())
        except (ValueError, TypeError):  # what is no JSON object cannot be sealed
            file.write_bytes(json.dumps(value).encode())
    else:
        file.write_bytes(damaged(data, draw))
    if file.name not in ("cache.json", "checksums.json", "store.json", "complete.json", "spare.tar"):
        vouch(copied, file)

    ended = fork(read_everything, copied).ok()
    commands = [
        ("teacher-cache", "inspect", copied), ("teacher-cache", "verify", copied), ("teacher-cache", "crop", copied),
        ("teacher-cache", "extract", *EXTRACT, copied),
        ("teacher-cache", "extract", "--repair", *EXTRACT, "--images", image_folder, copied),
    ]  # fmt: skip
    codes = said_well(fork(exit_codes, commands))
    fell(f"{ended.value}, verify {codes[1]}")


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """The demo teacher's weights in the layouts that are read."""
    folder, state = tmp_path_factory.mktemp("weights"), load_file(BUILT_IN)
    files = {kind: folder / f"{kind}.weights" for kind in ("safetensors", "torch zip", "torch legacy")}
    save_file(state, files["safetensors"])
    torch.save(state, files["torch zip"])
    torch.save(state, files["torch legacy"], _use_new_zipfile_serialization=False)
    return files


def with_header(data: bytes, change) -> bytes:
    """safetensors with its JSON header changed."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.soak("malformed weights file", full=150, short=4)
def test_weights(seed, weights, image_folder, tmp_path, fell):
    """A damaged weights file is refused in one sentence, or, where the damage hits numbers or nothing, used."""
    draw = random.Random(seed)
    kind = draw.choice(list(weights))
    data = weights[kind].read_bytes()
    if kind == "safetensors" and draw.random() < 0.5:
        data = with_header(data, lambda header: mutated(header, draw))
    else:
        data = damaged(data, draw)
    (tmp_path / "w").write_bytes(data)
    command = ("teacher-cache", "extract", "--teacher", "demo", "--weights", tmp_path / "w", "--images", image_folder,
               "--dry-run", tmp_path / "c")  # fmt: skip
    (code,) = said_well(fork(exit_codes, [command]), allowed=(0, 1))
    fell(f"{kind} {'refused' if code else 'used'}")


# --- configurations, runs --------------------------------------------------------------------------------------------

TRAIN = (
    "--preset",
    "mae-b16",
    "--tiny",
    "--set",
    "backbone.image_size=32",
    "--set",
    "backbone.patch_size=8",
    "--set",
    "batch_size=8",
)


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory) -> Path:
    """A run of two steps."""
    path = tmp_path_factory.mktemp("run") / "r"
    run_forked("student-train", *TRAIN, "--max-steps", 2, "--cache", cache, "--out", path).says(code=0)
    return path


def hostile_setting(config: dict, draw: random.Random) -> str:
    """KEY=VALUE of a key that there is, as a shell could hand it over."""
    key = ".".join(map(str, draw.choice(places(config))))
    value = draw.choice([*HOSTILE, draw.uniform(-2, 2), draw.randrange(-4, 5000), "1,2,3"])
    text = draw.choice((str, json.dumps))(value)
    return f"{key}={text}".replace("\0", "").encode("utf8", "replace").decode()


@pytest.mark.soak("malformed setting, run description or checkpoint", full=100, short=5)
def test_run(seed, cache, run, tmp_path, fell):
    """Settings, config.json, metrics.jsonl and checkpoints, whatever is in them: a sentence, and the files stay as they are."""
    draw = random.Random(seed)
    if draw.random() < 0.4:
        preset = draw.choice(list(PRESETS))
        config = json.loads(json.dumps(recipe(preset).config.to_json()))
        settings = [word for _ in range(draw.choice((1, 1, 2))) for word in ("--set", hostile_setting(config, draw))]
        (code,) = said_well(fork(exit_codes, [("student-train", "--preset", preset, *settings, "--show")]), allowed=(0, 2))
        fell(f"setting {'refused' if code else 'taken'}")
        return

    copied = shutil.copytree(run, tmp_path / "r")
    file = draw.choice([copied / "config.json", copied / "metrics.jsonl", latest_checkpoint(copied), latest_checkpoint(copied)])
    data = file.read_bytes()
    if file.name == "config.json" and draw.random() < 0.8:
        file.write_text(json.dumps(mutated(json.loads(data), draw)))
    elif file.suffix == ".safetensors" and draw.random() < 0.5:
        file.write_bytes(with_header(data, lambda header: mutated(header, draw)))
    else:
        file.write_bytes(damaged(data, draw))
    commands = [
        ("student-train", *TRAIN, "--max-steps", 2, "--cache", cache, "--out", copied),
        ("student-eval", "knn", copied, "--train", cache, "--val", cache),
    ]  # fmt: skip
    before = file.read_bytes()
    codes = said_well(fork(exit_codes, commands))
    assert file.read_bytes() == before or file.name == "metrics.jsonl"
    fell(f"{file.name.split('-')[0]}: student-train {codes[0]}, student-eval {codes[1]}")
