"""verify: silent about a sound cache, and no file of it can be changed, lost, swapped or added without being found."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import zlib

import numpy as np
import pytest
import store_fakes
from cache_fakes import contents, crop_folder, failing_at, flip_bit
from click.testing import CliRunner
from rich.console import Console

from teacher_cache.cache import Cache
from teacher_cache.checking.advice import mending_commands
from teacher_cache.checking.shard_check import ArrayCheck
from teacher_cache.checking.verify import verify, verify_folder
from teacher_cache.cli.main import main
from teacher_cache.cli.verify import findings_table
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import UsageError
from teacher_cache.extraction import parts
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.files.durable import crc32c, seal
from teacher_cache.format.shards import HEADER_BYTES, index_bytes
from teacher_cache.store.spare import write_spare
from teacher_cache.store.store import Store
from teacher_cache.words import human


@pytest.fixture(scope="module")
def small(image_folder, teacher, tmp_path_factory) -> Cache:
    """One view, one compressed int8 store of one layer, an image left out: every kind of file."""
    folder = shutil.copytree(image_folder, tmp_path_factory.mktemp("small") / "images")
    next(folder.glob("*/*.png")).write_bytes(b"")
    cache = crop_folder(folder.parent / "c", folder, skip_bad=True)
    extract_view(cache.view(0), "fake", teacher, ExtractPlan("last", shard_rows=8))
    store_fakes.compress(cache.view(0).store_path("fake"))
    return cache


def findings(path) -> list[str]:
    """What verify says of the cache at `path`, as `kind path: message`."""
    found, _ = verify_folder(path)
    return [f"{finding.kind} {finding.path}: {finding.message}" for finding in found]


@pytest.fixture
def whole(small):
    """The small cache's path; afterwards it must be as it was."""
    before = contents(small.path)
    yield small.path
    assert contents(small.path) == before


def files_of(path):
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def test_sound(small, shared_cache):
    """A sound and complete cache gives no findings, and every one of its files was checked."""
    for cache in (small, shared_cache):
        found, checked = verify(cache)
        assert found == [] and checked.n_files == len(contents(cache.path))


@pytest.mark.parametrize("seed", range(2))
def test_one_flipped_bit_in_any_file_is_found(whole, seed):
    """One flipped bit anywhere in any file of a cache is found, and the finding names the file or what it belongs to."""
    draw = random.Random(seed)
    for file in files_of(whole):
        bit = draw.randrange(8 * file.stat().st_size)
        flip_bit(file, bit)
        found = findings(whole)
        flip_bit(file, bit)
        assert any(file.name in finding for finding in found), (file, bit, found)
        assert not any(finding.startswith("unknown") for finding in found), (file, bit, found)


def test_any_bit_of_the_beton_is_found(whole):
    """No bit of crops.beton is unguarded: header, field table, samples, padding, crops or allocation table."""
    file = whole / "view-000" / "crops.beton"
    n_bits = 8 * file.stat().st_size
    for bit in [*range(0, 256, 17), *range(256, n_bits, n_bits // 30)]:
        flip_bit(file, bit)
        assert any("crops.beton" in finding for finding in findings(whole)), bit
        flip_bit(file, bit)


DAMAGE = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut": lambda data: data[:-1],
    "grown": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found(whole, damage):
    """Any file of a cache that is deleted, emptied, cut, grown or zeroed is found."""
    for file in files_of(whole):
        data = file.read_bytes()
        changed = DAMAGE[damage](data)
        file.unlink()
        if changed is not None:
            file.write_bytes(changed)
        found = findings(whole)
        file.write_bytes(data)
        assert any(finding.startswith(f"damaged {file}: ") for finding in found), (file, found)
        assert not any(finding.startswith("unknown") for finding in found), (file, found)


@pytest.mark.parametrize("path", ["view-000/fake.zarr/tokens/06", "view-000/fake.zarr/attention"])
def test_swapped_shards_are_found(whole, path):
    """Two shards that changed places are found, although each is sound in itself."""
    first, second = sorted((whole / path).glob("c.*"))[:2]
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1]), second.write_bytes(data[0])
    found = findings(whole)
    first.write_bytes(data[0]), second.write_bytes(data[1])
    assert len(found) == 2 and all(finding.startswith("damaged") for finding in found)


def test_swapped_views_are_found(cache):
    """Views, their crops or their stores that changed places are found."""
    first, second = (view.path for view in cache.views())
    for name in ("", "crops.beton", "crops.npy", "fake.zarr"):
        a, b, aside = first / name, second / name, cache.path.with_name("aside")
        for swap in range(2):
            a.rename(aside), b.rename(a), aside.rename(b)
            assert bool(findings(cache.path)) == (swap == 0), name


def test_every_damage_is_reported(cache):
    """One damaged file does not hide another: each is named, in one run."""
    damaged = [
        "images.txt", "view-000/crops.npy", "view-001/crops.beton", "view-000/fake.zarr/store.json",
        "view-001/fake.zarr/tokens/03/c.1.0.0", "view-001/fake.zarr/scale/c.0.0.0.0", "view-000/fake16.zarr/quant",
        "view-001/fake-zstd.zarr/quant/04/spread/c.0",
    ]  # fmt: skip
    for name in damaged:
        if name.endswith("quant"):
            (cache.path / name).mkdir()
            (cache.path / name / "left.txt").touch()
        else:
            flip_bit(cache.path / name, 5000)
    found = findings(cache.path)
    missing = [name for name in damaged if not any(str(cache.path / name) in finding for finding in found)]
    assert missing == [], found


STRAY = ["notes.txt", "view-7x/a", "view-0/a", "view-000/core.123", "view-000/fake.zarr/tokens/06/c.9.0.0"]


@pytest.mark.parametrize("name", STRAY)
def test_files_that_do_not_belong_are_found(whole, name):
    """A file that this program did not write is reported as unknown."""
    file = whole / name
    is_new = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    found = findings(whole)
    file.unlink()
    if is_new:
        file.parent.rmdir()
    assert found == [f"unknown {file}: belongs to nothing in this cache. Remove it."]


LEFT = {
    "view-000/fake.zarr.claim": "a writer was killed",
    "view-000/fake.zarr.claims/000000-000003.claim": "a writer was killed",
    "crops.claim": "a writer was killed",
    "images.txt.partial": "left by an interrupted writer",
    "view-000/fake.zarr/spare.tar.partial": "left by an interrupted writer",
    "view-000/fake.zarr/tokens/06/c.1.0.0.partial": "left by an interrupted writer",
    "view-000/new.zarr.partial/zarr.json": "left by an interrupted writer",
    "view-001.partial/crops.npy": "left by an interrupted writer",
    "crops.partial/job.json": "a crop stage was begun and not finished",
    "view-000/fake.zarr/commits/000000.json": "was left when the store was being completed",
}


@pytest.mark.parametrize("name", LEFT)
def test_leftovers_are_found(whole, name):
    """What an interrupted writer left aside is reported as unfinished, once."""
    file = whole / name
    is_new = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    found = findings(whole)
    file.unlink()
    if is_new:
        file.parent.rmdir()
    assert len(found) == 1 and found[0].startswith("unfinished") and LEFT[name] in found[0]


def test_unfinished_store(image_folder, tmp_path, teacher, monkeypatch):
    """A half-made store is unfinished, not damaged, and says how much is done; damage in its finished part is still found."""
    cache = crop_folder(tmp_path / "c", image_folder)
    monkeypatch.setattr(Store, "write_commit", failing_at(Store.write_commit, 3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        extract_view(cache.view(0), "new", teacher, ExtractPlan("last", shard_rows=8))
    store = cache.view(0).store_path("new")
    (store / "tokens/06/c.2.0.0.partial").touch()  # a killed writer leaves the files of its shard
    assert findings(cache.path) == [
        f"unfinished {store}: 2 of 3 shards are finished. Run the same teacher-cache extract command again."
    ]
    for name in ("tokens/06/c.1.0.0", "commits/000001.json", "store.json", "zarr.json"):
        flip_bit(store / name, 800)
        found = findings(cache.path)
        flip_bit(store / name, 800)
        assert any(finding.startswith("damaged") and name in finding for finding in found)


def test_unfinished_crops(image_folder, tmp_path, monkeypatch):
    """A half-made view is unfinished; a cache without any view says so."""
    cache = crop_folder(tmp_path / "c", image_folder, 1)
    monkeypatch.setattr(parts.WorkFolder, "commit", failing_at(parts.WorkFolder.commit, 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        crop_folder(tmp_path / "c", image_folder, 2)
    assert findings(cache.path) == [
        f"unfinished {cache.path / 'crops.partial'}: a crop stage was begun and not finished. Run the same command again."
    ]
    shutil.rmtree(cache.path / "crops.partial")
    shutil.rmtree(cache.path / "view-000")
    assert findings(cache.path) == [f"unfinished {cache.path / 'view-000'}: the cache has no finished view."]


def test_a_view_or_a_whole_store_may_be_deleted(cache):
    """Views and stores are complete in themselves: without the last view, or a store in all views, the others are sound."""
    for view in cache.views():
        shutil.rmtree(view.store_path("fake16"))
    assert findings(cache.path) == []
    shutil.rmtree(cache.view(1).path)
    assert findings(cache.path) == []


def test_what_other_views_have_is_missed(cache, image_folder):
    """A store that only some views have, and a view before the last one, are unfinished, with the commands that make them."""
    shutil.rmtree(cache.view(0).store_path("fake16"))
    assert findings(cache.path) == [
        f"unfinished {cache.path}/view-000/fake16.zarr: view 0 has no store of fake16, but view 1 has one."
    ]
    shutil.rmtree(cache.view(0).path)
    found, _ = verify(cache)
    told = [finding.path.removeprefix(f"{cache.path}/view-000") for finding in found]
    assert told == ["", "/fake-zstd.zarr", "/fake.zarr", "/fake16.zarr"]
    assert found[0].message == "there is no view 0, but there is a view 1."
    fake = "teacher-cache extract --teacher fake --weights random:0"
    assert mending_commands(cache.path, found, str(image_folder)) == [
        f"teacher-cache crop --images {image_folder} --views 2 {cache.path}", f"{fake} --name fake-zstd {cache.path}",
        f"{fake} {cache.path}", f"{fake} --name fake16 {cache.path}",
    ]  # fmt: skip


def test_lost_checksums_are_not_blamed_on_the_stores(cache):
    """A view that has lost its checksums.json is damaged; its stores are not."""
    (cache.view(0).path / "checksums.json").unlink()
    assert not any("fake" in finding for finding in findings(cache.path))


def test_a_cache_can_be_copied(cache, tmp_path):
    """A cache is sound wherever it is copied to, under any name."""
    assert findings(shutil.copytree(cache.path, tmp_path / "wéird name; with 'quotes'\n")) == []


# --- values and indices whose checksums fit ----------------------------------------------------------------------------

VALUES = {
    "tokens/01 int8": (-128, "holds the fill value"),
    "tokens/01 float16": (np.nan, "holds numbers that are not finite"),
    "tokens/03 float16": (-np.inf, "holds numbers that are not finite"),
    "scale int8": (-0.5, "holds scales that are negative or not finite"),
    "attention int8": (1.5, "holds attention that sums to more than 1"),
    "attention float16": (-0.25, "holds attention that is negative or not finite"),
}


def shard_faults(store) -> dict[str, str]:
    """Array/shard -> what ArrayCheck says of it, where it says something."""
    opened = Store.open(store)
    checks = [ArrayCheck(opened, array) for array in opened.spec.array_names]
    files, n_shards = opened.commits.files, opened.spec.n_shards
    found = {f"{c.array}/{i}": c.fault(i, files[i, c.column]) for c in checks for i in range(n_shards)}
    return {place: wrong for place, wrong in found.items() if wrong}


@pytest.mark.parametrize("codec", store_fakes.CODECS)
@pytest.mark.parametrize("where", VALUES)
def test_values_that_are_never_written_are_found(tmp_path, where, codec):
    """Fill values, numbers that are not finite and impossible attention are found, although every checksum fits."""
    array, dtype = where.split()
    spec = store_fakes.spec_of(dtype=dtype, codec=codec)
    arrays = store_fakes.values_of(spec)
    for name in {"scale", "attention"} & arrays.keys():
        arrays[name] = np.abs(arrays[name]) / 1000
    store_fakes.begin(tmp_path / "s", spec)
    store_fakes.fill(tmp_path / "s", spec, arrays)
    assert shard_faults(tmp_path / "s") == {}
    value, told = VALUES[where]
    arrays[array][4].flat[2] = value
    store_fakes.fill(tmp_path / "s", spec, arrays)
    assert shard_faults(tmp_path / "s") == {
        f"{array}/1": f"row 4: {told}" + (" -128." if dtype == "int8" and value == -128 else ".")
    }


def recommitted(file, change, store, shard=0):
    """Rewrite a shard file as `change` (bytes -> bytes) has it, and its commit record with it."""
    data = change(file.read_bytes())
    file.write_bytes(data)
    record = store / "commits" / f"{shard:06d}.json"
    value = json.loads(record.read_bytes())
    value.pop("crc32c")
    column = Store.open(store).spec.array_names.index("attention")
    value["files"][column] = [len(data), zlib.crc32(data)]
    record.write_bytes(seal(value))


INDEX = {
    "overlap": lambda slots: slots.__setitem__((1, 0), slots[0, 0]),
    "exchanged": lambda slots: slots.__setitem__(slice(0, 2), slots[[1, 0]]),
    "outside": lambda slots: slots.__setitem__((2, 0), 1 << 40),
    "missing": lambda slots: slots.__setitem__(1, 0xFFFFFFFFFFFFFFFF),
    "short": lambda slots: slots.__setitem__((2, 1), 4),
    "wrapped": lambda slots: slots.__setitem__((2, 1), (1 << 64) - 1),
}


@pytest.mark.parametrize("wrong", INDEX)
def test_indices_that_contradict_the_manifest_are_found(tmp_path, wrong):
    """An index whose rows overlap, change places, lie outside or are missing is found, although every checksum fits."""
    spec = store_fakes.spec_of()
    store_fakes.begin(tmp_path / "s", spec)
    store_fakes.fill(tmp_path / "s", spec, store_fakes.values_of(spec))

    def change(data: bytes) -> bytes:
        tail = index_bytes(spec.shard_rows)
        slots = np.frombuffer(data[-tail:-4], "<u8").reshape(-1, 2).copy()
        INDEX[wrong](slots)
        return data[:-tail] + slots.tobytes() + crc32c(slots.tobytes()).to_bytes(4, "little")

    recommitted(store_fakes.shard_of(tmp_path / "s", "attention", 0), change, tmp_path / "s")
    told = "its index does not say that its rows lie back to back between header and index."
    assert shard_faults(tmp_path / "s")["attention/0"] == told


def test_what_only_the_commit_or_the_header_knows_is_found(tmp_path):
    """A shard with other sound rows than those committed, and one with the header of another, are found."""
    spec = store_fakes.spec_of()
    for name, seed in (("s", 0), ("other", 1)):
        store_fakes.begin(tmp_path / name, spec)
        arrays = store_fakes.values_of(spec, seed)
        arrays |= {array: np.abs(arrays[array]) / 1000 for array in ("scale", "attention")}
        store_fakes.fill(tmp_path / name, spec, arrays)
    file = store_fakes.shard_of(tmp_path / "s", "attention", 0)
    file.write_bytes(store_fakes.shard_of(tmp_path / "other", "attention", 0).read_bytes())
    assert shard_faults(tmp_path / "s") == {"attention/0": "its CRC-32 is not the committed one."}
    header = store_fakes.shard_of(tmp_path / "s", "attention", 1).read_bytes()[:HEADER_BYTES]
    recommitted(file, lambda data: header + data[HEADER_BYTES:], tmp_path / "s")
    assert shard_faults(tmp_path / "s")["attention/0"].startswith("is shard 1 of array 3, in the place of shard 0")


# --- small files that are sound each and contradict each other ---------------------------------------------------------


def resealed(store, name: str, change) -> None:
    """Change a small file of a store and everything that vouches for it, as a faulty writer would."""
    (store / name).write_bytes(change((store / name).read_bytes()))
    record = json.loads((store / "store.json").read_bytes())
    record.pop("crc32c")
    record["files"][name] = hashlib.sha256((store / name).read_bytes()).hexdigest()
    (store / "store.json").write_bytes(seal(record))
    write_spare(store)


def small_array(data: bytes, change) -> bytes:
    values = np.frombuffer(data[:-4], "<f4").copy()
    change(values)
    return values.tobytes() + crc32c(values.tobytes()).to_bytes(4, "little")


CONTRADICTIONS = {
    "tokens/06/zarr.json": (lambda data: data.replace(b'"int8"', b'"uint8"'), "does not describe what the manifest says"),
    "scale/zarr.json": (lambda data: b"no JSON", "does not describe what the manifest says"),
    "quant/zarr.json": (lambda data: data.replace(b'"group"', b'"array"'), "does not describe what the manifest says"),
    "quant/05/spread/c.0": (lambda data: small_array(data, lambda v: v.__setitem__(3, 0)), "spreads that are not positive"),
    "quant/05/centre/c.0": (lambda data: small_array(data, lambda v: v.__setitem__(3, np.inf)), "not finite"),
    "probe/c.0.0": (lambda data: small_array(data, lambda v: v.__setitem__(0, 0.5)), "not the one that the manifest names"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_found(cache, name):
    """Small files that do not fit the manifest are found, although every checksum fits."""
    store, (change, told) = cache.view(0).store_path("fake"), CONTRADICTIONS[name]
    resealed(store, name, change)
    assert any(finding.startswith("damaged") and told in finding for finding in findings(cache.path))


def test_another_quantiser_in_another_view_is_found(cache):
    """All views of a teacher share its quantiser: one that has another is found."""
    store = cache.view(1).store_path("fake")
    resealed(store, "quant/05/centre/c.0", lambda data: small_array(data, lambda v: v.__setitem__(3, 0.5)))
    first = cache.view(0).store_path("fake")
    assert findings(cache.path) == [f"damaged {store}/store.json: its quantiser, head or probe is not that of {first}."]


# --- what else verify looks at -----------------------------------------------------------------------------------------


def test_a_sample_checks_so_many_rows(whole):
    """With a sample, only the drawn rows are read, another draw each time; small files, sizes, headers and indices all are."""
    cache, store = Cache(whole), whole / "view-000/fake.zarr"
    flip_bit(store / "attention/c.1.0", 8 * (HEADER_BYTES + 10))  # row 8
    n_found = {seed: len(verify(cache, sample=6, seed=seed)[0]) for seed in range(8)}
    assert set(n_found.values()) == {0, 1} and len(verify(cache, sample=6, seed=3)[0]) == n_found[3]
    assert len(verify(cache, sample=23)[0]) == len(verify(cache, sample=10**9)[0]) == 1
    flip_bit(store / "attention/c.1.0", 8 * (HEADER_BYTES + 10))
    flip_bit(whole / "view-000/crops.beton", 8 * int(CropReader(whole / "view-000").pointers[5]) + 400)
    assert [finding.path for finding in verify(cache, sample=23)[0]] == [str(whole / "view-000/crops.beton")]
    flip_bit(whole / "view-000/crops.beton", 8 * int(CropReader(whole / "view-000").pointers[5]) + 400)
    for name, bit in (("attention/c.0.0", 9), ("attention/c.0.0", -40), ("probe/c.0.0", 9), ("spare.tar", 4000)):
        flip_bit(store / name, bit)
        assert [finding.path for finding in verify(cache, sample=1, seed=0)[0]] == [str(store / name)], (name, bit)
        flip_bit(store / name, bit)


def test_another_decoder_is_foreign(cache, monkeypatch):
    """Crops that this machine decodes to other pixels are sound, and said to be foreign here."""
    decoded = CropReader.decoded
    monkeypatch.setattr(CropReader, "decoded", lambda self: decoded(self) | {"crc32c": [0] * 24})
    found = findings(cache.path)
    assert len(found) == 2
    assert all(
        f"foreign {view.path}/crops.beton: 24 of 24 crops decode to other pixels" in "".join(found) for view in cache.views()
    )


def test_links_are_found(whole, tmp_path):
    """A file or folder that was moved away and left a link is reported: it is no longer part of the cache."""
    for name in ("view-000", "view-000/fake.zarr", "view-000/fake.zarr/tokens/06/c.0.0.0", "labels.npy"):
        shutil.move(whole / name, tmp_path / "elsewhere")
        (whole / name).symlink_to(tmp_path / "elsewhere")
        found = findings(whole)
        (whole / name).unlink()
        shutil.move(tmp_path / "elsewhere", whole / name)
        kind = "unknown" if (whole / name).is_dir() else "damaged"
        assert f"{kind} {whole / name}: is a symbolic link to {tmp_path / 'elsewhere'}. Put the file" in "".join(found), name


def test_a_folder_that_is_no_cache_cannot_be_checked(tmp_path):
    """Without cache.json and its copy there is nothing to check: an error, not a finding."""
    with pytest.raises(UsageError, match="is no cache"):
        verify_folder(tmp_path)


# --- the command -------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_command_on_a_sound_cache(shared_cache):
    """Sound: exit code 0, and how much was checked; nothing but JSON on stdout with --json."""
    result = run(shared_cache.path)
    n_files = len(contents(shared_cache.path))
    size = human(sum(map(len, contents(shared_cache.path).values())))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{n_files:,} files, {size} checked: sound and complete.",
        *(f"  view-00{view}/{name:<14}  24 rows" for view in (0, 1)
          for name in ("crops.beton", "fake-zstd.zarr", "fake.zarr", "fake16.zarr")),
    ]  # fmt: skip
    result = run(shared_cache.path, "--json", "--sample", 3)
    told = json.loads(result.stdout)
    assert set(told.pop("rows").values()) == {3} and told.pop("when").endswith("+00:00")
    assert result.exit_code == 0 and told == {
        "path": str(shared_cache.path), "crops_id": shared_cache.crops_id, "sample": 3, "sound": True, "n_files": n_files,
        "n_bytes": None, "again": {}, "not_made": {}, "mend": [], "findings": [],
    }  # fmt: skip


def test_command_says_what_mends(cache, image_folder):
    """Damage: exit code 1, a line a finding, and the commands that mend them."""
    flip_bit(cache.path / "labels.npy", 999)
    flip_bit(cache.view(1).path / "crops.beton", 999)
    (cache.view(0).store_path("fake") / "tokens/06/c.1.0.0").unlink()
    (cache.view(1).store_path("fake") / "zarr.json").unlink()
    shutil.rmtree(cache.view(1).store_path("fake16"))
    (cache.path / "notes.txt").touch()
    result = run(cache.path)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1 and lines[1] == f"damaged    {cache.path}/labels.npy: its SHA-256 is not the recorded one."
    assert lines[-4:] == [
        "To mend it:", f"  teacher-cache crop --repair --images DIR {cache.path}",
        f"  teacher-cache extract --repair --teacher fake --weights random:0 {cache.path}",
        f"  teacher-cache extract --teacher fake --weights random:0 --name fake16 {cache.path}",
    ]  # fmt: skip
    with_images = run(cache.path, "--images", image_folder).stdout
    assert f"  teacher-cache crop --repair --images {image_folder} {cache.path}\n" in with_images
    found = json.loads(run(cache.path, "--json").stdout)
    assert found["mend"] == [line.strip() for line in lines[-3:]] and not found["sound"]
    assert {finding["kind"] for finding in found["findings"]} == {"damaged", "unfinished", "unknown"}


def test_table(cache):
    """On a terminal there is a table, and no text in it is taken for markup."""
    (cache.path / "[bold]notes").touch()
    console = Console(file=io.StringIO(), width=200)
    console.print(findings_table(cache.path, verify(cache)[0]))
    text = console.file.getvalue()
    assert "│ unknown │ [bold]notes │ belongs to nothing in this cache. Remove it. │" in text


def test_command_that_cannot_check(tmp_path, shared_cache):
    """No cache there, or sources that are not there: exit code 2."""
    assert run(tmp_path).exit_code == 2
    result = run("--json", tmp_path)
    (error,) = json.loads(result.stdout).values()
    assert result.exit_code == 2 and error.startswith(f"{tmp_path} is no cache: it has no cache.json. Give the folder")
    assert run(shared_cache.path, "--images", tmp_path / "none").exit_code == 2
    assert run(shared_cache.path, "--teacher", "fake").exit_code == 2


@pytest.mark.parametrize("damage", ["deleted", "emptied"])
def test_command_without_cache_json(cache, damage):
    """A cache that has lost its cache.json is not sound, and can be mended."""
    (cache.path / "cache.json").unlink()
    if damage == "emptied":
        (cache.path / "cache.json").touch()
    result = run(cache.path, "--images", cache.path)
    assert result.exit_code == 1 and result.stdout.endswith(f"  teacher-cache crop --repair {cache.path}\n")
