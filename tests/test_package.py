"""What is installed: the wheel holds all that runs, and runs outside the checkout; the core alone says what it lacks."""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from teacher_cache.terminal.extras import BROUGHT_BY, TAKEN_BY, extras_for, install_command

ROOT = Path(__file__).parents[1]
PACKAGES = ("teacher_cache", "student", "pipelines")
CORE = {"click", "google_crc32c", "numcodecs", "numpy", "PIL", "rich"}
"""Modules that are there however little is installed."""
DISTRIBUTIONS = {"PIL": "pillow", "google_crc32c": "google-crc32c", "open_clip": "open_clip_torch", "sklearn": "scikit-learn",
                 "llvmlite": "numba", "huggingface_hub": "timm",
    "markupsafe": "jinja2"}  # fmt: skip
"""Module -> what brings it, where the names differ."""
GOLDEN = ROOT / "tests" / "golden" / "cache_v3"


def requirements(extra: str | None = None) -> dict[str, str]:
    """Name -> the whole line, of what setup.cfg asks for: an extra's, or the core's."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = config["options"]["install_requires"] if extra is None else config["options.extras_require"][extra]
    return {re.split(r"[ =<>;]", line, maxsplit=1)[0]: line for line in text.split("\n") if line}


def outside() -> set[str]:
    """Top-level modules of other people that the three packages import, at the top or inside functions."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def run(code: str, *words: str, path: Path = ROOT, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, env=environment)


def script(name: str, path: Path = ROOT) -> str:
    """What the console script `name` runs."""
    config = configparser.ConfigParser()
    config.read_string((path / "setup.cfg").read_text())
    module, _, function = dict(
        map(str.strip, line.split("=")) for line in config["options.entry_points"]["console_scripts"].split("\n") if line
    )[name].partition(":")
    return f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; {function}()"


def without_extras(name: str, *words: str) -> subprocess.CompletedProcess:
    """A command where nothing that an extra brings can be imported."""
    return run(f"import sys; sys.modules.update(dict.fromkeys({sorted(BROUGHT_BY)})); {script(name)}", *words)


def test_everything_imported_is_asked_for():
    """What the packages import is in the core, or extras.py knows the extra that brings it, and setup.cfg has it there."""
    assert outside() <= CORE | BROUGHT_BY.keys()
    assert {DISTRIBUTIONS.get(module, module) for module in CORE} == requirements().keys()
    for module, extras in BROUGHT_BY.items():
        for extra in extras:
            assert DISTRIBUTIONS.get(module, module) in requirements(extra), (module, extra)
    everything = requirements("all").keys()
    assert {"torch", "torchvision", "timm", "open_clip_torch", "zarr", "ffcv"} <= everything
    assert all(requirements(extra).keys() <= everything for extra in ("teachers", "train", "pages"))
    assert everything <= requirements("dev").keys()
    assert requirements("train")["ffcv"] == "ffcv == 1.0.2"


def test_extras_are_named_together():
    """A command that takes several extras names all of them at once; one that takes none names what brings the module."""
    assert extras_for("torch", "extract") == ("teachers",)
    assert extras_for("torch.nn", "train") == ("train",)
    assert extras_for("jinja2", "report") == extras_for("torch", "report") == ("pages", "train")
    assert extras_for("open_clip", "train") == ("teachers",)
    assert extras_for("tomllib") == ()
    assert install_command(("pages", "train")) == "pip install 'teacher-cache[pages,train]'"
    assert set().union(*TAKEN_BY.values(), *BROUGHT_BY.values()) <= {
        *("teachers", "train", "pages", "evals", "ray", "demo", "all", "tensorboard", "wandb", "mlflow", "log"),
    }


def test_the_core_lists_and_inspects():
    """Commands of the core need nothing that an extra brings."""
    for name, words in (("teacher-cache", ["teachers"]), ("teacher-cache", ["inspect", str(GOLDEN)]),
                        ("student-train", ["--list"])):  # fmt: skip
        done = without_extras(name, *words)
        assert done.returncode == 0 and done.stdout, done.stderr


HELP = """
import sys
sys.modules.update(dict.fromkeys({blocked}))
import click
from teacher_cache.terminal import signals
programs = []
signals.run_program = lambda load: programs.append(load())
import student.__main__ as student, teacher_cache.__main__ as teacher_cache
for program in (teacher_cache.main, student.train, student.evaluate, student.report):
    program()
for program in programs:
    for name, command in {{program.name: program, **getattr(program, "commands", {{}})}}.items():
        text = command.get_help(click.Context(command, info_name=name))
        assert text.startswith("Usage: ") and "Example:" in text, name
        print(name)
"""


def test_every_help_is_of_the_core():
    done = run(HELP.format(blocked=sorted(BROUGHT_BY)))
    assert done.returncode == 0, done.stderr
    assert {"crop", "extract", "estimate", "inspect", "show", "report", "verify", "teachers", "knn", "train"} <= set(
        done.stdout.split()
    )


def test_verify_without_the_decoder_says_so():
    """All checks but one are made; that one, and what installs it, is told in words and in JSON."""
    told = "which needs FFCV: pip install 'teacher-cache[train]'"
    done = without_extras("teacher-cache", "verify", str(GOLDEN))
    assert done.returncode == 0 and "sound and complete" in done.stdout, done.stderr
    assert told in done.stdout
    done = without_extras("teacher-cache", "verify", "--json", str(GOLDEN))
    not_made = json.loads(done.stdout)["not_made"]
    assert list(not_made) == ["view-000/crops.beton"] and not_made["view-000/crops.beton"].endswith(told)


def test_verify_without_the_decoder_finds_damage(tmp_path):
    cache = shutil.copytree(GOLDEN, tmp_path / "cache")
    beton = bytearray((cache / "view-000" / "crops.beton").read_bytes())
    beton[len(beton) // 2] ^= 1
    (cache / "view-000" / "crops.beton").write_bytes(beton)
    done = without_extras("teacher-cache", "verify", str(cache))
    assert done.returncode == 1 and "damaged" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "words", "who", "extras"),
    [
        ("student-train", ["--preset", "mae-s16", "--cache", str(GOLDEN), "--out", "run"], "student-train", "train"),
        ("student-eval", ["knn", "run", "--train", "a", "--val", "b"], "student-eval knn", "train"),
        ("student-export", ["run", "-o", "a.pth", "--format", "torch"], "student-export", "train"),
        ("student-eval", ["logreg", "run", "--train", "a", "--val", "b"], "student-eval logreg", "evals,train"),
        ("student-eval", ["segment", "run", "--train", "a", "--val", "b"], "student-eval segment", "evals,train"),
        ("student-report", ["run", "-o", "run.html"], "student-report", "pages,train"),
        ("teacher-cache", ["extract", "--teacher", "demo", "new"], "teacher-cache extract", "teachers"),
        ("teacher-cache", ["show", str(GOLDEN)], "teacher-cache show", "pages,train"),
        ("teacher-cache", ["report", str(GOLDEN)], "teacher-cache report", "pages,train"),
        ("teacher-cache", ["verify", "--teacher", "plain", "--weights", "random:0", str(GOLDEN)], "teacher-cache verify",
         "teachers"),
    ],
)  # fmt: skip
def test_what_needs_an_extra_names_it(name, words, who, extras):
    """One sentence with the command that installs it, exit code 2, no traceback."""
    done = without_extras(name, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"Error: {who} needs \w+, which is not installed: pip install 'teacher-cache\[{extras}\]'\n", done.stderr
    ), done.stderr


def test_crops_are_not_begun_without_the_decoder(tmp_path, image_folder):
    """It is needed last; that it is missing is said before hours of cutting."""
    done = without_extras("teacher-cache", "crop", "--images", str(image_folder), str(tmp_path / "cache"))
    assert done.returncode == 2 and "pip install 'teacher-cache[train]'" in done.stderr, done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the checkout, unpacked. Built from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    source, built, unpacked = (tmp_path_factory.mktemp(name) for name in ("source", "built", "unpacked"))
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(built)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_the_wheel_holds_every_file(wheel):
    """Every module, template, weight and card of the three packages, and nothing else but its own facts."""
    there = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in there if ".dist-info/" not in name} == expected
    assert {"pipelines/pages/base.html", "teacher_cache/teachers/demo_teacher.safetensors", "student/py.typed",
            "teacher_cache/teachers/demo_teacher.md"} <= expected  # fmt: skip


def test_the_wheel_tells_of_itself(wheel):
    facts = next(wheel.glob("*.dist-info"))
    metadata = (facts / "METADATA").read_text()
    assert "\nLicense: Apache-2.0\n" in metadata and "\nRequires-Python: >=3.11\n" in metadata
    assert {"teachers", "train", "pages", "all"} <= set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE))
    assert (facts / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "Apache-2.0" in (wheel / "teacher_cache" / "teachers" / "demo_teacher.md").read_text()
    names = re.findall(r"^(\S+) = ", (facts / "entry_points.txt").read_text(), re.MULTILINE)
    assert sorted(names) == ["student-eval", "student-export", "student-report", "student-train", "teacher-cache"]


@pytest.mark.parametrize(("name", "words"), [("teacher-cache", ["teachers"]), ("student-train", ["--list"])])
def test_the_wheel_runs_outside_the_checkout(wheel, tmp_path, name, words):
    where = f"import atexit, sys; {script(name)[len('import sys; ') :]}"
    shown = "import teacher_cache; print(teacher_cache.__file__); "
    done = run(shown + where, *words, path=wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert Path(first).is_relative_to(wheel) and len(rest) > 10


def test_the_demo_teacher_runs_from_the_wheel(wheel, tmp_path):
    """Its weights and the templates of the pages are found beside the code."""
    code = """
import jinja2
from pipelines.pages import page
from teacher_cache.teachers import load_teacher
print(load_teacher("demo").spec.weights, page.__file__)
"""
    done = run(code, path=wheel, cwd=tmp_path)
    assert done.returncode == 0 and str(wheel) in done.stdout, done.stderr


def test_public_names_are_checked_by_mypy():
    """The modules that public names come from are among those whose signatures `make check` looks at."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    checked = {module for part in overrides if part.get("disallow_incomplete_defs") for module in part["module"]}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            home = getattr(getattr(module, name), "__module__", package)
            assert home.partition(".")[0] not in PACKAGES or home in checked, f"{package}.{name} is of {home}"
