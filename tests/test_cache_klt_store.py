"""Stores coded by a transform on disk: made, continued, shared out, checked, mended, recoded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from cache_fakes import contents, crop_folder, failing_at, flip_bit
from click.testing import CliRunner
from fakes import FakeTeacher, write_images
from klt_fakes import fitted
from store_fakes import MADE, TEACHER, shard_of, write_again

from teacher_cache.cache import Cache
from teacher_cache.checking.remake import reteach
from teacher_cache.checking.repair import repair_store
from teacher_cache.checking.verify import verify
from teacher_cache.cli.main import main
from teacher_cache.errors import CacheCorruptError, MismatchError, NotInCacheError, UsageError
from teacher_cache.extraction import recode as recoding
from teacher_cache.extraction.extract import extract_view
from teacher_cache.extraction.planning import ExtractPlan, plan_targets
from teacher_cache.extraction.recode import recode
from teacher_cache.files.durable import read_sealed, seal, sha256_file
from teacher_cache.format.layout import store_claim, store_claims
from teacher_cache.format.spec import StoreSpec
from teacher_cache.store.manifest import Manifest, extract_command, manifest_of
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.store import Store
from teacher_cache.store.writer import ShardWriter

N = 200
PLAN = ExtractPlan("4,5,6", "klt:4", shard_rows=64, batch_size=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two views of 200 crops with the stores `klt` and `int8`. Not to be changed."""
    folder = tmp_path_factory.mktemp("klt")
    cache = crop_folder(folder / "cache", write_images(folder / "images", 2, N // 2), 2)
    for view in cache.views():
        extract_view(view, "klt", FakeTeacher(), PLAN)
        extract_view(view, "int8", FakeTeacher(), replace(PLAN, dtype="int8"))
    return cache


@pytest.fixture
def cache(made, tmp_path):
    """A copy of it."""
    shutil.copytree(made.path, tmp_path / "cache")
    return Cache(tmp_path / "cache")


def of(cache: Cache, name: str = "klt", view: int = 0) -> Store:
    return cache.view(view).store(name)


def said(*arguments) -> tuple[int, str]:
    """Exit code and output of a command."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_what_a_store_says(made):
    """It is of version 5, with one basis in all views; others stay of version 4 and say nothing of a transform."""
    first, second, plain = of(made), of(made, view=1), of(made, "int8")
    assert (first.manifest.format_version, plain.manifest.format_version) == (5, 4)
    assert (
        first.shared_sha256 == second.shared_sha256 and {"quant/05/basis/c.0.0", "quant/levels/c.0"} <= first.shared_sha256.keys()
    )
    assert first.spec.array_names == ["tokens/04", "tokens/05", "tokens/06", "attention"]
    said_of_plain = plain.manifest.to_json()
    assert "source" not in said_of_plain and "cls" not in said_of_plain["fidelity"][0]
    assert verify(made)[0] == []


def test_fidelity_is_of_other_rows(made):
    """What is on record is what rows that nothing was fitted on have, CLS apart: measured here again from the live teacher."""
    from teacher_cache.crops.beton import CropReader
    from teacher_cache.format.quantize import token_errors

    reader, rows = StoreReader(made.view(0).store_path("klt")), np.arange(N)
    import torch

    true = FakeTeacher()(torch.from_numpy(CropReader(made.view(0).path).read(rows)), (4, 5, 6)).tokens.numpy()
    for place, fidelity in enumerate(reader.manifest.fidelity):
        errors = token_errors(true[:, place], reader.tokens(rows, fidelity.layer), reader.statistics[fidelity.layer])
        assert fidelity.n_tokens == 25 * 16 and fidelity.cls is not None
        held = errors[175:]
        assert np.allclose([np.median(held[:, 1:]), held[:, 1:].max()], [fidelity.median, fidelity.worst], rtol=1e-3)
        assert np.allclose([np.median(held[:, 0]), held[:, 0].max()], [fidelity.cls[0], fidelity.cls[2]], rtol=1e-3)


def test_interrupted_and_shared_out(made, tmp_path, monkeypatch):
    """Killed between shards and made by two ranges: the same bytes as in one go."""
    shutil.copytree(made.path, tmp_path / "cache", ignore=lambda _, names: [name for name in names if ".zarr" in name])
    cache = Cache(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_commit", failing_at(Store.write_commit, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            extract_view(cache.view(0), "klt", FakeTeacher(), PLAN)
    assert of(cache).n_finished() == 1 and extract_view(cache.view(0), "klt", FakeTeacher(), PLAN)
    for shards in (range(2, 4), range(2)):
        extract_view(cache.view(1), "klt", FakeTeacher(), PLAN, shards)
    for view in (0, 1):
        assert contents(cache.view(view).store_path("klt")) == contents(made.view(view).store_path("klt"))


def test_other_bits_are_another_store(cache):
    """A store is continued with the bits it has; others are refused, and given nothing they are taken from it."""
    assert plan_targets(cache.path, "klt", None)[0] == PLAN
    with pytest.raises(MismatchError, match="dtype: klt:4 in the store, klt:3.2 given"):
        extract_view(cache.view(0), "klt", FakeTeacher(), replace(PLAN, dtype="klt"))


def test_too_few_images(made, tmp_path):
    """Fewer tokens than 20 a channel: a sentence, and nothing is left behind."""
    cache = crop_folder(tmp_path / "cache", write_images(tmp_path / "images", 1, 40))
    with pytest.raises(UsageError, match="at least 1,440 tokens; 40 images have 595 to fit on. Give --dtype int4"):
        extract_view(cache.view(0), "klt", FakeTeacher(), PLAN)
    assert cache.view(0).store_names() == []


def test_a_hole_shows(cache):
    """zarr answers for a missing shard with scale 0, which no writer produces; a reader raises, and verify says it is missing."""
    path = cache.view(0).store_path("klt")
    shard_of(path, "tokens/05", 1).unlink()
    assert not zarr.open_group(path, mode="r")["tokens/05"][64].any()
    with pytest.raises(CacheCorruptError, match="c.1.0.0"):
        StoreReader(path).tokens([64], 5)
    assert [finding.message for finding in verify(cache)[0]] == ["is missing."]


def test_the_fill_value_as_data(cache):
    """A row with one token of scale 0, its checksums right, is damaged."""
    path, store = cache.view(0).store_path("klt"), of(cache)
    reader, rows = StoreReader(path), store.spec.rows_of(3)
    arrays = {array: reader.read(array, rows) for array in store.spec.array_names}
    arrays["tokens/06"][2, 7] = 0
    shutil.rmtree(path)
    shutil.copytree(cache.view(1).store_path("klt"), path)  # of other crops: only its values are looked at here
    begun = Store.open(path)
    (path / "complete.json").unlink()
    (path / "commits").mkdir()
    with ShardWriter(begun, 3) as out:
        out.append(arrays)
    from teacher_cache.checking.shard_check import ArrayCheck

    fault = ArrayCheck(begun, "tokens/06").fault(3, begun.read_commits().files[3][2])
    assert fault == "row 194: holds the fill value 0 for the scale of a token."


def test_mended(cache):
    """What verify rejects is made again, to the byte."""
    path = cache.view(0).store_path("klt")
    before = contents(path)
    shard = shard_of(path, "tokens/04", 2)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert len(list(repair_store(cache.view(0), "klt"))) == 1
    assert extract_view(cache.view(0), "klt", FakeTeacher(), PLAN) and contents(path) == before


def test_taught_again(made):
    """Rows that the teacher gives again agree within what storing does to them; another teacher's do not."""
    view, path, rows = made.view(0), made.view(0).store_path("klt"), np.arange(0, N, 7)
    assert list(reteach(view, path, FakeTeacher(), rows)) == []
    other = FakeTeacher()
    other.blocks = other.blocks.clone()
    other.blocks[4] = other.blocks[4].roll(1, 1)
    findings = list(reteach(view, path, _with_the_probe_of(other), rows))
    assert findings and {finding.path.rsplit("/", 1)[1] for finding in findings} == {"05"}


def _with_the_probe_of(teacher):
    """A teacher that answers to the probe as the real one does, and only then."""
    real, call = FakeTeacher(), teacher.__class__.__call__

    class Changed(FakeTeacher):
        def __call__(self, images, layers):
            return real(images, layers) if len(images) == 1 else call(teacher, images, layers)

    return Changed()


def rewrite(path, name: str, change) -> None:
    """Change the values of a small array, with its checksums right in chunk and store.json."""
    from teacher_cache.files.durable import crc32c

    chunk = next((path / name).glob("c.*"))
    values = np.frombuffer(chunk.read_bytes()[:-4], "<f4").copy()
    change(values)
    chunk.write_bytes(values.tobytes() + crc32c(values.tobytes()).to_bytes(4, "little"))
    files = read_sealed(path / "store.json")["files"]
    files[f"{name}/{chunk.name}"] = sha256_file(chunk)
    (path / "store.json").write_bytes(seal({"files": files}))


@pytest.mark.parametrize("way", ["a bit", "with its checksums"])
def test_a_damaged_basis(cache, way):
    """It is noticed before anything is read with it, and verify names it."""
    path = cache.view(0).store_path("klt")
    if way == "a bit":
        flip_bit(path / "quant/05/basis/c.0.0", 1000)
        expected = "quant/05/basis/c.0.0: not the file this store was begun with"
    else:
        rewrite(path, "quant/05/bits", lambda bits: bits.__setitem__(0, 2.5))
        expected = "bits of layer 5 are not whole numbers"
    with pytest.raises(CacheCorruptError, match=expected):
        StoreReader(path).tokens([0], 6)
    assert any("quant" in finding.path for finding in verify(cache)[0])


def test_manifests():
    """Only version 5 knows of a transform, and knows nothing else; none is wider than a transform can be."""
    spec = fitted()[0]
    manifest = Manifest(TEACHER, StoreSpec(7, 3, (1, 3), "int8", 4, False, (("tokens/01", "none"), ("tokens/03", "none"),
                        ("scale", "none"))), 0, "c" * 64, "d" * 64, "fp32", (), "e" * 64, {}, MADE)  # fmt: skip
    klt = replace(manifest, teacher=FakeTeacher().spec, store=spec, format_version=5)
    told = json.dumps({"attributes": {"teacher_cache": klt.to_json()}}).encode()
    assert manifest_of(told, "x") == klt
    for wrong in ({"format_version": 4}, {"source": {"name": "a"}}):
        with pytest.raises(ValueError, match="format version 4 of a store of dtype klt:3.2|source must give"):
            replace(klt, **wrong)
    with pytest.raises(ValueError, match="format version 5 of a store of dtype int8"):
        replace(manifest, format_version=5)
    with pytest.raises(UsageError, match="at most 5120 are allowed"):
        replace(spec, group=300).require_fit(replace(FakeTeacher().spec, dim=2048))


# --- recode


def test_recoded(cache, made):
    """From int8, in every view: as near to it as is recorded, its identity on record, sound, and never made twice."""
    code, output = said("recode", cache.path, "--store", "int8", "--dtype", "klt:4", "--name", "small")
    assert code == 0 and "layer 6:" in output and "off the source" in output
    assert verify(cache)[0] == []
    source, store = of(cache, "int8"), of(cache, "small")
    assert store.manifest.source == {"name": "int8", "dtype": "int8", "sha256": source.sha256}
    assert store.shared_sha256 == of(cache, "small", 1).shared_sha256
    for view in (0, 1):
        old, new = (StoreReader(cache.view(view).store_path(name)) for name in ("int8", "small"))
        assert np.array_equal(old.read("attention", [3, 199]), new.read("attention", [3, 199]))
        for layer in (4, 5, 6):
            true, read = old.tokens(range(N), layer), new.tokens(range(N), layer)
            median = np.median(np.linalg.norm(read - true, axis=-1) / np.linalg.norm(true, axis=-1))
            assert median == pytest.approx(next(f for f in store.manifest.fidelity if f.layer == layer).median, rel=0.5)
    before = contents(cache.path)
    code, output = said("recode", cache.path, "--store", "int8", "--dtype", "klt:4", "--name", "small")
    assert code == 0 and "Nothing to do" in output and contents(cache.path) == before
    code, output = said("inspect", cache.path)
    assert "block 4 with the codes of 6, 5" in output and "made from  the store int8, int8" in output and "6 CLS" in output


def test_claims_of_the_dead_go_away(cache):
    """What a recoding left that was killed when it had completed a store goes away when the command is run again."""
    recode(cache, "int8", "klt:4", "small")
    before, store = contents(cache.path), cache.view(1).store_path("small")
    store_claim(store).touch()
    store_claims(store).mkdir()
    (store_claims(store) / "000000-000004.claim").touch()
    code, output = said("recode", cache.path, "--store", "int8", "--dtype", "klt:4", "--name", "small")
    assert code == 0 and "Nothing to do" in output and contents(cache.path) == before and not store_claims(store).exists()


def test_a_store_that_goes_away_meanwhile(cache, monkeypatch):
    """It is said what went away, and what to do."""
    path = cache.view(0).store_path("new")
    write_commit = Store.write_commit

    def write_and_lose(store, *arguments):
        write_commit(store, *arguments)
        shutil.rmtree(path)

    monkeypatch.setattr(Store, "write_commit", write_and_lose)
    with pytest.raises(NotInCacheError, match="new.zarr was deleted or moved while"):
        recode(cache, "int8", "klt:4", "new")


def test_recoding_goes_on(cache, monkeypatch):
    """Killed in view 1, the same command goes on, to the same bytes; damage is mended by the command that verify gives."""
    recode(cache, "int8", "klt:4", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_commit", failing_at(Store.write_commit, 6, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            recode(cache, "int8", "klt:4", "parts")
    with pytest.raises(MismatchError, match="made from: the store int8, by recode in the store, the teacher given"):
        extract_view(cache.view(1), "parts", FakeTeacher(), PLAN)
    assert extract_command(cache.path, "parts", of(cache, "parts").manifest).startswith("teacher-cache recode --store int8")
    assert recode(cache, "int8", "klt:4", "parts") and not recode(cache, "int8", "klt:4", "parts")
    for view in (0, 1):
        mine, whole = (contents(cache.view(view).store_path(name)) for name in ("parts", "whole"))
        assert mine == whole
    shard_of(cache.view(1).store_path("parts"), "tokens/05", 0).unlink()
    code, output = said("verify", cache.path)
    assert code == 1 and "teacher-cache recode --repair --store int8 --dtype klt:4 --name parts" in output
    code, _ = said("recode", "--repair", "--store", "int8", "--dtype", "klt:4", "--name", "parts", cache.path)
    assert code == 0 and contents(cache.view(1).store_path("parts")) == contents(cache.view(1).store_path("whole"))


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (("klt", "klt:3", "new"), UsageError, "klt:4 already"), (("int8", "int4", "new"), UsageError, "recode makes klt:BITS"),
    (("int8", "klt:3", "int8"), UsageError, "that is the store itself"),
    (("none", "klt:3", "new"), NotInCacheError, "has no store none"),
    (("int8", "klt:3", "klt"), MismatchError, "klt:4 from the teacher"), (("int8", "klt:3", ".x"), UsageError, "give letters"),
])  # fmt: skip
def test_what_cannot_be_recoded(cache, arguments, error, words):
    """A sentence each, and nothing is written."""
    before = contents(cache.path)
    with pytest.raises(error, match=words):
        recode(cache, *arguments)
    assert contents(cache.path) == before


def test_a_source_that_is_not_complete(cache, monkeypatch):
    """It is to be finished first; one that is damaged is named, and nothing of it becomes a code."""
    shard = shard_of(cache.view(0).store_path("int8"), "tokens/05", 0)
    data = bytearray(shard.read_bytes())
    data[64 + 1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheCorruptError, match="row 0 is damaged"):
        recode(cache, "int8", "klt:4", "new")
    assert "new" not in cache.view(0).store_names()
    monkeypatch.setattr(recoding.StoreReader, "is_complete", property(lambda self: False))
    with pytest.raises(NotInCacheError, match="is not complete. Finish it: teacher-cache extract"):
        recode(cache, "int8", "klt:4", "new")


def test_written_again(made, tmp_path):
    """A store is written again, to the byte, from what a reader has of it."""
    write_again(made.view(0).store_path("klt"), tmp_path / "klt.zarr")
    assert contents(tmp_path / "klt.zarr") == contents(made.view(0).store_path("klt"))
