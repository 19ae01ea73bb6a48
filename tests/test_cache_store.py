"""Stores as they are written: whole at every moment, foldable and unfoldable, and no damaged record is ever believed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import contents, failing_at, flip_bit, kills
from store_fakes import MADE, TEACHER, begin, fill, make_store, same, shard_of, spec_of, values_of

from teacher_cache.errors import BadInputError, CacheCorruptError, NotInCacheError, UsageError
from teacher_cache.files.durable import read_sealed, seal, sha256_file
from teacher_cache.format.shards import HEADER_BYTES, header, require_header
from teacher_cache.store import spare, writer
from teacher_cache.store import store as store_module
from teacher_cache.store.folding import fold, is_folded, unfold
from teacher_cache.store.manifest import Manifest, extract_command
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.sizes import store_bytes
from teacher_cache.store.spare import is_current
from teacher_cache.store.store import Store, is_complete
from teacher_cache.store.writer import ShardWriter, missing_bytes


@pytest.fixture
def finished(tmp_path) -> Path:
    """A finished store, uncompressed, that a test may damage."""
    make_store(tmp_path / "t.zarr", spec_of())
    return tmp_path / "t.zarr"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_batches_do_not_matter(tmp_path):
    """Rows appended one by one or all at once make the same files, and a second store the same again."""
    spec = spec_of(codec="zstd")
    for batch in (1, 3):
        begin(tmp_path / f"{batch}.zarr", spec)
        fill(tmp_path / f"{batch}.zarr", spec, values_of(spec), batch=batch)
        fold(Store.open(tmp_path / f"{batch}.zarr"))
    assert contents(tmp_path / "1.zarr") == contents(tmp_path / "3.zarr")


def test_order_of_shards_does_not_matter(tmp_path):
    """Shards written in any order, some of them twice, make the same store."""
    spec = spec_of()
    for name, shards in (("a", (0, 1, 2)), ("b", (2, 0, 2, 1))):
        begin(tmp_path / name, spec)
        fill(tmp_path / name, spec, values_of(spec), shards)
        fold(Store.open(tmp_path / name))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_failed_shard_leaves_no_trace(tmp_path):
    """A shard that fails, or gets too few rows or rows of another shape, is not committed and leaves no file aside."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    before, arrays = contents(path), values_of(spec)
    with pytest.raises(KeyboardInterrupt), ShardWriter(Store.open(path), 0) as out:
        out.append({name: values[:2] for name, values in arrays.items()})
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="shard 0 of tokens/01 has 2 of 3 rows"), ShardWriter(Store.open(path), 0) as out:
        out.append({name: values[:2] for name, values in arrays.items()})
    with pytest.raises(UsageError, match="tokens/01: rows must be int8"), ShardWriter(Store.open(path), 0) as out:
        out.append({name: values[:3].astype("float64") for name, values in arrays.items()})
    assert contents(path) == before


def test_a_disk_that_is_full_at_the_start(tmp_path, monkeypatch):
    """If a shard's second file cannot even be made, the first does not stay aside."""
    path = tmp_path / "t.zarr"
    begin(path, spec_of())
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(writer, "create_aside", failing_at(writer.create_aside, 2, full))
    with pytest.raises(OSError, match="No space left"):
        ShardWriter(Store.open(path), 0)
    assert not list(path.rglob("*.partial"))


@pytest.mark.parametrize("call", range(1, 6))
def test_a_disk_that_fills_up_at_the_end(tmp_path, monkeypatch, call):
    """If a shard cannot be made durable, whichever of its files it is, nothing is committed and nothing stays aside."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    monkeypatch.setattr(writer.os, "fsync", failing_at(writer.os.fsync, call, OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fill(path, spec, values_of(spec), [1])
    assert not list(path.rglob("*.partial")) and Store.open(path).missing_shards() == [0, 1, 2]


def test_fold_needs_every_shard(tmp_path):
    """A store with a missing shard is not declared complete."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    fill(path, spec, values_of(spec), [0, 2])
    with pytest.raises(CacheCorruptError, match="1 of 3 shards are not finished"):
        fold(Store.open(path))
    assert not is_complete(path) and Store.open(path).n_finished() == 2


def test_creating_is_all_or_nothing(tmp_path):
    """A store whose creation is killed anywhere is not there or whole, and can be created again."""
    path, spec = tmp_path / "t.zarr", spec_of()
    begin(tmp_path / "whole.zarr", spec)
    whole = contents(tmp_path / "whole.zarr")
    for _ in kills(lambda: begin(path, spec), every=13):
        assert not path.exists() or contents(path) == whole
        shutil.rmtree(path, ignore_errors=True)
    assert contents(path) == whole and not list(tmp_path.glob("*.partial"))


def test_a_store_is_not_begun_where_one_lost_its_declaration(finished):
    """A store folder without store.json is neither "no store" nor a place for a new one."""
    (finished / "store.json").unlink()
    for ask in (Store.open, lambda path: writer.missing_bytes(path, spec_of(), TEACHER)):
        with pytest.raises(CacheCorruptError, match=r"t.zarr has lost its store.json. .*--repair"):
            ask(finished)


def test_a_planted_symlink_is_not_written_through(tmp_path):
    """A symlink under the name that a writer uses aside is replaced; what it leads to is not touched."""
    spec, path, precious = spec_of(), tmp_path / "t.zarr", tmp_path / "precious"
    begin(path, spec)
    precious.write_text("mine")
    for name in ("tokens/01/c.0.0.0.partial", "commits/000000.json.partial", "shards.npy.partial", "spare.tar.partial"):
        (path / name).symlink_to(precious)
    fill(path, spec, values_of(spec))
    fold(Store.open(path))
    assert precious.read_text() == "mine" and not list(path.rglob("*.partial"))


# --- headers ---------------------------------------------------------------------------------------------------------


def test_every_shard_file_says_what_it_is(finished):
    """Every shard begins with the 64 bytes that name its store, array and number, and its rows follow."""
    spec, store_sha256 = spec_of(), sha256_file(finished / "zarr.json")
    assert Store.open(finished).sha256 == store_sha256
    for column, array in enumerate(spec.array_names):
        for shard in range(3):
            data = shard_of(finished, array, shard).read_bytes()
            assert data[:HEADER_BYTES] == header(store_sha256, column, shard)
            index = np.frombuffer(data[-16 * 3 - 4 : -4], "<u8").reshape(3, 2)
            assert index[0].tolist() == [64, spec.row_bytes(array, TEACHER) + 4]
            require_header(shard_of(finished, array, shard), data[:64], header(store_sha256, column, shard))


def test_swapped_shards_have_other_headers(finished):
    """A file in the place of another, of another array or store, and a flipped bit in a header are told apart."""
    path, sha256 = shard_of(finished, "tokens/01", 1), Store.open(finished).sha256
    here = header(sha256, 0, 1)
    cases = {
        r"is shard 2 of array 0, in the place of shard 1 of array 0\.": header(sha256, 0, 2),
        r"is shard 1 of array 3, in the place of shard 1 of array 0\.": header(sha256, 3, 1),
        r"is a shard of another store\.": header("0" * 64, 0, 1),
        r"its header is damaged\.": here[:-1],
    }  # fmt: skip
    for reason, found in cases.items():
        with pytest.raises(CacheCorruptError, match=rf"tokens/01/c\.1\.0\.0: {reason} Run teacher-cache verify"):
            require_header(path, found, here)
    for bit in range(8 * HEADER_BYTES):
        flipped = bytearray(here)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorruptError, match="its header is damaged"):
            require_header(path, bytes(flipped), here)


def test_bytes_are_estimated_with_headers(finished):
    """The estimate of a store without compression is what its shard files have, to the byte."""
    files, _ = Store.open(finished).read_commits()
    assert store_bytes(spec_of(), TEACHER) == files["bytes"].sum() == sum(
        path.stat().st_size for array in spec_of().array_names for path in (finished / array).glob("c.*")
    )  # fmt: skip
    begin(finished.with_name("new.zarr"), spec_of())
    assert missing_bytes(finished.with_name("new.zarr"), spec_of(), TEACHER, range(1, 9)) == files["bytes"][1:].sum()
    assert missing_bytes(finished.with_name("none.zarr"), spec_of(), TEACHER, range(1, 9)) == files["bytes"][1:].sum()


# --- folding and unfolding -------------------------------------------------------------------------------------------


def restore(path: Path, original: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)


def test_killed_while_folding(tmp_path):
    """Killed anywhere in the last step, every row can be read, and folding again gives the same store."""
    spec, path, filled = spec_of(), tmp_path / "t.zarr", tmp_path / "filled.zarr"
    arrays = make_store(tmp_path / "whole.zarr", spec)
    begin(filled, spec)
    fill(filled, spec, arrays)
    restore(path, filled)
    n_deaths = 0
    for _ in kills(lambda: fold(Store.open(path))):
        n_deaths += 1
        assert not is_folded(path) and same(StoreReader(path).read("scale", range(7)), arrays["scale"])
        fold(Store.open(path))
        assert contents(path) == contents(tmp_path / "whole.zarr") and is_folded(path)
        restore(path, filled)
    assert contents(path) == contents(tmp_path / "whole.zarr") and n_deaths > 12


def test_folding_mends_the_spare_of_sound_files_only(finished):
    """A finished store whose spare is gone gets it again, but a damaged small file never replaces its sound copy."""
    original = (finished / "spare.tar").read_bytes()
    (finished / "spare.tar").unlink()
    assert not is_folded(finished)
    fold(Store.open(finished))
    assert (finished / "spare.tar").read_bytes() == original and is_folded(finished)
    flip_bit(finished / "head/gamma/c.0", 9)
    with pytest.raises(CacheCorruptError, match="head/gamma/c.0: its SHA-256 is not the recorded one. .*--repair"):
        fold(Store.open(finished))
    assert (finished / "spare.tar").read_bytes() == original


SOUND = np.array([True, False, True])


def test_unfolding(finished):
    """A finished store goes back to records of its sound shards; making the others again gives the same store."""
    spec, before = spec_of(), contents(finished)
    unfold(Store.open(finished), np.ones(3, bool))
    assert contents(finished) == before  # sound altogether
    unfold(Store.open(finished), SOUND)
    assert not is_complete(finished) and Store.open(finished).missing_shards() == [1] and is_current(finished)
    assert not {"complete.json", "shards.npy"} & set(spare.read_spare(finished))
    unfold(Store.open(finished), SOUND)
    assert Store.open(finished).missing_shards() == [1]
    fill(finished, spec, values_of(spec), [1])
    fold(Store.open(finished))
    assert contents(finished) == before


def test_unfolding_an_unfinished_store(tmp_path):
    """Of an unfinished store the records of unsound shards go, and those that are damaged, misnamed or foreign."""
    spec, path = spec_of(13), tmp_path / "t.zarr"
    make_store(tmp_path / "whole.zarr", spec)
    begin(path, spec)
    fill(path, spec, values_of(spec), [0, 1, 3, 4])
    flip_bit(path / "commits/000003.json", 30)
    shutil.copy(path / "commits/000000.json", path / "commits/000002.json")
    (path / "commits/notes.json").write_text("{}")
    unfold(Store.open(path), np.array([True, False, False, True, True]))
    assert Store.open(path).missing_shards() == [1, 2, 3] and Store.open(path).n_finished() == 2
    fill(path, spec, values_of(spec), [1, 2, 3])
    fold(Store.open(path))
    assert contents(path) == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("leftover", [False, True], ids=["", "with records that a fold had left"])
def test_killed_while_unfolding(tmp_path, leftover):
    """Killed anywhere, the store is complete as before or unfinished as asked for, and unfolding again does the rest."""
    spec, path, whole = spec_of(), tmp_path / "t.zarr", tmp_path / "whole.zarr"
    arrays = make_store(whole, spec)
    before = contents(whole)
    if leftover:
        shutil.copytree(whole, tmp_path / "killed.zarr")
        whole = tmp_path / "killed.zarr"
        (whole / "commits").mkdir()
        files, _ = Store.open(whole).read_commits()
        Store.open(whole).write_commit(1, files[1])
    restore(path, whole)
    n_deaths = n_complete = 0
    for _ in kills(lambda: unfold(Store.open(path), SOUND)):
        n_deaths, n_complete = n_deaths + 1, n_complete + is_complete(path)
        assert Store.open(path).missing_shards() == ([] if is_complete(path) else [1])
        assert is_complete(path) or "complete.json" not in spare.read_spare(path)
        unfold(Store.open(path), SOUND)
        assert Store.open(path).missing_shards() == [1]
        fill(path, spec, arrays, [1])
        fold(Store.open(path))
        assert contents(path) == before
        restore(path, whole)
    assert Store.open(path).missing_shards() == [1] and 8 < n_complete < n_deaths


def test_commits_are_read_once_and_on_request(tmp_path):
    """A store that was opened keeps the commits it read first, until somebody asks for those of now."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    store = Store.open(path)
    assert store.commits.finished.tolist() == [False] * 3
    fill(path, spec, values_of(spec), [1])
    assert not store.commits.finished.any() and store.n_finished() == 1
    assert store.missing_shards() == [0, 2] and store.commits.finished.tolist() == [False, True, False]


def replace_store(path: Path) -> None:
    shutil.rmtree(path)
    begin(path, spec_of(), view=1)


LOSSES = {
    "is deleted": (shutil.rmtree, NotInCacheError, "no such store"),
    "loses its store.json": (lambda path: (path / "store.json").unlink(), CacheCorruptError, "has lost its store.json"),
    "is damaged": (lambda path: flip_bit(path / "zarr.json", 999), CacheCorruptError, "zarr.json: not the file this store was"),
    "is replaced": (replace_store, CacheCorruptError, "another store has taken its place"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_what_happens_to_an_open_store_is_noticed(tmp_path, what):
    """No shard is declared finished, and no store complete, that is not the one that was opened."""
    happens, error, match = LOSSES[what]
    path, spec = tmp_path / "t.zarr", spec_of()
    begin(path, spec)
    fill(path, spec, values_of(spec))
    store = Store.open(path)
    files, _ = store.read_commits()
    happens(path)
    left = contents(path) if path.exists() else None
    for act in (lambda: store.write_commit(0, files[0]), lambda: fold(store)):
        with pytest.raises(error, match=match):
            act()
    assert left == (contents(path) if path.exists() else None)


@pytest.mark.parametrize("ask", [Store.read_commits, Store.n_finished])
@pytest.mark.parametrize("moment", ["is_complete", "records", "read_record"])
def test_folded_by_another_process_meanwhile(tmp_path, monkeypatch, ask, moment):
    """Whoever looks at a store while another process folds it sees a complete store."""
    spec, path, owner = spec_of(), tmp_path / "t.zarr", Store if moment == "records" else store_module
    original = getattr(owner, moment)
    arrays = make_store(tmp_path / "whole.zarr", spec)
    begin(path, spec)
    fill(path, spec, arrays)

    def folded_behind(*arguments):
        answer = original(*arguments) if moment != "read_record" else None
        monkeypatch.setattr(owner, moment, original)
        fold(Store.open(path))
        return original(*arguments) if moment == "read_record" else answer

    store = Store.open(path)
    monkeypatch.setattr(owner, moment, folded_behind)
    found, expected = ask(store), ask(Store.open(tmp_path / "whole.zarr"))
    assert found == expected if ask is Store.n_finished else all(map(np.array_equal, found, expected))


def test_neither_complete_nor_begun(finished):
    """A store that has lost complete.json says so, instead of asking for all of its shards again."""
    (finished / "complete.json").unlink()
    for ask in (Store.read_commits, Store.n_finished, Store.missing_shards, fold):
        with pytest.raises(CacheCorruptError, match="has lost the list of its shards. .* --repair"):
            ask(Store.open(finished))


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["complete.json", "shards.npy", "store.json", "zarr.json"])
def test_damaged_records_of_a_finished_store(finished, name):
    """A flipped bit anywhere in a record of a store, or an empty one, is refused when the store is opened, naming it."""
    path = finished
    data = (path / name).read_bytes()
    for bit in range(0, 8 * len(data), max(1, len(data) // 40) * 3):
        flip_bit(path / name, bit)
        with pytest.raises(CacheCorruptError, match=name.replace(".", r"\.")):
            StoreReader(path)
        (path / name).write_bytes(data)
    (path / name).write_bytes(b"")
    with pytest.raises(CacheCorruptError):
        StoreReader(path)


@pytest.mark.parametrize("name", ["shards.npy", "zarr.json", "quant/01/spread/c.0", "head/beta/zarr.json"])
def test_missing_records(finished, name):
    """A missing record is named when what it holds is needed."""
    path = finished
    (path / name).unlink()
    with pytest.raises(CacheCorruptError, match=name):
        reader = StoreReader(path)
        assert reader.statistics and reader.head


@pytest.mark.parametrize("name", ["quant/03/centre", "head/projection", "probe"])
def test_damaged_small_arrays(finished, name):
    """A flipped bit in values or shape of a small array is found before it is used."""
    path = finished
    for file in (path / name).iterdir():
        for bit in range(0, 8 * file.stat().st_size, 97):
            flip_bit(file, bit)
            with pytest.raises(CacheCorruptError, match=f"{name}.*not the file this store was begun with"):
                Store.open(path).small_array(name)
            flip_bit(file, bit)


def test_damaged_commit_records(tmp_path):
    """Of an unfinished store, a commit record that is damaged, foreign, misnamed or from a smaller store is refused."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    fill(path, spec, values_of(spec), [0, 1])
    record = path / "commits" / "000001.json"
    data = record.read_bytes()
    for bit in range(0, 8 * len(data), 7):
        flip_bit(record, bit)
        with pytest.raises(CacheCorruptError, match="commits/000001.json"):
            StoreReader(path)
        record.write_bytes(data)
    for other in ((path / "store.json").read_bytes(), (path / "commits" / "000000.json").read_bytes()):
        record.write_bytes(other)
        with pytest.raises(CacheCorruptError, match="000001.json: not a commit record of this store"):
            StoreReader(path)
    record.rename(path / "commits" / "000007.json")
    with pytest.raises(CacheCorruptError, match="000007.json: not a commit record"):
        StoreReader(path)


def test_other_format_version(finished):
    """A store of a later format says so instead of being misread."""
    path = finished
    (path / "zarr.json").write_text((path / "zarr.json").read_text().replace('"format_version": 4', '"format_version": 6'))
    files = {**read_sealed(path / "store.json")["files"], "zarr.json": sha256_file(path / "zarr.json")}
    (path / "store.json").write_bytes(seal({"files": files}))
    with pytest.raises(
        BadInputError, match="t.zarr: a store of format version 6; this program reads versions 1, 2, 3, 4, 5. Use the version"
    ):
        StoreReader(path)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("built-in", "teacher-cache extract --teacher t C"),
        ("timm pretrained: t", "teacher-cache extract --teacher t C"),
        ("open_clip pretrained: t/laion2b", "teacher-cache extract --teacher t C"),
        ("random:0", "teacher-cache extract --teacher t --weights random:0 C"),
        ("ViT-B-16.pt", "teacher-cache extract --teacher t --weights PATH/OF/ViT-B-16.pt C"),
        ("my vit.pth#model_ema", "teacher-cache extract --teacher t --weights 'PATH/OF/my vit.pth#model_ema' C"),
    ],
)
def test_command_asks_for_weights_that_do_not_come_by_themselves(weights, expected):
    manifest = Manifest(replace(TEACHER, weights=weights), spec_of(), 0, "c" * 64, "d" * 64, "fp32", (), "e" * 64, {}, MADE)
    assert extract_command(Path("C"), "t", manifest) == expected
    assert extract_command(Path("C"), "other", manifest) == expected.replace(" C", " --name other C")
