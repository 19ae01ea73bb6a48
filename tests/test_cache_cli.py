"""The teacher-cache command: one sentence for every mistake, exit codes with a meaning, nothing written by --dry-run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from cache_fakes import contents, failing_at, flip_bit
from click.testing import CliRunner
from fakes import FakeTeacher

from teacher_cache import teachers
from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.cli.main import main
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import UnknownNameError
from teacher_cache.extraction import parts
from teacher_cache.extraction.background import BackgroundWriter
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.files import space
from teacher_cache.store.sizes import shard_bytes
from teacher_cache.store.store import Store

FAKE = ["extract", "--teacher", "fake"]
SMALL = ["--layers", "last2", "--shard-rows", "8", "--batch-size", "5"]


@pytest.fixture(autouse=True)
def fake_teacher(monkeypatch, teacher):
    """`--teacher fake` is the fake one; every other name takes its usual way."""
    load = teachers.load_teacher
    monkeypatch.setattr(
        teachers, "load_teacher", lambda name, *rest, **more: teacher if name == "fake" else load(name, *rest, **more)
    )


def run(*arguments, code=0):
    """Run the command; what it said on stdout and stderr. A traceback is a failure of the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def extract_to(cache, images, *more, code=0):
    return run("extract", "--teacher", "fake", "--images", images, *SMALL, *more, cache, code=code)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, image_folder, teacher):
    """A finished cache, made by the command. Read only: see `made`."""
    folder = tmp_path_factory.mktemp("made") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "load_teacher", lambda *_, **__: teacher)
        extract_to(folder, image_folder)
    return folder


@pytest.fixture
def made(tmp_path, made_once):
    """A copy of it that a test may damage."""
    return shutil.copytree(made_once, tmp_path / "made")


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", main.commands)
def test_help(command):
    """Every command explains itself, with an example that names it, and describes every option."""
    text = run(command, "--help").output
    assert "Example:" in text and f"teacher-cache {command}" in text.split("Example:")[1]
    assert not re.findall(r"^  --[a-z-]+(?: [A-Z]+)?$(?!\n {10})", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 110


def test_help_of_the_whole():
    """teacher-cache --help lists the commands with a line each, and an example."""
    text = run("--help").output
    assert "Example:" in text and all(re.search(rf"^  {command} +\w+", text, re.MULTILINE) for command in main.commands)
    assert {"0", "1", "2", "75", "130"} <= set(text.split("Exit codes:")[1].split())


def test_version():
    """--version answers."""
    assert re.search(r"\d+\.\d+", run("--version").output)


# --- making ----------------------------------------------------------------------------------------------------------


def test_from_images_to_a_sound_cache(tmp_path, image_folder):
    """extract makes crops and targets in one go, says what it does and how much space it takes; run again it does nothing."""
    said = extract_to(tmp_path / "c", image_folder, "--views", 2).stderr
    assert re.search(r"24 images in 3 classes, 2 views to make, random 32 px, jpeg95: about [\d.]+ kB", said)
    assert "2 views of 24 crops in 3 shards, layers 5, 6, int8, attention: " in said and "weights random:0 (sha256 " in said
    assert re.search(r"space +[\d.]+ kB needed, [\d.]+ [GT]B free", said) and "Done. Next: teacher-cache inspect" in said
    assert verify(Cache(tmp_path / "c"))[0] == [] and len(Cache(tmp_path / "c").views()) == 2
    before = contents(tmp_path / "c")
    again = run("extract", "--teacher", "fake", *SMALL, tmp_path / "c").stderr
    assert "already holds these targets of fake. Nothing to do." in again
    assert "has all its crops. Nothing to do." in run("crop", tmp_path / "c").stderr
    assert contents(tmp_path / "c") == before


def test_crops_first(tmp_path, image_folder):
    """crop, then extract without the originals, makes what extract does in one go."""
    run("crop", "--images", image_folder, "--crop-size", 32, tmp_path / "a")
    run("extract", "--teacher", "fake", *SMALL, tmp_path / "a")
    extract_to(tmp_path / "b", image_folder)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_more_views_and_teachers(made, image_folder):
    """A view and a second store are added to a cache; what was there keeps its bytes."""
    before = contents(made)
    extract_to(made, image_folder, "--views", 2)
    run("extract", "--teacher", "fake", "--name", "half", "--dtype", "float16", made)
    after = contents(made)
    assert before.items() <= after.items() and Cache(made).view(1).store_names() == ["fake", "half"]
    assert verify(Cache(made))[0] == []


def test_a_store_that_one_view_has_lost(tmp_path, image_folder):
    """Without more than the teacher's name, the lost store of a view is made again as the other view has it, byte by byte."""
    extract_to(tmp_path / "c", image_folder, "--views", 2)
    whole = contents(tmp_path / "c")
    for view in ("view-000", "view-001"):
        shutil.rmtree(tmp_path / "c" / view / "fake.zarr")
        run(*FAKE, tmp_path / "c")
        assert contents(tmp_path / "c") == whole


def test_stores_that_do_not_agree(tmp_path, image_folder, monkeypatch):
    """Where the store of any view was made otherwise than is asked for, nothing is begun and no teacher is loaded."""
    extract_to(tmp_path / "c", image_folder, "--views", 2)
    shutil.rmtree(tmp_path / "c" / "view-000" / "fake.zarr")
    before = contents(tmp_path / "c")
    monkeypatch.setattr(teachers, "load_teacher", None)
    said = run(*FAKE, "--shard-rows", 4, "--layers", "last2", tmp_path / "c", code=2).stderr
    assert said.splitlines()[1] == "  shard_rows: 8 in the store, 4 given"
    assert "view-001/fake.zarr was made with other parameters" in said and contents(tmp_path / "c") == before
    said = run(*FAKE, "--layers", "last", tmp_path / "c", code=2).stderr
    assert said.splitlines()[1] == "  layers: 5,6 in the store, 6 given" and "codecs" not in said


def test_center_plan(tmp_path, image_folder):
    """--plan center makes an evaluation cache; two equal views of it are refused."""
    extract_to(tmp_path / "c", image_folder, "--plan", "center")
    assert Cache(tmp_path / "c").plan.kind == "center" and Cache(tmp_path / "c").plan.resize == 37
    said = extract_to(tmp_path / "d", image_folder, "--plan", "center", "--views", 2, code=2).stderr
    assert "draws the same crop in every view" in said and not (tmp_path / "d").exists()


def test_ignored_files_are_told(tmp_path, image_folder):
    """Files that are no images by name are counted on screen."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "class-0" / "notes.txt").touch()
    assert (
        f"1 files of {folder} are no images by their names and are left alone, e.g. 'class-0/notes.txt'."
        in extract_to(tmp_path / "c", folder).stderr
    )


def test_new_originals_are_told(made, tmp_path, image_folder):
    """Images that the cache was made without are counted when a view is added, and by verify --images; skipped ones are not."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    shutil.copy(folder / "class-0" / "image-000.png", folder / "class-1" / "new.png")
    words = f"1 images of {folder} are not in this cache, which was made without them, e.g. 'class-1/new.png'."
    assert words in run("verify", "--images", folder, made).stderr
    assert words in run("crop", "--views", 2, "--images", folder, made).stderr
    (folder / "class-1" / "new.png").write_bytes(b"")
    assert extract_to(tmp_path / "c", folder, "--skip-bad").stderr.count("not in this cache") == 0
    assert "not in this cache" not in run("verify", "--images", folder, tmp_path / "c").stderr


def test_seeds_are_told(tmp_path, image_folder):
    """Where the weights differ, both seeds or files are named, not their sums alone."""
    timm = ["extract", "--teacher", "timm:vit_tiny_patch16_224", "--image-size", 32, "--layers", "last"]
    run(*timm, "--weights", "random:0", "--images", image_folder, "--crop-size", 32, tmp_path / "c")
    said = run(*timm, "--weights", "random:1", tmp_path / "c", code=2).stderr
    assert re.search(r"weights: random:0 \(sha256 .{12}\) in the store, random:1 \(sha256 .{12}\) given", said)
    assert "weights_sha256" not in said
    said = run("verify", "--weights", "built-in", tmp_path / "c", code=2).stderr
    assert "was made with the weights random:0. Give these." in said
    said = run("verify", "--weights", tmp_path / "none", tmp_path / "c", code=2).stderr
    assert said.count("--weights") == 1


def test_bad_images(tmp_path, image_folder):
    """Images that cannot be decoded are listed, code 1; with --skip-bad they are left out and counted."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "class-0" / "image-000.png").write_bytes(b"")
    said = extract_to(tmp_path / "c", folder, code=1).stderr
    assert "Error: Of 24 images 1 cannot be decoded:\n  class-0/image-000.png: " in said and "--skip-bad" in said
    said = extract_to(tmp_path / "c", folder, "--skip-bad").stderr
    assert "1 images could not be decoded and were left out" in said and "skipped.txt lists them" in said
    assert "1 left out (skipped.txt)" in run("inspect", tmp_path / "c").stdout


def test_dry_run_writes_nothing(tmp_path, image_folder, made):
    """--dry-run says what would be made and how large it is, and writes nothing, on a new cache or an old one."""
    said = extract_to(tmp_path / "c", image_folder, "--dry-run").stderr
    assert "24 images in 3 classes" in said and "needed" in said and not (tmp_path / "c").exists()
    run("crop", "--images", image_folder, "--dry-run", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    before = contents(made)
    extract_to(made, image_folder, "--views", 2, "--dry-run")
    run("extract", "--teacher", "fake", "--name", "b", "--dry-run", made)
    assert contents(made) == before


@pytest.mark.parametrize("command", ["crop", "extract"])
def test_too_little_space(tmp_path, image_folder, monkeypatch, command):
    """Where the disk is too small nothing is begun; the message has both sizes and what to do. Also as a dry run."""
    monkeypatch.setattr(space, "free_bytes", lambda path: 5000)
    arguments = ["--teacher", "fake", *SMALL] if command == "extract" else []
    for more in ([], ["--dry-run"]):
        said = run(command, *arguments, "--images", image_folder, *more, tmp_path / "c", code=1).stderr
        assert re.search(r"Error: .* are needed on the disk of .*, 5 kB are free: .* short. Make room, or store less", said)
        assert not (tmp_path / "c").exists()


def test_ctrl_c(tmp_path, image_folder, monkeypatch):
    """Interrupted, the command says that finished work is kept, exits with 130, and the same command goes on."""
    whole = extract_to(tmp_path / "whole", image_folder) and contents(tmp_path / "whole")
    for module, name, call in ((parts.WorkFolder, "commit", 1), (BackgroundWriter, "put", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing_at(getattr(module, name), call, KeyboardInterrupt()))
            said = extract_to(tmp_path / "c", image_folder, code=130).stderr
        assert "Interrupted. Finished work is kept; the same command goes on from there." in said
    extract_to(tmp_path / "c", image_folder)
    assert contents(tmp_path / "c") == whole


# --- shares of the work ----------------------------------------------------------------------------------------------


def test_torchrun(tmp_path, image_folder, made, monkeypatch):
    """Processes of torchrun share the shards: together they make what one makes; more of them than shards are told so."""
    run("crop", "--images", image_folder, "--crop-size", 32, tmp_path / "c")
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(numba.config.NUMBA_NUM_THREADS))  # numba refuses a change later on
    for rank in (1, 3, 0, 2):  # 4 processes, 3 shards
        of_torchrun = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "x"}
        for name, value in of_torchrun.items():
            monkeypatch.setenv(name, str(value))
        said = run(*FAKE, *SMALL, tmp_path / "c").stderr
        assert ("There are 3 shards for 4 processes: none for this one." in said) == (rank == 0)
    assert "Done. Next:" in said and contents(tmp_path / "c") == contents(made)
    assert "torchrun's processes share the shards among themselves" in run(*FAKE, "--shards", "0:1", made, code=2).stderr
    assert "--repair is for one process" in run(*FAKE, "--repair", made, code=2).stderr
    said = run(*FAKE, *SMALL, "--images", image_folder, tmp_path / "new", code=2).stderr
    assert "First run: teacher-cache crop" in said


def test_one_gpu_for_all_of_them(made, monkeypatch):
    """Under torchrun a GPU by its number would be everybody's: refused, where one process may have it."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(numba.config.NUMBA_NUM_THREADS))
    assert "all of them would take that one GPU" in run(*FAKE, "--device", "cuda:0", made, code=2).stderr
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert "all of them would take" not in run(*FAKE, "--device", "cuda:0", made, code=2).stderr


def test_other_launchers(tmp_path, image_folder, made, monkeypatch):
    """RANK and WORLD_SIZE set by something else than torchrun mean nothing; torchrun's that are no numbers are refused."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    extract_to(tmp_path / "c", image_folder)
    assert contents(tmp_path / "c") == contents(made)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert "must be numbers, not ['2', '2', '', '']" in run(*FAKE, made, code=2).stderr


def test_a_gpu_that_is_full(tmp_path, image_folder, monkeypatch):
    """A GPU without memory ends the command with what to do, not with a traceback."""

    def full(self, images, layers):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FakeTeacher, "__call__", full)
    assert "The GPU's memory is full. Take smaller batches" in extract_to(tmp_path / "c", image_folder, code=1).stderr


def test_tokens_option(tmp_path, image_folder):
    """--tokens visible:K and --dtype int4 make such a store, and the command that goes on need not repeat them."""
    extract_to(tmp_path / "c", image_folder, "--tokens", "visible:5", "--dtype", "int4")
    store = Store.open(tmp_path / "c" / "view-000" / "fake.zarr").spec
    assert (store.visible, store.dtype) == (5, "int4")
    assert "already holds" in run(*FAKE, tmp_path / "c").stderr
    said = run(*FAKE, "--tokens", "all", tmp_path / "c", code=2).stderr
    assert "visible: 5 in the store, 0 given" in said
    for wrong in ("visible:0", "visible", "5", "visible:-1"):
        assert "give all, or visible:K with the number of patches" in run(*FAKE, "--tokens", wrong, tmp_path / "c", code=2).stderr


def test_shards(tmp_path, image_folder, made):
    """Processes that are given shards make what one makes; each says what is still missing, the last completes the store."""
    run("crop", "--images", image_folder, "--crop-size", 32, tmp_path / "c")
    dry = run(*FAKE, *SMALL, "--shards", "0:2", "--dry-run", tmp_path / "c").stderr
    assert re.search(r"1 view of 24 crops in 3 shards, layers 5, 6, int8, attention: [\d.]+ kB to write for shards 0:2", dry)
    said = run(*FAKE, *SMALL, "--shards", "1:", tmp_path / "c").stderr
    assert f"{tmp_path / 'c' / 'view-000' / 'fake.zarr'}: 1 of 3 shards are still missing.\nWhoever makes the last one" in said
    assert "Done" not in said and "3 shards are still missing" in run(*FAKE, *SMALL, "--shards", "1:3", tmp_path / "c").stderr
    assert "Done. Next" in run(*FAKE, *SMALL, "--shards", "0:1", tmp_path / "c").stderr
    assert contents(tmp_path / "c") == contents(made)
    assert "already holds these targets" in run(*FAKE, *SMALL, "--shards", ":2", tmp_path / "c").stderr


def test_shards_need_space_for_all_of_them(tmp_path, image_folder, teacher, monkeypatch):
    """Processes that share a store share its disk: each asks it for what all shards still take, less what others have written of
    theirs, so that they do not all begin where only one fits."""
    run("crop", "--images", image_folder, "--crop-size", 32, tmp_path / "c")
    spec = ExtractPlan("last2", shard_rows=8).store_spec(teacher.spec, 24)
    run(*FAKE, *SMALL, "--shards", "0:1", tmp_path / "c")
    own, free = ["--shards", "1:2", tmp_path / "c"], shard_bytes(spec, teacher.spec, 1) * 3 // 2
    monkeypatch.setattr(space, "free_bytes", lambda path: free)
    said = run(*FAKE, *SMALL, *own, code=1).stderr
    assert "for shards 1:2" in said and "needed by all shards, whoever makes them" in said and " short. Make room" in said
    assert " short. Make room" in run(*FAKE, *SMALL, *own, code=1).stderr
    (tmp_path / "c" / "view-000" / "fake.zarr" / "tokens" / "05" / "c.2.0.0.partial").write_bytes(bytes(free))
    run(*FAKE, *SMALL, *own)


@pytest.mark.parametrize("begun", [False, True])
def test_shards_need_finished_crops(tmp_path, image_folder, made, begun):
    """--shards does not make crops, which have one writer: it names the command that does."""
    cache, views = (made, "2") if begun else (tmp_path / "new", "1")
    said = run(*FAKE, "--shards", "0:1", "--views", views, "--images", image_folder, cache, code=2).stderr
    assert f"First run: teacher-cache crop --images DIR --views {views} --crop-size 32 {cache}" in said
    assert not (tmp_path / "new").exists()


# --- mending ---------------------------------------------------------------------------------------------------------


def test_repair(tmp_path, image_folder, teacher):
    """extract --repair mends lists, crops and targets of all views to the bytes they had, makes the damaged shards again and no
    others, and says what it mended; on a sound cache it says that there is nothing."""
    extract_to(tmp_path / "c", image_folder, "--views", 2)
    whole = contents(tmp_path / "c")
    said = run(*FAKE, "--repair", tmp_path / "c").stderr
    assert "there was nothing to mend" in said and "already holds these targets" in said
    (tmp_path / "c" / "cache.json").unlink()
    flip_bit(tmp_path / "c/view-000/crops.npy", 999)
    flip_bit(tmp_path / "c/view-000/crops.beton", -99)
    flip_bit(tmp_path / "c/view-001/fake.zarr/tokens/06/c.1.0.0", 999)
    (tmp_path / "c/view-001/fake.zarr/complete.json").write_bytes(b"")
    n_calls = teacher.n_calls
    said = run(*FAKE, *SMALL, "--repair", tmp_path / "c").stderr
    assert len(re.findall("^mended   ", said, re.MULTILINE)) == 5 and "Done. Next" in said
    assert contents(tmp_path / "c") == whole and teacher.n_calls == n_calls + 1 + 2  # the probe, and one shard of two batches


def test_repair_of_crops(tmp_path, image_folder):
    """crop --repair mends what needs no teacher; for crops that are damaged it asks for the originals."""
    whole = contents(extract_to(tmp_path / "c", image_folder) and tmp_path / "c")
    assert "there was nothing to mend" in run("crop", "--repair", tmp_path / "c").stderr
    (tmp_path / "c" / "images.txt").write_bytes(b"")
    flip_bit(tmp_path / "c/view-000/crops.beton", CropReader(tmp_path / "c/view-000").pointers[5] * 8 + 99)
    said = run("crop", "--repair", tmp_path / "c", code=2).stderr
    assert "images.txt" in said and "Give their folder as --images" in said
    assert "1 cut again from" in run("crop", "--repair", "--images", image_folder, tmp_path / "c").stderr
    assert contents(tmp_path / "c") == whole


# --- disks -----------------------------------------------------------------------------------------------------------


def refuse_writing(monkeypatch, folder, number):
    """Every attempt to create something below `folder` fails with this errno, as a read-only disk or another user's folder."""
    real_open, real_mkdir = os.open, os.mkdir

    def refused(path):
        return str(path).startswith(str(folder))

    def open_(path, flags, *more, **options):
        if refused(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number), str(path))
        return real_open(path, flags, *more, **options)

    def mkdir(path, *more, **options):
        if refused(path) and not Path(path).is_dir():
            raise OSError(number, os.strerror(number), str(path))
        return real_mkdir(path, *more, **options)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "mkdir", mkdir)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_to(tmp_path, image_folder, made, monkeypatch, number):
    """On a read-only disk, or in another user's folder, what is finished can be used, and what is not is one sentence."""
    before = contents(made)
    refuse_writing(monkeypatch, tmp_path, number)
    run(*FAKE, *SMALL, made)
    run("crop", made)
    for arguments in ([*FAKE, "--name", "b"], ["crop", "--views", "2", "--images", image_folder], ["crop", "--repair"]):
        said = run(*arguments, made, code=1).stderr
        assert f"{os.strerror(number)}. Whoever writes leaves a claim there: let this user write to {made}" in said
    assert os.strerror(number) in run("crop", "--images", image_folder, tmp_path / "new", code=1).stderr
    assert contents(made) == before


def test_files_that_cannot_be_read(tmp_path, image_folder, made, monkeypatch):
    """An image that may not be read is one of the bad ones; a file of the cache that may not be read is named."""
    real_open = os.open

    def refuse(path, *more, **options):
        if str(path).endswith(("image-003.png", "cache.json")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    said = run("crop", "--images", image_folder, tmp_path / "new", code=1).stderr
    assert "Of 24 images 1 cannot be decoded:\n  class-0/image-003.png: Permission denied\n" in said
    for arguments in (["inspect"], ["crop"], [*FAKE, *SMALL]):
        assert "Error: " in (said := run(*arguments, made, code=1).stderr)
        assert f"{made / 'cache.json'}: permission denied: it belongs to " in said


IN_THE_WAY = ["crops.partial", "crops.partial/view-001", "view-001", "view-000/b.zarr", "view-000/b.zarr.claims"]


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_file_where_a_folder_should_be(made, image_folder, name):
    """A file that stands in the way is named in one sentence, and nothing is done to it."""
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("mine")
    add_a_view = ["crop", "--views", "2", "--images", image_folder]
    said = run(*([*FAKE, "--name", "b"] if "b.zarr" in name else add_a_view), made, code=1).stderr
    assert said.count("Error: ") == 1 and str(made / name) in said and (made / name).read_text() == "mine"


@pytest.mark.parametrize("gone", ["c", "c/view-000", "c/view-000/fake.zarr"])
def test_a_cache_that_vanishes(tmp_path, image_folder, monkeypatch, gone):
    """A cache that is deleted while it is written to ends the command with a sentence and code 1."""
    put = BackgroundWriter.put

    def vanish(*arguments, **options):
        shutil.rmtree(tmp_path / gone, ignore_errors=True)
        put(*arguments, **options)

    monkeypatch.setattr(BackgroundWriter, "put", vanish)
    said = extract_to(tmp_path / "c", image_folder, code=1).stderr
    assert f"Error: {tmp_path / gone} was deleted or moved while" in said


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no images": ([*FAKE, "{new}"], 2, "lacks view 0, and making it needs the originals: give --images"),
    "images missing": (["crop", "--images", "{tmp}/nowhere", "{new}"], 2, "nowhere: no such folder"),
    "images is a file": (["crop", "--images", "{made}/cache.json", "{new}"], 2, "cache.json: is a file, not a folder"),
    "cache is a file": (["crop", "--images", "{images}", "{made}/cache.json"], 2, "is a file. Give a folder"),
    "cache below a file": (["crop", "--images", "{images}", "{made}/cache.json/c"], 1, "a file stands where a folder"),
    "foreign folder": (["crop", "--images", "{images}", "{images}"], 2, "neither empty nor a cache"),
    "inspect nothing": (["inspect", "{tmp}/nowhere"], 2, "is no cache: it has no cache.json"),
    "inspect a folder": (["inspect", "{images}"], 2, "is no cache: it has no cache.json"),
    "inspect a file": (["inspect", "{made}/cache.json"], 2, "is a part of the cache {made}"),
    "kernel's file system": (["crop", "--images", "{images}", "/proc/c"], 2, "/proc/c is on a file system that keeps no files"),
    "verify a view": (["verify", "{made}/view-000"], 2, "is a part of the cache {made}. Give the whole of it: {made}"),
    "verify a store": (["verify", "{made}/view-000/fake.zarr"], 2, "is a part of the cache {made}. Give"),
    "verify a file": (["verify", "{made}/view-000/crops.npy"], 2, "is a part of the cache {made}. Give"),
    "extract to a view": ([*FAKE, "{made}/view-000"], 2, "is a part of the cache {made}. Give"),
    "mend a view": (["crop", "--repair", "{made}/view-000"], 2, "is a part of the cache {made}. Give"),
    "verify nothing": (["verify", "{tmp}/nowhere"], 2, "is no cache: it has no cache.json"),
    "unknown teacher": (["extract", "--teacher", "clip-b61", "{made}"], 2, "named 'clip-b61'. Did you mean clip-b16?"),
    "unknown command": (["extrakt"], 2, "No such command 'extrakt'"),
    "unknown option": (["crop", "--image", "x", "{new}"], 2, "No such option"),
    "shards": ([*FAKE, "--shards", "3:3", "{made}"], 2, "'3:3' is no range of shards. Give A:B with A < B, such as 0:40"),
    "one shard": ([*FAKE, "--shards", "3", "{made}"], 2, "'3' is no range of shards"),
    "shards from the end": ([*FAKE, "--shards", "-2:", "{made}"], 2, "'-2:' is no range of shards"),
    "shards behind the end": (
        [*FAKE, *SMALL, "--shards", "3:9", "{made}"],
        2,
        "there are 3 shards; the range must begin at 0 to 2",
    ),
    "repair of nothing": (["crop", "--repair", "{tmp}/nowhere"], 2, "nowhere is no cache"),
    "repair without doing it": (
        ["crop", "--repair", "--dry-run", "{made}"],
        2,
        "has no dry run. What there is",
    ),
    "repair of shards": ([*FAKE, "--repair", "--shards", "0:1", "{made}"], 2, "--repair looks at all shards"),
    "no cache": (["inspect"], 2, "Missing argument 'CACHE'"),
    "no teacher": (["extract", "{made}"], 2, "Missing option '--teacher'"),
    "views": (["crop", "--views", "0", "{made}"], 2, "Invalid value for '--views'"),
    "layers": ([*FAKE, "--layers", "7", "{made}"], 2, "fake has blocks 1 to 6"),
    "name": ([*FAKE, "--name", "../x", "{made}"], 2, "--name '../x': give letters, digits"),
    "empty name": ([*FAKE, "--name", ".", "{made}"], 2, "--name '.': give letters"),
    "device": ([*FAKE, "--device", "tpu", "{made}"], 2, "--device tpu: give auto, cpu"),
    "other dtype": ([*FAKE, *SMALL, "--dtype", "float16", "{made}"], 2, "dtype: int8 in the store, float16 given"),
    "other seed": (["crop", "--images", "{images}", "--seed", "1", "{made}"], 2, "plan seed: 0 in the cache, 1 given"),
    "other size": (["crop", "--crop-size", "48", "{made}"], 2, "crop plan size: 32 in the cache, 48 given"),
    "other format": (["crop", "--crop-format", "raw", "{made}"], 2, "crop_format: jpeg95 in the cache, raw given"),
    "view without images": ([*FAKE, *SMALL, "--views", "2", "{made}"], 2, "lacks view 1, and making it needs"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(tmp_path, image_folder, made, case):
    """A wrong path, name, value or parameter is one message and an exit code, without traceback, and changes nothing."""
    arguments, code, words = MISTAKES[case]
    before = contents(made)
    filled = [text.format(tmp=tmp_path, made=made, images=image_folder, new=tmp_path / "new") for text in arguments]
    said = run(*filled, code=code).stderr
    assert words.format(made=made) in said and said.count("Error: ") == 1
    assert contents(made) == before and not (tmp_path / "new").exists() and not list(image_folder.glob("*.json"))


@pytest.mark.parametrize("name", ["cache.json", "images.txt", "labels.npy", "view-000/crops.npy", "view-000/checksums.json",
                                  "view-000/crops.beton", "view-000/fake.zarr/store.json", "view-000/fake.zarr/zarr.json",
                                  "view-000/fake.zarr/shards.npy", "view-000/fake.zarr/complete.json"])  # fmt: skip
@pytest.mark.parametrize("damage", ["flipped", "empty", "gone"])
def test_broken_files(made, image_folder, name, damage):
    """Whatever file is broken or gone, no command ends in a traceback, and verify finds it with code 1."""
    file = made / name
    if damage == "flipped":
        flip_bit(file, 777)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    add_a_view = ["crop", "--views", "2", "--images", str(image_folder), "--dry-run"]
    for arguments in (["inspect"], ["crop"], add_a_view, [*FAKE, *SMALL], [*FAKE, "--name", "b"]):
        result = CliRunner().invoke(main, [*arguments, str(made)])
        assert isinstance(result.exception, SystemExit | None), (arguments, result.exception)
        assert result.exit_code in (0, 1) and result.stderr.count("Error: ") == result.exit_code, (arguments, result.output)
    if name != "cache.json" or damage != "gone":
        shutil.rmtree(made / "view-000" / "b.zarr", ignore_errors=True)
        result = run("verify", made, code=1)
        assert file.name in result.output or damage == "gone" and name.endswith("complete.json")


# --- looking ---------------------------------------------------------------------------------------------------------


def test_inspect(cache):
    """inspect says what a person wants to know, and --json the same as values."""
    text = run("inspect", cache.path).stdout
    for words in ("24 in 3 classes", "random, 32 px, jpeg95, bicubic, seed 0, scale 0.3 to 1, flip 0.5", "view 1: crops.beton",
                  "24 of 24 (100%)  3 of 3", f"{32 * '█'}  complete", "layers 2, 3, 4, 5, 6 of 6, int8, codec none",
                  ", CLS attention", "codec zstd", "as float16 ->", "standardised error of a token"):  # fmt: skip
        assert words in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    described = json.loads(run("inspect", "--json", cache.path).stdout)
    assert described["n_images"] == 24 and [len(view["stores"]) for view in described["views"]] == [3, 3]
    store = described["views"][0]["stores"][0]
    assert store["name"] == "fake" and store["complete"] and store["rows_done"] == 24
    assert store["bytes_per_crop"]["float16"] == 5 * 17 * 24 * 2 + 64 and store["bytes_per_crop"]["quantised"] == 5 * 17 * 26 + 64
    on_disk = sum(file.stat().st_size for file in cache.view(0).store_path("fake").rglob("c.*.0*") if "quant" not in str(file)
                  and "head" not in str(file) and "probe" not in str(file))  # fmt: skip
    assert store["bytes"] == on_disk


def test_inspect_of_an_unfinished_cache(tmp_path, image_folder, monkeypatch):
    """inspect tells how much of an unfinished store is done."""
    with monkeypatch.context() as patch:
        patch.setattr(BackgroundWriter, "put", failing_at(BackgroundWriter.put, 5, KeyboardInterrupt()))
        extract_to(tmp_path / "c", image_folder, code=130)
    said = run("inspect", tmp_path / "c").stdout
    assert re.search(r"16 of 24 \(67%\)  2 of 3 +[\d.]+ kB +█{22}·{10}  NOT complete, missing 2:3", said)
    command = f"to finish view 0: teacher-cache extract --teacher fake --weights random:0 {tmp_path / 'c'}"
    assert command in " ".join(said.split())  # a long line is folded
    result = run("verify", "--json", tmp_path / "c", code=1)
    assert [finding["kind"] for finding in json.loads(result.stdout)["findings"]] == ["unfinished"]


def test_verify(cache):
    """verify ends with 0 on a sound cache and with 1 and one line a finding on another; --json gives the same as values."""
    n_files = len(contents(cache.path))
    assert re.match(rf"{n_files:,} files, [0-9.]+ MB checked: sound and complete\.\n", run("verify", cache.path).stdout)
    sound = json.loads(run("verify", "--json", cache.path).stdout)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", sound["when"])
    assert (sound["path"], sound["crops_id"], sound["sample"]) == (str(cache.path), cache.crops_id, None)
    assert sound["sound"] and sound["n_files"] == n_files and sound["mend"] == sound["findings"] == []
    shard = cache.view(0).store_path("fake") / "tokens/04/c.1.0.0"
    flip_bit(shard, 99)
    lines = run("verify", cache.path, code=1).stdout.splitlines()
    assert re.fullmatch(rf"damaged +{re.escape(str(shard))}: \S.*", lines[0])
    assert lines[1].endswith(" checked: 1 finding.") and "teacher-cache extract --repair " in "\n".join(lines[2:])
    assert json.loads(run("verify", "--json", cache.path, code=1).stdout)["findings"][0]["path"] == str(shard)


def test_teachers():
    """teachers lists every teacher by name, for people and as JSON."""
    text, values = run("teachers").stdout, json.loads(run("teachers", "--json").stdout)
    assert [entry["name"] for entry in values][: len(teachers.TEACHERS)] == list(teachers.TEACHERS)
    assert all(entry["name"] in text for entry in values) and "timm:NAME" in text
    assert issubclass(UnknownNameError, ValueError)


def test_looking_imports_no_torch(cache):
    """inspect and teachers import neither torch nor zarr: they answer at once, also where torch is broken."""
    for arguments in (["inspect", str(cache.path)], ["teachers"], ["--help"]):
        script = (
            "import sys\nfrom teacher_cache.cli.main import main\n"
            f"try: main({arguments!r})\nexcept SystemExit as error: assert not error.code\n"
            "print(sorted({'torch', 'zarr', 'ffcv', 'timm', 'numba'} & set(sys.modules)), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "[]\n", done.stderr


def test_stdout_is_clean(tmp_path, image_folder):
    """Working commands print nothing on stdout, so that it can be piped."""
    assert extract_to(tmp_path / "c", image_folder).stdout == ""


def test_resuming_needs_space_for_the_rest_only(tmp_path, image_folder, monkeypatch, teacher):
    """A half-made cache goes on where the disk has room for what is left, by a command that says no more than the teacher."""
    extract_to(tmp_path / "c", image_folder, "--shard-rows", 4)
    whole = run("extract", "--teacher", "fake", "--dry-run", tmp_path / "c").stderr
    assert "0 B needed" in whole
    store = tmp_path / "c" / "view-000" / "fake.zarr"
    files = np.load(store / "shards.npy")
    (store / "complete.json").unlink()
    (store / "commits").mkdir()
    for shard in range(5):
        Store.open(store).write_commit(shard, files[shard])
    left = shard_bytes(Store.open(store).spec, teacher.spec, 5)
    monkeypatch.setattr(space, "free_bytes", lambda path: left)
    assert run("extract", "--teacher", "fake", tmp_path / "c").exit_code == 0
    assert verify(Cache(tmp_path / "c"))[0] == []
