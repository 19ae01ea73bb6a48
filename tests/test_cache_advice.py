"""Commands in messages can be pasted: whatever a path is made of, a shell takes it for one word."""

from __future__ import annotations

import shlex
import shutil

import pytest
from click.testing import CliRunner
from fakes import FakeTeacher

from pipelines.feed.complete_views import complete_views
from student.cli.report import report
from student.cli.train import train
from teacher_cache import teachers
from teacher_cache.cache import Cache
from teacher_cache.cli.main import main
from teacher_cache.errors import NotInCacheError


@pytest.fixture(autouse=True)
def fake_teacher(monkeypatch):
    monkeypatch.setattr(teachers, "load_teacher", lambda name, *rest: FakeTeacher())


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "with blank & it's"
    folder.mkdir()
    return folder


def run(command, *arguments) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def commands_in(text: str) -> list[list[str]]:
    """The words of every command that stands in a text, as a shell takes them."""
    words, found = shlex.split(text.replace("\n", " ; ")), []
    for word in words:
        if word.rstrip(";") in ("teacher-cache", "student-train", "student-report", "student-eval"):
            found.append([])
        if found:
            found[-1].append(word.rstrip(";"))
    return found


def named(text: str, begin: str, cache) -> bool:
    """Whether a text suggests a command that begins so and names the cache as one word."""
    text = text[text.index(begin) :].replace("(or --json)", "")
    return any(str(cache) in words for words in commands_in(text.splitlines()[0]))


def test_flows_in_a_folder_with_blanks(place, image_folder):
    """From crops to a report, what is suggested next names the cache as one word."""
    cache = place / "my cache"
    small = ["--layers", "last", "--batch-size", 8]
    said = run(main, "crop", "--images", image_folder, "--crop-size", 32, cache)
    assert named(said, "teacher-cache extract --teacher NAME", cache)
    assert named(run(main, "show", cache), "teacher-cache extract --teacher NAME", cache)
    assert named(run(main, "extract", "--teacher", "fake", *small, "--views", 2, "--shards", "0:1", cache),
                 "teacher-cache crop --images DIR", cache)  # fmt: skip
    said = run(train, "--cache", cache, "--preset", "maskalign-b16", "--out", place / "run")
    assert named(said, "teacher-cache extract --teacher clip-b16 --weights PATH", cache)
    said = run(main, "extract", "--teacher", "fake", *small, cache)
    assert named(said, "teacher-cache inspect", cache) and named(said, "student-train --cache", cache)
    assert named(run(main, "crop", "--repair", "--dry-run", cache), "teacher-cache verify", cache)
    assert named(run(report, place / "run"), "student-report", place / "run")
    verified = place / "verify out.json"
    assert named(run(main, "report", "--verified", verified, "-o", place / "a.html", cache), "teacher-cache verify", cache)


def test_what_mends_a_cache_in_a_folder_with_blanks(place, shared_cache):
    """What verify and the readers suggest for a cache that is damaged or lacks something names it as one word."""
    path = shutil.copytree(shared_cache.path, place / "my cache")
    for words in (lambda: complete_views(Cache(path), ["fake"], 3), lambda: complete_views(Cache(path), ["other"], 1)):
        with pytest.raises(NotInCacheError) as caught:
            words()
        assert named(str(caught.value).split("; or")[0], "teacher-cache", path)
    (path / "view-000" / "crops.beton").unlink()
    assert named(run(main, "verify", path), "teacher-cache crop --repair", path)
    assert named(run(main, "show", "--teacher", "fake", path), "teacher-cache crop --repair", path)
    (path / "cache.json").unlink()
    assert named(run(main, "inspect", path), "teacher-cache crop --repair", path)
