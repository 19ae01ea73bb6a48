"""One flipped bit anywhere below a cache: verify finds it, and no student learns from a row that is not the one written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import failing_at, flip_bit
from forks import Command, run_forked, start_forked
from safetensors import safe_open
from store_fakes import compress

from pipelines.feed.cached_source import CachedSource
from student.batch import Needs
from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify_folder
from teacher_cache.errors import TeacherCacheError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.store.store import Store

STORES = ("fake", "fake-zstd")
"""What compiled code copies, and what is decompressed."""
ALL = Needs(layers=(-2, -1), attention=True)
STEPS = 6
"""Of 8 rows: an epoch of each of the two views, so all rows of the cache."""


@pytest.fixture(scope="module")
def cache(shared_cache, teacher, tmp_path_factory) -> Path:
    """Two views with two complete stores each, and in view 0 one with commit records, 2 of 3 shards. Flips are taken back."""
    ignored = shutil.ignore_patterns("*.zarr")
    path = shutil.copytree(shared_cache.path, tmp_path_factory.mktemp("bits") / "c", ignore=ignored)
    for view in Cache(path).views():
        for name in STORES:
            extract_view(view, name, teacher, ExtractPlan(layers="last2", shard_rows=8, batch_size=5))
    for view in Cache(path).views():
        compress(view.store_path("fake-zstd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write_commit", failing_at(Store.write_commit, 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            extract_view(Cache(path).view(0), "half", teacher, ExtractPlan(layers="last2", shard_rows=8, batch_size=5))
    return path


@pytest.fixture
def flipped(cache, seed):
    """The file of the cache that has one wrong bit during this test, and a generator for further choices.

    Every other bit is drawn from all bits, which are mostly tokens and crops, the others from a file drawn from all files.
    """
    draw = random.Random(seed)
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    file = draw.choices(files, sizes if draw.random() < 0.5 else None)[0]
    bit = draw.randrange(8 * file.stat().st_size)
    flip_bit(file, bit)
    yield file, draw
    flip_bit(file, bit)


def kind_of(file: Path, cache: Path) -> str:
    """What a file of a cache is, for the report."""
    parts = file.relative_to(cache).parts
    if file.name.startswith("c.") and parts[2] in ("tokens", "scale", "attention"):
        return "shard"
    if file.name in ("crops.beton", "spare.tar"):
        return file.name
    return "commit record" if "commits" in parts else "other small file"


def findings(cache: Path) -> set[tuple[str, str]]:
    return {(finding.kind, finding.path) for finding in verify_folder(cache)[0]}


@pytest.fixture(scope="module")
def findings_before(cache) -> set[tuple[str, str]]:
    """Of the cache with all its bits right: the store that is not finished."""
    found = findings(cache)
    assert {kind for kind, _ in found} == {"unfinished"} and all("half" in path for _, path in found)
    return found


@pytest.mark.soak("one flipped bit anywhere below the cache: `verify`", full=1000, short=50)
def test_verify_finds_it(seed, cache, flipped, findings_before, fell):
    """verify finds one flipped bit, whichever it is, and names the file or what it belongs to."""
    file, _ = flipped
    found = findings(cache) - findings_before
    if not found and kind_of(file, cache) == "shard" and "half.zarr" in str(file):
        assert not (cache / "view-000/half.zarr/commits/000002.json").exists() and file.name.split(".")[1] == "2"
        fell("in a shard that was not committed, and so is no data: it will be made again")
        return
    assert any(Path(path) == file or Path(path) in file.parents and Path(path) != cache for _, path in found), (file, found)
    fell(f"found, {kind_of(file, cache)}")


# --- training --------------------------------------------------------------------------------------------------------


class Readers:
    """What students would be given. Compiling a loader takes seconds, so each store's is kept."""

    def __init__(self):
        self.loaders: dict[str, object] = {}

    def batches(self, cache: Path, store: str, reader: str = "mmap"):
        """The content of every batch of both views, as arrays."""
        source = CachedSource(Cache(cache), [store], [ALL], batch_size=8, workers=1, reader=reader)
        source._loader = self.loaders.get(store)
        for batch in source.micro_batches(0, STEPS):
            self.loaders[store] = source._loader
            (targets,) = batch.targets
            tensors = [batch.rows, batch.images, batch.labels, targets.tokens, targets.attention, targets.head.gamma,
                       targets.head.beta, targets.head.projection]  # fmt: skip
            yield [tensor.numpy().copy() for tensor in tensors]


@pytest.fixture(scope="module")
def readers() -> Readers:
    return Readers()


@pytest.fixture(scope="module")
def sound(cache, readers) -> dict[str, list]:
    """Of each store, what the batches hold while all bits are right."""
    sound = {store: list(readers.batches(cache, store)) for store in STORES}
    assert all(len({int(row) for batch in batches for row in batch[0]}) == 24 for batches in sound.values())
    return sound


@pytest.mark.soak("one flipped bit anywhere below the cache: every batch of both views", full=1000, short=50)
def test_no_wrong_row_is_learned_from(seed, cache, flipped, readers, sound, fell):
    """Batches read from a cache with a flipped bit are those of the sound cache, until an error of ours ends them."""
    file, draw = flipped
    hit = [store for store in STORES if f"{store}.zarr" in file.parts]
    store = hit[0] if hit else draw.choice(list(STORES))
    expected = iter(sound[store])
    try:
        for batch in readers.batches(cache, store, draw.choice(("mmap", "pread"))):
            assert all(np.array_equal(found, right) for found, right in zip(batch, next(expected), strict=True)), file
    except TeacherCacheError as error:
        fell(f"raised, {kind_of(file, cache)}")
        assert str(error)
    else:
        assert next(expected, None) is None
        fell(f"unaffected, {kind_of(file, cache)}")


# --- through the commands --------------------------------------------------------------------------------------------

TRAIN = ("--preset", "mr-mae-b16", "--tiny", "--set", "backbone.image_size=32", "--set", "backbone.patch_size=8", "--set",
         "batch_size=8", "--teacher", "fake", "--max-steps", STEPS, "--workers", 1)  # fmt: skip


def weights(run: Path) -> dict:
    with safe_open(max(run.glob("checkpoint-*.safetensors")), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.fixture(scope="module")
def sound_weights(cache, tmp_path_factory) -> dict:
    """What a student learns from the cache while all bits are right."""
    run = tmp_path_factory.mktemp("sound") / "r"
    run_forked("student-train", *TRAIN, "--cache", cache, "--out", run).says(code=0)
    return weights(run)


@pytest.mark.soak("one flipped bit: `teacher-cache verify`, then `student-train`", full=20, short=3)
def test_commands(seed, cache, flipped, full, sound_weights, tmp_path, fell):
    """verify ends with 1 and names the file; student-train ends with one sentence, or learns just what it should."""
    file, _ = flipped
    verified = (Command if full else start_forked)("teacher-cache", "verify", cache).wait()
    verified.says("damaged", code=1)
    trained = run_forked("student-train", *TRAIN, "--cache", cache, "--out", tmp_path / "r")
    if trained.code == 0:
        found = weights(tmp_path / "r")
        assert all((found[name] == sound_weights[name]).all() for name in sound_weights)
        fell(f"trained alike, {kind_of(file, cache)}")
    else:
        trained.says("Error: ", code=1)
        fell(f"refused, {kind_of(file, cache)}")
