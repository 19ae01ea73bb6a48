"""Extraction: the same bytes whatever happens on the way, refusals that name their reason, one writer at a time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_fakes import contents, failing_at
from fakes import FakeTeacher

from teacher_cache import extract, writer
from teacher_cache.beton import CropReader
from teacher_cache.cache import Cache
from teacher_cache.claims import claimed
from teacher_cache.commits import is_complete
from teacher_cache.errors import BadInputError, MismatchError, NoSpaceError, NotInCacheError, UsageError
from teacher_cache.extract import ExtractPlan, extract_view, probe_image
from teacher_cache.reader import StoreReader
from teacher_cache.store import read_manifest
from teacher_cache.teachers.base import TeacherOutput
from teacher_cache.verify import verify

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
    from teacher_cache.quantize import token_errors

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


@pytest.mark.parametrize("options", [{"dtype": "int3"}, {"codec": "gzip"}, {"shard_rows": 0}, {"batch_size": -1}])
def test_wrong_plans(options):
    """Unknown dtypes and codecs, and sizes below one, are refused."""
    with pytest.raises(UsageError, match="dtype is one of|must be positive"):
        ExtractPlan(**options)


def test_codec_auto(crops, teacher):
    """`auto` compresses tokens where that saves enough, and leaves the others, scales and attention alone."""
    flat = Counting(teacher, change=lambda output: replace(output, tokens=output.tokens.sign() * (output.tokens.abs() > 1)))
    extract_view(crops.view(0), "plain", teacher, replace(PLAN, dtype="float16"))
    extract_view(crops.view(0), "flat", flat, PLAN)
    codecs = {name: dict(read_manifest(crops.view(0).store_path(name)).store.codecs) for name in ("plain", "flat")}
    assert set(codecs["plain"].values()) == {"none"}
    assert codecs["flat"] == {**{f"tokens/{i:02d}": "zstd" for i in range(2, 7)}, "scale": "none", "attention": "none"}
    sizes = {name: sum(map(len, contents(crops.view(0).store_path(name) / "tokens").values())) for name in codecs}
    assert sizes["flat"] < 0.85 * sizes["plain"] / 2


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
    "layers": (ExtractPlan("last2", shard_rows=8), {}, r"layers: \(2, 3, 4, 5, 6\) in the store, \(5, 6\) given"),
    "dtype": (ExtractPlan(dtype="float16", shard_rows=8), {}, "dtype: int8 in the store, float16 given"),
    "codec": (ExtractPlan(codec="zstd", shard_rows=8), {}, "codecs: .*none.* in the store, .*zstd.* given"),
    "shards": (ExtractPlan(shard_rows=4), {}, "shard_rows: 8 in the store, 4 given"),
    "weights": (PLAN, {"weights_sha256": "f" * 64}, "weights_sha256: .* in the store, f{64} given"),
    "teacher": (PLAN, {"name": "other"}, "name: fake in the store, other given"),
    "resize": (PLAN, {"resize": "bilinear"}, "resize: none in the store, bilinear given"),
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
    for key in ("name:", "layers:", "dtype:", "shard_rows:", "group:", "codecs:"):
        assert f"\n  {key} " in str(caught.value)
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
CRASHES = [(writer, "write_commit", 1), (writer, "write_commit", 3), (SHARD_FILE, "publish", 1), (SHARD_FILE, "finish", 10)]


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
    from teacher_cache import commits

    with monkeypatch.context() as patch:
        patch.setattr(commits.shutil, "rmtree", failing_at(shutil.rmtree, 2, KeyboardInterrupt()))  # the first is create_store's
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
    with pytest.raises(MismatchError, match="answers to the probe image nan"):
        extract_view(crops.view(0), "fake", broken, PLAN)
    assert contents(crops.path) == before
    rounding = Counting(teacher, change=lambda output: TeacherOutput(output.tokens * 1.0001, output.attention))
    assert extract_view(crops.view(0), "fake", rounding, PLAN) is True
    assert probe_image(16).tobytes() == probe_image(16).tobytes() and probe_image(224).shape == (224, 224, 3)


@pytest.mark.parametrize("where", ["tokens", "attention"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(crops, teacher, where, value):
    """A teacher that gives NaN or infinity for one row is stopped with that row; nothing of its shard is committed."""

    def spoil(output):
        if counting.n_calls == 9:  # rows 13 to 15, the second batch of the second shard
            getattr(output, where)[1, ..., 3] = value
        return output

    counting = Counting(teacher, change=spoil)
    with pytest.raises(BadInputError, match=r"fake gives non-finite values for row 14 \(1 of 3 rows of its batch\). Check"):
        extract_view(crops.view(0), "fake", counting, PLAN)
    reader = StoreReader(crops.view(0).store_path("fake"))
    assert reader.finished.tolist() == [True, False, False] and not list(crops.path.rglob("*.partial"))


@pytest.mark.parametrize("call", [1, 20, 60])
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
        patch.setattr(writer, "open", lambda *a, **k: FullFile(open(*a, **k)), raising=False)  # noqa: SIM115
        with pytest.raises(NoSpaceError, match="fake.zarr is full. [01] of 3 shards are finished and kept; make room and run"):
            extract_view(crops.view(0), "fake", teacher, PLAN)
    assert not list(crops.path.rglob("*.partial"))
    extract_view(crops.view(0), "fake", teacher, PLAN)
    assert contents(crops.view(0).store_path("fake")) == undisturbed[0]


def test_full_disk_before_anything_is_there(crops, teacher, monkeypatch):
    """A disk too full to begin a store is the same error."""
    monkeypatch.setattr(extract, "create_store", failing_at(extract.create_store, 1, OSError(122, "Disk quota exceeded")))
    with pytest.raises(NoSpaceError, match="is full. Make room and run the same command again"):
        extract_view(crops.view(0), "fake", teacher, PLAN)


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_living_process_keeps_its_claim(tmp_path):
    """While one process writes, another is refused with its process number and host; afterwards it may."""
    script = f"""
from pathlib import Path
from teacher_cache.claims import claimed
with claimed(Path({str(tmp_path / "claim")!r}), "x"):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        words = f"The store is being written by process {holder.pid} on host {socket.gethostname()}. Wait for it, or stop it"
        with pytest.raises(MismatchError, match=words), claimed(tmp_path / "claim", "The store"):
            pass
        holder.kill()
        holder.wait()
    assert (tmp_path / "claim").exists()  # killed, it could not remove its claim
    with claimed(tmp_path / "claim", "The store"):
        assert json.loads((tmp_path / "claim").read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    assert not (tmp_path / "claim").exists()


def test_a_process_refuses_itself(tmp_path):
    """Two threads of one process cannot hold the same claim, and the refused one leaves it in place."""
    with claimed(tmp_path / "claim", "x"):
        with pytest.raises(MismatchError, match=f"by process {os.getpid()} "), claimed(tmp_path / "claim", "x"):
            pass
        assert (tmp_path / "claim").exists()


@pytest.mark.parametrize("text", ["", "garbage", "[]", '{"host": "here"}', json.dumps({"host": socket.gethostname(), "pid": 1})])
def test_dead_claims_are_taken_over(tmp_path, text):
    """A claim that nobody holds is taken over, whatever stands in it, even if another process has its number now."""
    (tmp_path / "claim").write_text(text)
    with claimed(tmp_path / "claim", "x"):
        pass
    assert not (tmp_path / "claim").exists()


def test_a_claim_of_another_host_is_explained(tmp_path):
    """A claim from another host, whose processes cannot be asked, is refused with host, process and the file to delete."""
    (tmp_path / "claim").write_text(json.dumps({"host": "node-17", "pid": 4711}))
    words = "by process 4711 on host node-17. Wait for it; if it is gone, delete .*claim and"
    with pytest.raises(MismatchError, match=words), claimed(tmp_path / "claim", "x"):
        pass
    assert json.loads((tmp_path / "claim").read_text())["pid"] == 4711


def test_claims_end_with_errors(tmp_path):
    """An error inside the block releases the claim."""
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), claimed(tmp_path / "claim", "x"):
            raise ZeroDivisionError


def test_a_store_that_is_being_written(crops, teacher):
    """A second extraction of the same store is refused; of another store it is not."""
    with claimed(crops.view(0).path / "fake.zarr.claim", "x"):
        with pytest.raises(MismatchError, match=f"fake.zarr is being written by process {os.getpid()}"):
            extract_view(crops.view(0), "fake", teacher, PLAN)
        assert extract_view(crops.view(0), "other", teacher, replace(PLAN, layers="last")) is True


def test_a_store_finished_by_another_meanwhile(crops, teacher, undisturbed, monkeypatch):
    """A process that waited while another finished the store does no work and no harm."""
    whole = crops.path.with_name("whole")
    shutil.copytree(crops.path, whole)
    extract_view(Cache(whole).view(0), "fake", teacher, PLAN)
    interrupt(crops, teacher)
    store, probe = crops.view(0).store_path("fake"), extract._require_same_probe

    def meanwhile(*arguments):
        probe(*arguments)
        shutil.rmtree(store)
        shutil.copytree(Cache(whole).view(0).store_path("fake"), store)

    monkeypatch.setattr(extract, "_require_same_probe", meanwhile)
    counting = Counting(teacher)
    extract_view(crops.view(0), "fake", counting, PLAN)
    assert contents(store) == undisturbed[0] and counting.n_calls == 1 and verify(Cache(whole))[0] == []
