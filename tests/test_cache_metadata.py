"""Metadata that is sealed and wrong: whatever it says, it ends in an error of our own, soon and without memory taken for it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import resource
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fakes import MADE, TEACHER, spec_of

from teacher_cache.cache import Cache, write_cache
from teacher_cache.checking.verify import verify_folder
from teacher_cache.crops.beton import CropReader
from teacher_cache.crops.images import ImageList
from teacher_cache.errors import CacheCorruptError, TeacherCacheError, UsageError
from teacher_cache.files.durable import read_sealed, seal
from teacher_cache.inspecting.inspect import describe
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.spare import is_current

GOLDEN = Path(__file__).parent / "golden" / "cache_v1"
STORE = "view-000/fake.zarr"
SEALED = ["cache.json", "view-000/checksums.json", f"{STORE}/store.json", f"{STORE}/complete.json"]
BELIEVED = [f"{STORE}/{name}/zarr.json" for name in (".", "tokens/06", "scale", "probe", "quant/05/centre", "head/projection")]
"""Files that store.json vouches for: they are believed if it names their SHA-256."""
MOST = 1 << 30
"""Bytes of addresses that reading the golden cache of 170 kB may take: threads need some, the cache next to none."""

NASTY = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, 2**31, 2**40, 2**63, 2**64, 10**400, "", "..", "../..", "/etc/passwd",
    "a\0b", "\ud800", "NaN", "x" * 300, "0" * 64, [], {}, [[]], [1], [2**40] * 3, ["a"] * 3, {"a": 1},
    {"../x": "0" * 64}, {"a": {"b": [None]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A copy of the golden cache, put back after every mutation. From here on memory is limited: more is a MemoryError."""
    path = shutil.copytree(GOLDEN, tmp_path_factory.mktemp("malformed") / "cache", ignore=lambda *_: {"fake16.zarr"})
    read_all(path)  # compiled and imported once, before there is a limit
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST, before[1]))
    yield path
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(path: Path) -> None:
    """All that a training run, an extraction and `inspect` read of a cache."""
    cache = Cache(path)
    cache.images()
    describe(cache)
    is_current(path)
    for view in cache.views():
        crops = CropReader(view.path)
        crops.require_same_decoder()
        assert len(view.crops()) == len(crops) == cache.n_images
        is_current(view.path)
        for name in view.store_names():
            reader = StoreReader(view.store_path(name), "pread")
            view.require_own(reader.manifest)
            reader.store.read_commits()
            for array in reader.spec.array_names:
                reader.read(array, [0, len(reader) - 1])
            reader.tokens([1], reader.spec.layers[-1])
            assert reader.head and reader.store.small_array("probe").any() and reader.store.shared_sha256
            is_current(reader.path)


def places(value, path=()) -> list[tuple]:
    """The path of every member and item of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in [(*path, key), *places(item, (*path, key))]]


def mutated(value, place: tuple, how: str, nasty):
    """`value` with something at `place` replaced, removed, or put beside it under another name."""
    changed = copy.deepcopy(value)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if how == "remove":
        del parent[place[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent["unheard of"] = nasty
    else:
        parent[place[-1]] = nasty
    return changed


class Malformed:
    """A file of the cache, rewritten with a mutation, and sealed or vouched for as if it were right."""

    def __init__(self, cache: Path, name: str):
        self.path, self.listing = cache / name, cache / STORE / "store.json"
        self.before = {path: path.read_bytes() for path in (self.path, self.listing)}
        self.value = read_sealed(self.path) if name in SEALED else json.loads(self.before[self.path])
        self.is_sealed, self.key = name in SEALED, Path(name).relative_to(STORE).as_posix() if name in BELIEVED else ""

    def write(self, value) -> None:
        if self.is_sealed:
            self.path.write_bytes(seal(value))
            return
        data = json.dumps(value).encode()
        self.path.write_bytes(data)
        listed = read_sealed(self.listing)
        listed["files"][self.key] = hashlib.sha256(data).hexdigest()
        self.listing.write_bytes(seal(listed))

    def put_back(self) -> None:
        for path, data in self.before.items():
            path.write_bytes(data)


@pytest.mark.parametrize("name", SEALED + BELIEVED)
@settings(max_examples=settings().max_examples // 3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_malformed_metadata(cache, name, data):
    """Any value anywhere in a sealed or vouched-for file: the cache reads as before, or raises one of our errors.

    What is refused for its bytes is told by `verify`, too, which never ends in any other error either.
    """
    file = Malformed(cache, name)
    place = data.draw(st.sampled_from(places(file.value)))
    how, nasty = data.draw(st.sampled_from(["replace", "replace", "remove", "add"])), data.draw(st.sampled_from(NASTY))
    error, findings = None, []
    try:
        file.write(mutated(file.value, place, how, nasty))
        try:
            read_all(cache)
        except TeacherCacheError as raised:
            error = raised
        try:
            findings, _ = verify_folder(cache)
        except TeacherCacheError as raised:
            findings = [raised]
    finally:
        file.put_back()
    assert error is None or str(error).strip() and findings


# --- caps ------------------------------------------------------------------------------------------------------------

BAD_TEACHERS = {
    "a square too large": {"image_size": 1 << 15},
    "a grid of one side": {"grid": (3,)},
    "a grid without rows": {"grid": (0, 4)},
    "a width beyond the cap": {"dim": 1 << 20},
    "true for a depth": {"depth": True},
    "registers below none": {"n_registers": -1},
    "a projection to nothing": {"projection_dim": 0},
    "a word for has_cls": {"has_cls": "yes"},
    "a spread of zero": {"std": (0.5, 0.0, 0.5)},
    "a mean that is no number": {"mean": (0.5, float("nan"), 0.5)},
    "an eps of zero": {"norm_eps": 0.0},
    "a number for a name": {"name": 7},
    "an unknown source of attention": {"attention_source": "register"},
    "a head of another kind": {"head": "rmsnorm"},
    "a list for a head": {"head": []},
}
BAD_STORES = {
    "no rows": {"n_rows": 0},
    "rows beyond the cap": {"n_rows": 1 << 40},
    "shards beyond the cap": {"shard_rows": 1 << 30},
    "too many files": {"n_rows": 1 << 31, "shard_rows": 8},
    "layers twice": {"layers": (1, 1)},
    "layers by name": {"layers": ("1",)},
    "no layers": {"layers": ()},
    "a group in float16": {"dtype": "float16", "group": 4},
    "no group in int8": {"group": 0},
    "a word for attention": {"attention": 1},
    "codecs of other arrays": {"codecs": (("tokens/01", "none"),)},
    "an unknown codec": {"codecs": tuple((array, "lzma") for array in spec_of().array_names)},
}


@pytest.mark.parametrize("case", BAD_TEACHERS)
def test_teachers_that_cannot_be(case):
    """A description of a teacher with a value that no teacher has is refused, naming it."""
    (name,) = BAD_TEACHERS[case]
    with pytest.raises(UsageError, match=name.split("_")[0]):
        dataclasses.replace(TEACHER, **BAD_TEACHERS[case])


@pytest.mark.parametrize(
    ("values", "words"),
    [({"has_cls": False}, "attention_source is cls, and the teacher has no CLS token"),
     ({"head": "none"}, "projection_dim is 4, and there is no final norm")],
)  # fmt: skip
def test_teachers_that_contradict_themselves(values, words):
    """Attention of a CLS token that is not there, and a projection behind a norm that is not there, are refused."""
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(TEACHER, **values)


@pytest.mark.parametrize("values", [{"attention_source": "pool"}, {"head": "none", "projection_dim": None}])
def test_what_older_versions_cannot_say(values):
    """A store of version 3 has no words for a pooling head's attention, or a teacher without final norm."""
    teacher = dataclasses.replace(TEACHER, **values)
    assert Manifest(teacher, spec_of(), 0, "c" * 64, "d" * 64, "fp32", (), "e" * 64, {}, MADE).format_version == 4
    with pytest.raises(ValueError, match="in version 3, which has no words for it"):
        Manifest(teacher, spec_of(), 0, "c" * 64, "d" * 64, "fp32", (), "e" * 64, {}, MADE, 3)


@pytest.mark.parametrize("case", BAD_STORES)
def test_stores_that_cannot_be(case):
    """A description of a store with a value that no store has is refused."""
    with pytest.raises(UsageError):
        dataclasses.replace(spec_of(), **BAD_STORES[case])


@pytest.mark.parametrize(
    "store, teacher, reason",
    [(spec_of(layers=(1, 4)), {}, "3 blocks"), (spec_of(), {"attention_source": None}, "attention of a teacher that gives none"),
     (spec_of(dtype="float16"), {"grid": (1 << 10, 1 << 10), "dim": 1 << 10}, "at most 1,073,741,824 are allowed")],
)  # fmt: skip
def test_stores_that_do_not_fit_their_teacher(store, teacher, reason):
    """Blocks that the teacher does not have, attention that it does not give, and rows of gigabytes are refused."""
    with pytest.raises(UsageError, match=reason):
        Manifest(dataclasses.replace(TEACHER, **teacher), store, 0, "c" * 64, "d" * 64, "fp32", (), "e" * 64, {}, MADE)


# --- links and names -------------------------------------------------------------------------------------------------

FOLDERS = ["view-000", STORE, f"{STORE}/tokens", f"{STORE}/tokens/06", f"{STORE}/scale", f"{STORE}/quant", f"{STORE}/probe"]
FILES = ["cache.json", "images.txt", "labels.npy", "view-000/checksums.json", "view-000/crops.npy", "view-000/crops.beton",
         f"{STORE}/store.json", f"{STORE}/zarr.json", f"{STORE}/shards.npy", f"{STORE}/complete.json", f"{STORE}/probe/c.0.0",
         f"{STORE}/scale/zarr.json"]  # fmt: skip


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the golden cache that a test may damage."""
    return shutil.copytree(GOLDEN, tmp_path / "cache", ignore=lambda *_: {"fake16.zarr"})


@pytest.mark.parametrize("name", FOLDERS + FILES)
def test_symlinks_that_lead_out(copied, tmp_path, name):
    """A view, a store, a folder in it or a small file that is a symlink to the same content elsewhere is refused."""
    (copied / name).rename(tmp_path / "elsewhere")
    (copied / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheCorruptError, match="symlink"):
        read_all(copied)


def test_a_cache_behind_a_symlink(copied, tmp_path):
    """The cache folder itself may be reached through a symlink."""
    (tmp_path / "door").symlink_to(copied)
    read_all(tmp_path / "door")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", ""])
def test_image_names_that_lead_out(copied, name):
    """A list of images, vouched for, with a name outside of the image folder is refused: the originals are opened by it."""
    images = Cache(copied).images()
    names = (name, *images.names[1:])
    write_cache(copied, ImageList(names, images.labels, images.classes), Cache(copied).plan, "jpeg95", [])
    with pytest.raises(CacheCorruptError, match="is no name of an image"):
        Cache(copied).images()


def test_lists_that_are_no_text_or_gone(copied):
    """Bytes that are no UTF-8, or a missing list, are corruption."""
    (copied / "images.txt").write_bytes(b"\xff" * 40)
    with pytest.raises(CacheCorruptError, match="images.txt or labels.npy is not the one"):
        Cache(copied).images()
    (copied / "images.txt").unlink()
    with pytest.raises(CacheCorruptError, match="images.txt: is missing. .*--repair"):
        Cache(copied).images()


def test_a_cache_that_lost_its_declaration(copied, tmp_path):
    """Without cache.json a folder is no cache, unless its spare is there: then it has lost it, and how to mend that is said."""
    (copied / "cache.json").unlink()
    with pytest.raises(CacheCorruptError, match="has lost its cache.json. Restore it with: teacher-cache crop --repair"):
        Cache(copied)
    (copied / "spare.tar").unlink()
    with pytest.raises(CacheCorruptError, match="has lost its cache.json and spare.tar.* Restore it from a backup"):
        Cache(copied)
    shutil.rmtree(copied / "view-000")
    for folder in (copied, tmp_path / "nothing", copied / "images.txt"):
        with pytest.raises(UsageError, match="is no cache: it has no cache.json"):
            Cache(folder)
