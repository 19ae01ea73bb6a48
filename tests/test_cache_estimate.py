"""teacher-cache estimate: bytes as they come out, hours by hand, and no figure that nobody knows."""

from __future__ import annotations

import json
import os

import pytest
from cache_fakes import contents
from click.testing import CliRunner
from fakes import write_images

from pipelines.presets import student_rate
from teacher_cache.cli.main import main
from teacher_cache.errors import NoSpaceError
from teacher_cache.estimating import disk, trial
from teacher_cache.estimating.verdict import Rates, Use, hours, judge


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def estimated(*arguments) -> dict:
    return json.loads(run("estimate", *arguments, "--json").stdout)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), n_classes=4, per_class=60)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "int8", "--views", "2", "--layers", "last5"],
        ["--dtype", "float16", "--views", "1", "--layers", "last2"],
        ["--dtype", "int8", "--views", "3", "--layers", "last", "--crop-format", "raw", "--shard-rows", "50"],
        ["--dtype", "int4", "--views", "1", "--layers", "last5", "--tokens", "visible:20"],
        ["--dtype", "klt:2.5", "--views", "1", "--layers", "last2", "--tokens", "visible:40", "--batch-size", "64"],
    ],
    ids=["int8-2-views", "float16", "raw-3-views", "int4-visible", "klt-visible"],
)
def test_bytes_come_true(tmp_path, images, options):
    """What is estimated from a few crops is within 1 % of what extraction then writes, of crops within 2 %."""
    told = estimated("--teacher", "demo", "--images", images, *options)["bytes"]
    run("extract", "--teacher", "demo", "--images", images, *options, tmp_path / "c")
    sizes = {path: len(data) for path, data in contents(tmp_path / "c").items()}
    crops = sum(size for path, size in sizes.items() if path.endswith("crops.beton"))
    shards = sum(
        size
        for path, size in sizes.items()
        if "/tokens/" in path and "zarr.json" not in path or "/scale/c" in path or "/index/c" in path
    )
    assert told["total"] == pytest.approx(sum(sizes.values()), rel=0.01)
    assert told["crops"] == pytest.approx(crops, rel=0.02) and told["tokens"] < shards < told["tokens"] + told["rest"]
    assert told["total"] == sum(told[name] for name in ("crops", "tokens", "attention", "rest"))


def test_what_is_coded_together_is_named():
    """Of a transform: which blocks, what their codes take, and what decoding costs; and what cannot be read alone."""
    told = estimated("--teacher", "clip-b16", "--n-images", 1281167, "--dtype", "klt")
    assert told["groups"] == [{"layers": [12, 11, 10, 9, 8], "bytes_per_crop": 5 * 197 * 307, "flop_per_token": 30 * 768**2}]
    assert told["bytes"]["tokens"] == 1281167 * 5 * 197 * 307
    told = estimated("--teacher", "clip-l14", "--n-images", 1281167, "--dtype", "klt:2", "--layers", "last24")
    assert [len(group["layers"]) for group in told["groups"]] == [5, 5, 5, 5, 4]
    said = run("estimate", "--preset", "mr-mae-b16", "--n-images", 10000, "--dtype", "klt").stdout
    assert "coded      together: blocks 12, 11, 10, 9, 8, 302 kB a crop; 1.18 MFLOP a token to decode what is read" in said
    few = run("estimate", "--teacher", "clip-b16", "--n-images", 128, "--dtype", "klt", code=2).stderr
    assert "is fitted on at least 76,800 tokens" in few and "bits a value from 1 to 6" in run(
        "estimate", "--teacher", "clip-b16", "--n-images", 128, "--dtype", "klt:9", code=2).stderr  # fmt: skip


def test_crops_that_are_there_are_counted(shared_cache):
    """Of a cache that is there the crops are not guessed, and options that would change them are refused."""
    told = estimated("--teacher", "demo", shared_cache.path)
    assert told["n_images"] == 24 and told["crop_size"] == 32
    beton = (shared_cache.view(0).path / "crops.beton").stat().st_size
    assert told["views"] == 2 and told["bytes"]["crops"] == pytest.approx(2 * beton, rel=0.001)
    assert told["present_bytes"] > 2 * beton * 0.9  # crops of both views need no room any more
    assert estimated("--teacher", "demo", "--views", 1, shared_cache.path)["bytes"]["crops"] == pytest.approx(beton, rel=0.001)
    assert "leave out --images" in run("estimate", "--teacher", "demo", "--n-images", 5, shared_cache.path, code=2).stderr


def test_typical_crops_say_so():
    """Without images the bytes of a crop are a typical figure, and the output says whose; raw crops are exact."""
    said = run("estimate", "--teacher", "clip-b16", "--n-images", 1000).stdout
    assert "27 kB each: typical of photographs at quality 95 (docs/design/0002); --images DIR measures yours" in said
    assert estimated("--teacher", "clip-b16", "--n-images", 1000, "--crop-format", "raw")["bytes"]["crops"] > 1000 * 3 * 224**2


# --- time ------------------------------------------------------------------------------------------------------------

USE = Use(n_images=1000, n_views=2, epochs=10, runs=3, bytes_per_crop=100, total_bytes=5, free_bytes=10)


def test_hours_by_hand():
    """1,000 images, 2 views, 30 passes; teacher 100/s, extraction 80/s, student 50/s: 25 s + 600 s against 900 s."""
    verdict = judge(USE, Rates(teacher=100, extraction=80, student=50, disk=50_000))
    assert (verdict.extraction_s, verdict.cached_s, verdict.live_s) == (25, 625, 900) and verdict.saved_s == pytest.approx(275)
    assert verdict.needed_bytes_per_s == 5000 and verdict.cached_rate == 50 and verdict.pays
    assert verdict.break_even_epochs == pytest.approx(2.5) and verdict.unknown == ()
    assert verdict.sentences[0].startswith("Caching pays: 3 runs of 10 epochs take 10 min with the extraction, 15 min with")
    assert "It would pay from 3 epochs on" in verdict.sentences[1]


def test_slow_disk():
    """A disk that gives less than the student takes slows it down: the sentence says by how much, the break-even moves."""
    verdict = judge(USE, Rates(teacher=100, student=50, disk=4000))  # 40 crops/s: 25 ms instead of 20 a crop
    assert verdict.cached_rate == 40 and verdict.cached_s == pytest.approx(20 + 30_000 / 40)
    assert verdict.break_even_epochs == pytest.approx(20 / (10 - 5)) and verdict.pays
    assert any("It would wait 20% of its time" in sentence for sentence in verdict.sentences)
    never = judge(USE, Rates(teacher=100, student=50, disk=2000))
    assert never.break_even_epochs == float("inf") and never.pays is False and "LOSES" in never.sentences[0]
    assert "It would pay never" in never.sentences[1]


@pytest.mark.parametrize("rates", [Rates(), Rates(teacher=100), Rates(100, 90, 50, 1e9)], ids=["none", "teacher", "all"])
def test_few_epochs_lose(rates):
    """As many passes as views, or fewer, lose at any rate; and views that no run would read are named."""
    verdict = judge(Use(1000, 8, 4, 1, 100, 5, 10), rates)
    assert verdict.pays is False and "LOSES" in verdict.sentences[0]
    assert any("views 4 to 7 would never be read. Give --views 4." in sentence for sentence in verdict.sentences)


def test_nothing_is_made_up():
    """What needs a rate that is not known is None, and the option that gives it is named."""
    verdict = judge(Use(1000, 2, None, 1, 100, 50, 10), Rates())
    assert verdict.extraction_s is verdict.cached_s is verdict.saved_s is verdict.needed_bytes_per_s is verdict.pays is None
    assert verdict.break_even_epochs == 2 and "from 3 epochs on" in verdict.sentences[0]
    for option in ("--gpu-rate", "--student-rate", "--measure", "--epochs"):
        assert any(option in line for line in verdict.unknown)
    assert any("It does not fit: 40 B short" in sentence for sentence in verdict.sentences)
    unknown = judge(USE, Rates(student=50, disk=4000))
    assert unknown.pays is None and unknown.break_even_epochs is None and "depends on the teacher's rate" in unknown.sentences[0]


@pytest.mark.parametrize(
    "seconds, text", [(5.94, "5.9 s"), (89, "89 s"), (720, "12 min"), (7200, "2 h"), (86400 * 9.1, "9.1 days")]
)
def test_durations(seconds, text):
    """Durations are told in the unit that people use for them."""
    assert hours(seconds) == text


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_preset_gives_epochs_teacher_and_what_is_read():
    """--preset fills in teacher and epochs, and of the stored layers only those that its student reads count for the disk."""
    told = estimated("--preset", "mr-mae-b16", "--n-images", 1000, "--gpu-rate", 1000, "--student-rate", 500)
    all_layers = estimated("--teacher", "clip-b16", "--n-images", 1000)
    assert told["teacher"] == "clip-b16" and told["layers_read"] == [12] and told["epochs"] > 1 and told["pays"] is True
    assert told["bytes_read_per_crop"] < all_layers["bytes_read_per_crop"] / 3
    assert told["needed_bytes_per_s"] == 500 * told["bytes_read_per_crop"] and told["extraction_s"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Whose targets? Give --teacher NAME"),
        (["--teacher", "demo"], "How many images? Give --images DIR, or --n-images N"),
        (["--teacher", "dmo", "--n-images", "5"], "Did you mean demo?"),
        (["--teacher", "demo", "--images", "nowhere"], "--images nowhere: no such folder"),
        (["--teacher", "demo", "--images", ".", "--n-images", "5"], "--images counts the images by itself"),
        (["--preset", "mae-b16", "--n-images", "5"], "mae-b16 learns without a teacher"),
        (["--preset", "maskalign-demo", "--n-images", "5", "--layers", "last"], "Give --layers 2,3,4,5,6."),
        (["--teacher", "demo", "--n-images", "5", "--layers", "9"], "demo has blocks 1 to 6"),
        (["--teacher", "demo", "--n-images", "5", __file__], "is a file. Give the folder where the cache shall lie"),
    ],
)
def test_what_is_missing_is_said(arguments, message):
    """A question that cannot be answered is one sentence and code 2."""
    assert message in run("estimate", *arguments, code=2).stderr


def test_measuring(tmp_path, images, monkeypatch):
    """--measure gives every rate, says how each was taken, and leaves nothing behind; a rate that is given is not measured."""
    for module in (trial, student_rate):
        monkeypatch.setattr(module, "LASTS_S", 0.05)
    monkeypatch.setattr(disk, "WRITE_S", 0.01)
    arguments = ["--preset", "maskalign-demo", "--images", images, "--measure", tmp_path / "to" / "be"]
    told = estimated(*arguments)
    assert all(told["rates"][name] > 0 for name in ("teacher", "extraction", "student", "disk"))
    assert [line.split(",")[0] for line in told["unknown"]] == ["the time of cutting crops"]
    assert [line.split()[0] for line in told["rates"]["how"]] == ["teacher", "extraction", "student"]
    assert told["disk"]["write"] > 0 and list(tmp_path.iterdir()) == []
    said = run("estimate", *arguments, "--gpu-rate", 5, "--student-rate", 7).stdout
    assert "measured   " not in said and "extraction 48 s on one device" in said and "disk       reads" in said


# --- the disk --------------------------------------------------------------------------------------------------------


def test_reading_a_disk(tmp_path, monkeypatch):
    """Files that are there are read, every byte of them once, and stay as they are."""
    file = tmp_path / "shard"
    file.write_bytes(bytes(3_000_001))
    monkeypatch.setattr(disk, "file_system", lambda path: "ext4")
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: read.append(pread(*arguments)) or read[-1])
    rates = disk.measure_files([file, file], 5000)
    assert sum(map(len, read)) == 2 * 3_000_001 and rates.random > 0 and rates.write is None
    assert rates.how == "after the kernel was asked to forget them" and file.stat().st_size == 3_000_001


def test_writing_to_a_disk(tmp_path, monkeypatch):
    """A file is written in pieces, each fsynced, until the time is over or it has a tenth of what is free; then it goes away."""
    written, fsync = [], os.fsync
    monkeypatch.setattr(disk, "PIECE", 1 << 20)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (written.append(os.fstat(descriptor).st_size), fsync(descriptor)))
    monkeypatch.setattr(disk, "free_bytes", lambda path: 35 << 20)
    rates = disk.measure_folder(tmp_path / "not" / "there", 4096)
    assert written == [1 << 20, 2 << 20, 3 << 20] and rates.write > 0 and rates.random > 0
    monkeypatch.setattr(disk, "WRITE_S", 0.0001)
    written.clear()
    disk.measure_folder(tmp_path, 4096)
    assert written == [1 << 20] and list(tmp_path.iterdir()) == []


def test_memory_is_no_disk(tmp_path, monkeypatch):
    """On a file system in memory the report says that this is no disk."""
    monkeypatch.setattr(disk, "file_system", lambda path: "tmpfs")
    (tmp_path / "shard").write_bytes(bytes(10_000))
    assert disk.measure_files([tmp_path / "shard"], 100).how == "of memory: tmpfs is no disk"


def test_a_full_disk_is_not_measured(tmp_path, monkeypatch):
    """Where there is no room for a temporary file, nothing is written."""
    monkeypatch.setattr(disk, "free_bytes", lambda path: 600 << 20)
    with pytest.raises(NoSpaceError, match="too few to measure the disk"):
        disk.measure_folder(tmp_path, 4096)
    assert list(tmp_path.iterdir()) == []
