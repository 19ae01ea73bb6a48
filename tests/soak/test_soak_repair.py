"""A file that is cut, lost, emptied or exchanged anywhere below a cache: verify finds it, --repair brings every byte back."""

from __future__ import annotations

import random
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cache_fakes import contents, crop_folder
from fakes import write_images
from forks import Command, run_forked, start_forked
from store_fakes import compress

from teacher_cache.checking.advice import mending_commands
from teacher_cache.checking.findings import Finding
from teacher_cache.checking.verify import verify_folder
from teacher_cache.extraction.extract import ExtractPlan, extract_view

STORES = {"int8": ExtractPlan("last2"), "zstd": ExtractPlan("last"), "half": ExtractPlan("last", dtype="float16")}
WAYS = {"cut": 2, "deleted": 0, "emptied": 1, "swapped": 0}
"""What may happen to a file, and how many bytes it must have for that."""


# --- damage ----------------------------------------------------------------------------------------------------------


def kind_of(file: Path, cache: Path) -> str:
    """What a file of a cache is: each kind is damaged equally often."""
    if is_shard(file):
        return "shard"
    if file.name in ("crops.beton", "spare.tar"):
        return file.name
    if file.parent.name == "commits":
        return "commit record"
    in_store = any(part.endswith(".zarr") for part in file.parts)
    return "small file of " + ("a store" if in_store else "the cache" if file.parent == cache else "a view")


def is_shard(file: Path) -> bool:
    return file.name.startswith("c.") and file.read_bytes()[:4] in (b"TCSH", b"")


def shard_of(file: Path, cache: Path) -> tuple[str, ...]:
    """View, store and number of the shard that a shard file or commit record belongs to; extraction makes it as one."""
    number = file.stem if file.suffix == ".json" else file.name.split(".")[1]
    return *file.relative_to(cache).parts[:2], str(int(number))


@dataclass(frozen=True)
class Damage:
    way: str
    kind: str
    files: tuple[Path, ...]
    """One, or the two that changed places."""


def damage(cache: Path, draw: random.Random) -> Damage:
    """Do something to a file below `cache`, both drawn."""
    way = draw.choice(list(WAYS))
    by_kind: dict[str, list[Path]] = {}
    for file in sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size >= WAYS[way]):
        by_kind.setdefault(kind_of(file, cache), []).append(file)
    if way == "swapped":
        first = draw.choice(by_kind["shard"])
        siblings = [file for file in first.parent.glob("c.*") if file != first]
        second = draw.choice(sorted(siblings) if siblings and draw.random() < 0.5 else by_kind["shard"])
        while second == first:
            second = draw.choice(by_kind["shard"])
        aside = first.with_name("aside")
        first.rename(aside), second.rename(first), aside.rename(second)
        return Damage(way, "shard", (first, second))
    kind = draw.choice(sorted(by_kind))
    file = draw.choice(by_kind[kind])
    if way == "deleted":
        file.unlink()
    else:
        with open(file, "r+b") as opened:
            opened.truncate(draw.randrange(1, file.stat().st_size) if way == "cut" else 0)
    return Damage(way, kind, (file,))


def relative(findings: list[Finding], cache: Path) -> set[Finding]:
    """Findings with paths relative to the cache, so that those of copies can be compared."""
    return {replace(finding, path=str(Path(finding.path).relative_to(cache))) for finding in findings}


def is_told(file: Path, findings: set[Finding]) -> bool:
    """Whether one of the findings is about `file`, or about something that it belongs to."""
    return any(file.is_relative_to(finding.path) for finding in findings if finding.path != ".")


# --- a cache of all kinds of files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(image_folder, teacher, tmp_path_factory) -> Path:
    """Two views with two complete stores each; view 0 has `half` besides, with commit records: 2 of its 3 shards."""
    cache = crop_folder(tmp_path_factory.mktemp("sound") / "c", image_folder, n_views=2)
    plans = {name: replace(plan, shard_rows=8, batch_size=5) for name, plan in STORES.items()}
    for view in cache.views():
        extract_view(view, "int8", teacher, plans["int8"])
        extract_view(view, "zstd", teacher, plans["zstd"])
    for view in cache.views():
        compress(view.store_path("zstd"))
    extract_view(cache.view(0), "half", teacher, plans["half"], range(2))
    return cache.path


@pytest.fixture(scope="module")
def found_before(sound) -> set[Finding]:
    """That `half` is not finished in one view, and not begun in the other."""
    findings = relative(verify_folder(sound)[0], sound)
    half = {("unfinished", f"view-00{view}/half.zarr") for view in (0, 1)}
    assert {(finding.kind, finding.path) for finding in findings} == half
    return findings


def repair_command(cache: Path, images: Path, store: str) -> str:
    return f"teacher-cache extract --repair --images {images} --teacher fake --name {store} --batch-size 5 --workers 1 {cache}"


@pytest.fixture(scope="module")
def expected(sound, image_folder, tmp_path_factory) -> dict[str, bytes]:
    """What a sound cache holds when `half` is finished too."""
    cache = shutil.copytree(sound, tmp_path_factory.mktemp("expected") / "c")
    run_forked(*shlex.split(repair_command(cache, image_folder, "half"))).says("nothing to mend", code=0)
    return contents(cache)


@pytest.mark.soak("a file cut, deleted, emptied, or two shards exchanged: `verify`, then `--repair`", full=200, short=10)
def test_found_and_mended(seed, sound, found_before, expected, image_folder, tmp_path, fell):
    """verify names all that is damaged; the commands that it advises bring every byte back, and make no other shard again."""
    cache, draw = shutil.copytree(sound, tmp_path / "c"), random.Random(seed)
    inode_of = {file: file.stat().st_ino for file in cache.rglob("c.*") if is_shard(file)}
    done = damage(cache, draw)
    fell(done.way)
    fell(done.kind)

    findings = verify_folder(cache)[0]
    news = relative(findings, cache) - found_before
    assert all(is_told(file.relative_to(cache), news) for file in done.files), (done, news)

    commands = mending_commands(cache, findings, str(image_folder))
    if draw.random() < 0.5:  # that of one store alone, which looks at all lists and crops
        hit = [store for store in STORES for file in done.files if f"{store}.zarr" in file.parts]
        commands = [repair_command(cache, image_folder, store) for store in sorted({*hit} or {draw.choice([*STORES])})]
    if not any("half" in command for command in commands):
        commands.append(repair_command(cache, image_folder, "half"))  # which is to be finished in any case
    for command in commands:
        run_forked(*shlex.split(command)).says(code=0)
    assert contents(cache) == expected, (done, commands)

    made_again = {shard_of(file, cache) for file, inode in inode_of.items() if file.stat().st_ino != inode}
    assert made_again <= {shard_of(file, cache) for file in done.files if done.kind in ("shard", "commit record")}, done


# --- the installed commands, a real teacher --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """Originals and a cache of the demo teacher."""
    images = write_images(tmp_path_factory.mktemp("images"))
    cache = tmp_path_factory.mktemp("made") / "c"
    run_forked("teacher-cache", "extract", "--teacher", "demo", "--preset", "maskalign-demo", "--views", 2, "--shard-rows", 8,
               "--images", images, cache).says(code=0)  # fmt: skip
    return images, cache


@pytest.mark.soak("the same with the demo teacher: the commands `verify` and `extract --repair`", full=10, short=1)
def test_commands(seed, made, full, tmp_path, fell):
    """verify ends with 1 and says what is damaged; extract --repair ends with 0, as then does verify, and all bytes are back."""
    images, cache = made[0], shutil.copytree(made[1], tmp_path / "c")
    done = damage(cache, random.Random(seed))
    fell(f"{done.way}, {done.kind}")
    start = Command if full else start_forked
    start("teacher-cache", "verify", cache).wait().says("damaged", code=1)
    start("teacher-cache", "extract", "--repair", "--teacher", "demo", "--images", images, cache).wait().says("mended", code=0)
    start("teacher-cache", "verify", cache).wait().says("sound and complete", code=0)
    assert contents(cache) == contents(made[1])
