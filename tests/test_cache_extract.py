"""Extraction: the same bytes whatever happens on the way, refusals that name their reason, one writer at a time."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_fakes import contents, failing_at
from fakes import FakeTeacher

from teacher_cache.cache import Cache
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import BadInputError, MismatchError, NoSpaceError, NotInCacheError, UsageError
from teacher_cache.extraction import extract, filling
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.extraction.probe import probe_image
from teacher_cache.files import claims
from teacher_cache.files.claims import claimed
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.layout import store_claim, store_claims
from teacher_cache.store import writer
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.sizes import shard_bytes
from teacher_cache.store.store import Store, is_complete
from teacher_cache.teachers.base import TeacherOutput
from teacher_cache.terminal import progress
from teacher_cache.words import human

PLAN = ExtractPlan(shard_rows=8, batch_size=5)


@pytest.fixture
def crops(shared_cache, tmp_path) -> Cache:
    """A copy of the shared cache's crops, without stores."""
    return Cache(shutil.copytree(shared_cache.path, tmp_path / "crops", ignore=shutil.ignore_patterns("*.zarr")))


@pytest.fixture(scope="module")
def undisturbed(shared_cache):
    """The files of store `fake` of each view, made in one go."""
    return [contents(view.store_path("fake")) for view in shared_cache.views()]


class Counting:
    """A teacher that counts its calls and can be told to fail at one of them, or to change what it says."""

    def __init__(self, teacher, fail_at=0, change=lambda output: output, **spec):
        self.teacher, self.fail_at, self.change, self.n_calls = teacher, fail_at, change, 0
        self.spec = replace(teacher.spec, **spec)
        self.head, self.device, self.precision = teacher.head, teacher.device, teacher.precision
        self.is_compiled = teacher.is_compiled

    def __call__(self, images, layers):
        self.n_calls += 1
        if self.n_calls == self.fail_at:
            raise KeyboardInterrupt
        return self.change(self.teacher(images, layers))


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fake", "fake16", "fake-zstd"])
@pytest.mark.parametrize("number", [0, 1])
def test_tokens_are_the_teachers(shared_cache, teacher, name, number):
    """Tokens read back are the teacher's on the very crops, within the bound of their dtype; attention is exact."""
    view = shared_cache.view(number)
    reader = StoreReader(view.store_path(name))
    output = teacher(torch.from_numpy(CropReader(view.path).read(range(24))), reader.spec.layers)
    assert reader.spec.layers == (2, 3, 4, 5, 6) and reader.is_complete
    for i, layer in enumerate(reader.spec.layers):
        true, stored = output.tokens[:, i].numpy(), reader.tokens(range(24), layer)
        assert stored.shape == true.shape == (24, 17, 24)
        if name == "fake16":
            assert np.array_equal(stored, true.astype("float16"))
        else:
            scale = reader.read("scale", range(24))[:, i].astype("float32")  # [B, C+N, 1]
            assert (np.abs(stored - true) <= scale * reader.statistics[layer].spread * (0.5 + 127 * 2**-11) + 1e-5).all()
            assert np.linalg.norm(stored - true) / np.linalg.norm(true) < 0.01
    assert np.abs(reader.read("attention", range(24)) - output.attention.numpy()).max() < 1e-6


def test_attention_is_exact(shared_cache, teacher):
    """In the batches of the extraction, attention is stored to the bit."""
    view = shared_cache.view(0)
    images, stored = torch.from_numpy(CropReader(view.path).read(range(24))), StoreReader(view.store_path("fake")).read
    for rows in (range(0, 5), range(5, 8), range(8, 13)):
        assert np.array_equal(stored("attention", rows), teacher(images[list(rows)], (6,)).attention.numpy())


def test_head_and_manifest(shared_cache, teacher):
    """A store carries the teacher's head and description, the crops it was made from, and a measured fidelity per layer."""
    view = shared_cache.view(1)
    reader = StoreReader(view.store_path("fake"))
    assert all(np.array_equal(reader.head[name], teacher.head[name]) for name in ("gamma", "beta", "projection"))
    manifest = reader.manifest
    assert manifest.teacher == teacher.spec and manifest.view == 1 and manifest.precision == "fp32"
    assert (manifest.crops_id, manifest.crops_sha256) == (shared_cache.crops_id, view.crops_sha256)
    assert [fidelity.layer for fidelity in manifest.fidelity] == [2, 3, 4, 5, 6]
    assert torch.__version__.startswith(manifest.software["torch"])
    for fidelity in manifest.fidelity:
        assert 1e-4 < fidelity.median < 0.01 and fidelity.median <= fidelity.p99 <= fidelity.worst < 0.03
        assert fidelity.n_tokens == 16 * 17


def test_measured_fidelity_is_true(shared_cache, teacher):
    """The error that a store reports is the one that its rows have."""
    from teacher_cache.format.quantize import token_errors

    reader = StoreReader(shared_cache.view(0).store_path("fake"))
    images = torch.from_numpy(CropReader(shared_cache.view(0).path).read(range(24)))
    true = teacher(images, (4,)).tokens[:, 0].numpy().reshape(-1, 24)
    errors = token_errors(true, reader.tokens(range(24), 4).reshape(-1, 24), reader.statistics[4])
    assert reader.manifest.fidelity[2].median == pytest.approx(np.median(errors), rel=0.1)


def test_views_share_the_quantiser(shared_cache):
    """View 1 has view 0's channel statistics, head and probe, byte for byte."""
    first, second = (contents(shared_cache.view(number).store_path("fake")) for number in (0, 1))
    shared = [name for name in first if name.startswith(("quant/", "head/", "probe/"))]
    assert len(shared) > 20 and all(first[name] == second[name] for name in shared)
    assert first["tokens/06/c.0.0.0"] != second["tokens/06/c.0.0.0"]


def test_view_1_needs_view_0(crops, teacher):
    """A view whose quantiser does not exist yet says which to extract first, and is not begun."""
    with pytest.raises(NotInCacheError, match="shares the quantiser of view 0, which has no store fake: extract view 0 first"):
        extract_view(crops.view(1), "fake", teacher, PLAN)
    assert not list(crops.path.rglob("*.zarr*"))


def test_teacher_without_cls(crops):
    """A teacher without CLS gives a store without attention, one token fewer a row."""
    extract_view(crops.view(0), "t", FakeTeacher(has_cls=False), PLAN)
    reader = StoreReader(crops.view(0).store_path("t"))
    assert reader.read("tokens/06", [3]).shape == (1, 16, 24)
    with pytest.raises(NotInCacheError, match="no attention; it has tokens/02"):
        reader.read("attention", [0])


def test_bytes_do_not_depend_on_the_run(crops, undisturbed):
    """Another process, another day, the same inputs: the same bytes in every file of every view."""
    for number in (0, 1):
        assert extract_view(crops.view(number), "fake", FakeTeacher(), PLAN) is True
        assert contents(crops.view(number).store_path("fake")) == undisturbed[number]


@pytest.mark.parametrize(("shard_rows", "batch_size"), [(1, 5), (24, 100), (2048, 1), (7, 7)])
def test_shards_and_batches(crops, teacher, shard_rows, batch_size):
    """Shards and batches of any size hold the same rows."""
    plan = ExtractPlan("last2", "float16", shard_rows=shard_rows, batch_size=batch_size)
    extract_view(crops.view(0), "t", teacher, plan)
    reader = StoreReader(crops.view(0).store_path("t"))
    output = teacher(torch.from_numpy(CropReader(crops.view(0).path).read(range(24))), (5, 6))
    assert np.abs(reader.tokens(range(24), 5) - output.tokens[:, 0].numpy()).max() < 4e-3
    assert np.abs(reader.read("attention", range(24)) - output.attention.numpy()).max() < 1e-6


# --- choices ---------------------------------------------------------------------------------------------------------

LAYERS = {"last": (6,), "last1": (6,), "last5": (2, 3, 4, 5, 6), "last99": (1, 2, 3, 4, 5, 6), "1,3,6": (1, 3, 6),
          " 6, 3 ,3": (3, 6), "4": (4,)}  # fmt: skip


@pytest.mark.parametrize("text", LAYERS)
def test_layers(teacher, text):
    """--layers takes the last few blocks or block numbers, in any order."""
    assert ExtractPlan(text).layers_of(teacher.spec) == LAYERS[text]


@pytest.mark.parametrize("text", ["", "0", "7", "1,7", "last0", "last-1", "first", "1-3", "1;2", "-1", "1.5", "last 5", ",", "²"])
def test_wrong_layers(teacher, text):
    """Blocks that the teacher does not have are refused with those it has."""
    with pytest.raises(UsageError, match="fake has blocks 1 to 6. Give numbers such as 5,6, or last, or last5"):
        ExtractPlan(text).layers_of(teacher.spec)


@pytest.mark.parametrize("options", [{"dtype": "int3"}, {"shard_rows": 0}, {"batch_size": -1}])
def test_wrong_plans(options):
    """Unknown dtypes, and sizes below one, are refused."""
    with pytest.raises(UsageError, match="dtype is one of|must be positive"):
        ExtractPlan(**options)


# --- again -----------------------------------------------------------------------------------------------------------


def test_finished_does_nothing(cache, teacher):
    """On a finished store nothing is done: the teacher is not asked, no file is touched, and the answer is False."""
    counting, before = Counting(teacher), contents(cache.path)
    times = {path: path.stat().st_mtime_ns for path in cache.path.rglob("*")}
    assert extract_view(cache.view(0), "fake", counting, PLAN) is False
    assert counting.n_calls == 0 and contents(cache.path) == before
    assert {path: path.stat().st_mtime_ns for path in cache.path.rglob("*")} == times


def test_weights_may_move(cache, teacher):
    """The same weights under another file name are the same teacher."""
    assert extract_view(cache.view(0), "fake", Counting(teacher, weights="elsewhere/copy.pt"), PLAN) is False


OTHER = {
    "layers": (ExtractPlan("last2", shard_rows=8), {}, "layers: 2,3,4,5,6 in the store, 5,6 given"),
    "dtype": (ExtractPlan(dtype="float16", shard_rows=8), {}, "dtype: int8 in the store, float16 given"),
    "shards": (ExtractPlan(shard_rows=4), {}, "shard_rows: 8 in the store, 4 given"),
    "weights": (
        PLAN,
        {"weights_sha256": "f" * 64},
        r"weights: random:0 \(sha256 .{12}\) in the store, random:0 \(sha256 f{12}\) given",
    ),
    "teacher": (PLAN, {"name": "other"}, "name: fake in the store, other given"),
    "resize": (PLAN, {"resize": "bilinear"}, "resize: none in the store, bilinear given"),
    "activation": (PLAN, {"activation": "quick_gelu"}, "activation: none in the store, quick_gelu given"),
    "positions": (PLAN, {"positions": "antialiased"}, "positions: none in the store, antialiased given"),
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("number", [0, 1])
def test_other_parameters_are_refused(cache, teacher, case, number):
    """A store refuses to be continued differently, names each difference and the way out, and stays as it is."""
    plan, spec, words = OTHER[case]
    before = contents(cache.path)
    with pytest.raises(MismatchError, match=f"was made with other parameters:(.|\n)*{words}(.|\n)*another --name, or delete"):
        extract_view(cache.view(number), "fake", Counting(teacher, **spec), plan)
    assert contents(cache.path) == before


def test_every_difference_is_named(cache, teacher):
    """All differences stand in one message, also when view 1 is begun unlike view 0."""
    shutil.rmtree(cache.view(1).store_path("fake"))
    with pytest.raises(MismatchError) as caught:
        extract_view(cache.view(1), "fake", Counting(teacher, name="b"), ExtractPlan("last2", "float16", shard_rows=4))
    for key in ("name:", "layers:", "dtype:", "shard_rows:", "group:"):
        assert f"\n  {key} " in str(caught.value)
    assert "codecs" not in str(caught.value)  # they differ with the arrays
    assert not cache.view(1).store_path("fake").exists()


def test_store_of_other_crops_is_refused(cache, teacher):
    """A store that was copied from another view is not taken for this view's."""
    shutil.rmtree(cache.view(1).store_path("fake"))
    shutil.copytree(cache.view(0).store_path("fake"), cache.view(1).store_path("fake"))
    with pytest.raises(MismatchError, match="crops_sha256: "):
        extract_view(cache.view(1), "fake", teacher, PLAN)


def interrupt(crops, teacher, at=8) -> None:
    """Leave `fake` with one finished shard of three: 4 calls fit the quantiser, one is the probe, two make a shard."""
    with pytest.raises(KeyboardInterrupt):
        extract_view(crops.view(0), "fake", Counting(teacher, fail_at=at), PLAN)


@pytest.mark.parametrize("at", range(1, 12))
def test_interrupted_anywhere(crops, teacher, undisturbed, at):
    """Stopped at any call of the teacher and run again, a store ends with the same bytes, and finished shards are kept."""
    interrupt(crops, teacher, at)
    store = crops.view(0).store_path("fake")
    assert not list(crops.path.rglob("*.claim")) and not list(store.rglob("*.partial")) and not is_complete(store)
    finished = {path: path.stat().st_mtime_ns for path in store.rglob("c.*")} if store.exists() else {}
    again = Counting(teacher)
    assert extract_view(crops.view(0), "fake", again, PLAN) is True
    assert contents(store) == undisturbed[0] and not list(crops.path.rglob("*.claim"))
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    if finished:
        n_shards = len({path.name for path in finished if "tokens" in str(path)})
        assert again.n_calls == 1 + 2 * (3 - n_shards)  # the probe, then two batches a shard


SHARD_FILE = writer._ShardFile
CRASHES = [(Store, "write_commit", 1), (Store, "write_commit", 3), (SHARD_FILE, "publish", 1), (SHARD_FILE, "finish", 10)]


@pytest.mark.parametrize(("owner", "name", "call"), CRASHES)
def test_crashes_while_a_shard_is_published(crops, teacher, undisturbed, monkeypatch, owner, name, call):
    """A crash between the files of a shard and its record makes that shard again, to the same bytes."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(getattr(owner, name), call, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            extract_view(crops.view(0), "fake", teacher, PLAN)
    extract_view(crops.view(0), "fake", teacher, PLAN)
    assert contents(crops.view(0).store_path("fake")) == undisturbed[0] and not list(crops.path.rglob("*.claim"))


def test_killed_before_its_records_were_removed(crops, teacher, undisturbed, monkeypatch):
    """Commit records that outlived the completion of their store go away when the command is run again."""
    from teacher_cache.store import folding

    with monkeypatch.context() as patch:
        patch.setattr(folding.shutil, "rmtree", failing_at(shutil.rmtree, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            extract_view(crops.view(0), "fake", teacher, PLAN)
    assert (crops.view(0).store_path("fake") / "commits").exists()
    assert extract_view(crops.view(0), "fake", teacher, PLAN) is False
    assert contents(crops.view(0).store_path("fake")) == undisturbed[0]


def test_another_answer_to_the_probe(crops, teacher, undisturbed):
    """A teacher that answers the probe image differently may not continue a store; rounding may."""
    interrupt(crops, teacher)
    before = contents(crops.path)
    other = Counting(teacher, change=lambda output: TeacherOutput(output.tokens * 1.01, output.attention))
    with pytest.raises(MismatchError, match="answers to the probe image 0.01 .* differently from when the store was begun"):
        extract_view(crops.view(0), "fake", other, PLAN)
    broken = Counting(teacher, change=lambda output: TeacherOutput(output.tokens * float("nan"), output.attention))
    with pytest.raises(BadInputError, match="answers to the probe image with non-finite values"):
        extract_view(crops.view(0), "fake", broken, PLAN)
    assert contents(crops.path) == before
    rounding = Counting(teacher, change=lambda output: TeacherOutput(output.tokens * 1.0001, output.attention))
    assert extract_view(crops.view(0), "fake", rounding, PLAN) is True
    assert probe_image(16).tobytes() == probe_image(16).tobytes() and probe_image(224).shape == (224, 224, 3)


@pytest.mark.parametrize("where", ["tokens", "attention"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(crops, teacher, where, value):
    """A teacher that gives NaN or infinity for one row twice is stopped with that row; nothing of its shard is committed."""

    def spoil(output):
        if counting.n_calls in (9, 11):  # rows 13 to 15, the second batch of the second shard; 10 is the batch behind it
            getattr(output, where)[1, ..., 3] = value
        return output

    counting = Counting(teacher, change=spoil)
    with pytest.raises(BadInputError, match=r"non-finite values in fp32 for row 14, class-.* \(1 of 3 rows of its batch"):
        extract_view(crops.view(0), "fake", counting, PLAN)
    reader = StoreReader(crops.view(0).store_path("fake"))
    assert reader.finished.tolist() == [True, False, False] and not list(crops.path.rglob("*.partial"))


@pytest.mark.parametrize("call", [1, 20, 30])
def test_full_disk(crops, teacher, undisturbed, monkeypatch, call):
    """A disk that fills up is a NoSpaceError that says what is kept; with room again the store ends with the same bytes."""

    class FullFile:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal call
            call -= 1
            if call == 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        create_aside = writer.create_aside
        patch.setattr(writer, "create_aside", lambda *a, **k: FullFile(create_aside(*a, **k)))
        words = "fake.zarr is full. ([01]) of 3 shards are finished and kept; (.*) are still to be written. Make room and run"
        with pytest.raises(NoSpaceError, match=words) as caught:
            extract_view(crops.view(0), "fake", teacher, PLAN)
    done, needed = re.search(words, str(caught.value)).groups()
    spec = crops.view(0).store("fake").spec
    assert needed == human(sum(shard_bytes(spec, teacher.spec, shard) for shard in range(int(done), 3)))
    assert not list(crops.path.rglob("*.partial"))
    extract_view(crops.view(0), "fake", teacher, PLAN)
    assert contents(crops.view(0).store_path("fake")) == undisturbed[0]


def test_full_disk_before_anything_is_there(crops, teacher, monkeypatch):
    """A disk too full to begin a store is the same error."""
    monkeypatch.setattr(extract, "create_store", failing_at(extract.create_store, 1, OSError(122, "Disk quota exceeded")))
    with pytest.raises(NoSpaceError, match=r"is full. [\d.]+ kB are still to be written. Make room and run"):
        extract_view(crops.view(0), "fake", teacher, PLAN)


# --- several processes -----------------------------------------------------------------------------------------------


def test_a_store_that_is_being_written(crops, teacher):
    """A second extraction of the same store is refused, while it is begun and while it is filled; of another store it is not."""
    store = crops.view(0).store_path("fake")
    with claimed(store_claim(store), "x"):
        with pytest.raises(MismatchError, match=f"fake.zarr is being written by process {os.getpid()}"):
            extract_view(crops.view(0), "fake", teacher, PLAN)
        assert extract_view(crops.view(0), "other", teacher, replace(PLAN, layers="last")) is True
    interrupt(crops, teacher)
    with claimed_range(store_claims(store), 1, 2, "x"):
        for shards, asked in ((None, "0:3"), (range(0, 2), "0:2"), (range(1, 99), "1:3")):
            words = f"fake.zarr: shards 1:2 are being written by process {os.getpid()} on host .*, and {asked} overlaps"
            with pytest.raises(MismatchError, match=words):
                extract_view(crops.view(0), "fake", teacher, PLAN, shards)
        assert extract_view(crops.view(0), "fake", teacher, PLAN, range(2, 3)) is True
    assert StoreReader(store).finished.tolist() == [True, False, True]


@pytest.mark.parametrize("ranges", [[(0, 1), (1, 3)], [(2, 99), (1, 2), (0, 1)], [(0, 1), (0, 3)], [(0, 3)]])
def test_shares_of_a_store(crops, teacher, undisturbed, ranges):
    """Shares of the shards, in any order, make the bytes that one process makes; the last share completes the store."""
    store = crops.view(0).store_path("fake")
    for first, last in ranges:
        assert not is_complete(store)
        assert extract_view(crops.view(0), "fake", teacher, PLAN, range(first, last)) is True
    assert contents(store) == undisturbed[0] and {path.name for path in store.parent.glob("*.zarr*")} == {"fake.zarr"}
    times = {path: path.stat().st_mtime_ns for path in crops.path.rglob("*")}
    assert extract_view(crops.view(0), "fake", Counting(teacher, fail_at=1), PLAN, range(1, 2)) is False
    assert {path: path.stat().st_mtime_ns for path in crops.path.rglob("*")} == times


def test_a_share_that_is_done(crops, teacher):
    """A share whose shards are all there asks the teacher nothing, and leaves the rest to others."""
    extract_view(crops.view(0), "fake", teacher, PLAN, range(0, 2))
    assert extract_view(crops.view(0), "fake", Counting(teacher, fail_at=1), PLAN, range(1, 2)) is False
    assert StoreReader(crops.view(0).store_path("fake")).finished.tolist() == [True, True, False]


@pytest.mark.parametrize("begun", [False, True])
def test_a_share_behind_the_end(crops, teacher, begun):
    """A range that begins behind the last shard is refused with the number of shards, before anything is begun."""
    if begun:
        extract_view(crops.view(0), "fake", teacher, PLAN, range(0, 1))
    before = contents(crops.path)
    with pytest.raises(UsageError, match="--shards 3:...: there are 3 shards; the range must begin at 0 to 2"):
        extract_view(crops.view(0), "fake", teacher, PLAN, range(3, 4))
    assert contents(crops.path) == before


def test_a_share_probes_the_teacher(crops, teacher):
    """A process that joins a store with a teacher that answers otherwise is refused before its first shard."""
    extract_view(crops.view(0), "fake", teacher, PLAN, range(0, 1))
    other = Counting(teacher, change=lambda output: TeacherOutput(output.tokens * 1.01, output.attention))
    with pytest.raises(MismatchError, match="answers to the probe image 0.01"):
        extract_view(crops.view(0), "fake", other, PLAN, range(1, 2))
    assert StoreReader(crops.view(0).store_path("fake")).finished.tolist() == [True, False, False]
    assert not list(crops.path.rglob("*.claim*"))


def test_an_array_that_starts_at_once(crops, teacher, undisturbed, monkeypatch, capsys):
    """Of three writers that start at the same moment one begins the stores, two wait for it and say for whom; together they make
    what one makes, the quantiser is fitted once, and the store is completed once."""
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    n_waiting, fitted, folded = threading.Semaphore(0), [], []
    fit, fold, real_waiting = extract._fit, filling.fold, extract.waiting

    def fit_when_all_wait(*arguments):
        fitted.append(1)
        assert n_waiting.acquire(timeout=60) and n_waiting.acquire(timeout=60)
        return fit(*arguments)

    def counted_waiting(what):
        say, told = real_waiting(what), []

        def wait(who):
            if not told:
                n_waiting.release()
            told.append(who)
            say(who)

        return wait

    monkeypatch.setattr(extract, "_fit", fit_when_all_wait)
    monkeypatch.setattr(filling, "fold", lambda store: folded.append(store.is_complete) or fold(store))
    monkeypatch.setattr(extract, "waiting", counted_waiting)

    def work(first: int) -> int:
        counting = Counting(teacher)
        for number in (0, 1):
            extract_view(crops.view(number), "fake", counting, PLAN, range(first, first + 1))
        return counting.n_calls

    with ThreadPoolExecutor(3) as pool:
        n_calls = list(pool.map(work, range(3)))
    for number in (0, 1):
        assert contents(crops.view(number).store_path("fake")) == undisturbed[number]
    assert len(fitted) == 1 and folded.count(False) == 2 and not list(crops.path.rglob("*.claim*"))
    # the quantiser and the probe once; two batches a shard; a probe by whoever joins: two of view 0, two of view 1
    assert sum(n_calls) == 4 + 1 + 2 * 3 * 2 + 2 + 2
    assert f"view 0: fake: waiting for process {os.getpid()} on host {socket.gethostname()}" in capsys.readouterr().err


def test_claims_of_the_dead_go_away(cache, teacher):
    """What a process left that was killed when it had completed a store goes away when the command is run again."""
    store, before = cache.view(0).store_path("fake"), contents(cache.path)
    store_claim(store).touch()
    store_claims(store).mkdir()
    (store_claims(store) / "000000-000003.claim").touch()
    assert extract_view(cache.view(0), "fake", Counting(teacher, fail_at=1), PLAN) is False
    assert contents(cache.path) == before and not store_claims(store).exists()


def test_waiting_is_told_when_it_changes(capsys, monkeypatch):
    """One is told for whom one waits at once, when it changes, and every few minutes."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    say = progress.waiting("w")
    for now, who in ((0, "a"), (60, "a"), (179, "a"), (181, "a"), (182, "b"), (361, "b")):  # noqa: B007 - read by the lambda
        say(who)
    assert capsys.readouterr().err.splitlines() == [f"w: waiting for {who}" for who in "aab"]


@pytest.mark.parametrize("gone", [".", "view-000", "view-000/fake.zarr"])
def test_a_store_that_vanishes(crops, teacher, gone):
    """A store that is deleted while it is written to, alone or with all around it, is named with what to do."""

    def delete(output):
        if counting.n_calls == 9:
            while (crops.path / gone).exists():  # the writer is at work in it
                shutil.rmtree(crops.path / gone, ignore_errors=True)
        return output

    counting = Counting(teacher, change=delete)
    words = f"^{crops.path / gone} was deleted or moved while the teacher's targets were being written to it. Put it back"
    with pytest.raises(NotInCacheError, match=words):
        extract_view(crops.view(0), "fake", counting, PLAN)
    assert not list(crops.path.glob("view-000/*.claim*"))
