"""The rooms and the arrows between them (docs/design/0001), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from teacher_cache.format import layout

ROOT = Path(__file__).parents[1]
PACKAGES = {"teacher_cache": [], "student": [], "pipelines": ["teacher_cache", "student"]}
"""Package -> the other packages that it may import."""
ROOMS = {
    "teacher_cache": ["errors", "words", "files", "terminal", "device", "format", "kernels", "store", "crops", "cache",
                      "teachers", "encoding", "extraction", "sharing", "checking", "estimating", "inspecting"],
    "student": ["errors", "seeds", "config", "batch", "devices", "masking", "modules", "files", "loggers", "exports", "run",
                 "evals"],
    "pipelines": ["feed", "presets", "pages", "demo", "study"],
}  # fmt: skip
"""Package -> its rooms, folders and modules, from the lowest: a room imports from those before it. Beside them, programs."""
APART = [("teacher_cache.store", "teacher_cache.crops")]
"""Rooms of which neither knows the other."""
TORCH_ROOMS = (
    "extraction.extract",
    "encoding.encode",
    "encoding.klt_encode",
    "encoding.klt_fit",
    "extraction.probe",
    "extraction.recode",
    "estimating.trial",
    "device",
    "teachers",
)
MAY_IMPORT_TORCH = tuple(f"teacher_cache.{name}" for name in TORCH_ROOMS)
"""In the package of the format; everything else there works where torch is not installed."""
BASE = ("teacher_cache.errors", *(f"teacher_cache.files.{name}" for name in ("claims", "claim_file", "guard", "durable")))
"""How files are written and who may write them is one thing for a cache and for a run: all that student may know of a cache."""
MAY_SPELL = (
    "teacher_cache.files.claims", "teacher_cache.files.range_claims", "teacher_cache.files.guard", "student.files.run_directory",
)  # fmt: skip
"""Below the format, or apart from it: what they know of the names of files in a cache they say themselves."""
MOST_LINES, MOST_MODULES = 450, 14
"""Of a module; of a folder, `__init__.py` not counted."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imports_of(path: Path) -> set[str]:
    """Absolute names of all that a file imports, at the top or anywhere inside; of `from a import b` both a and a.b."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


IMPORTS = {module_name(path): imports_of(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
EDGE = {module for module in IMPORTS if module.endswith(".__main__") or "cli" in module.split(".")}
"""Programs: the commands, and the demo, which runs commands. They may import from every room."""
MAKES_A_TEACHER = {"pipelines.demo.train_teacher", "pipelines.study.pretrain"}


def violations(modules, *forbidden: str) -> list[str]:
    return [f"{m} imports {name}" for m in sorted(modules) for name in sorted(IMPORTS[m]) if is_in(name, *forbidden)]


def test_the_walk_sees_what_it_should():
    """Imports inside functions, relative ones and those of submodules are all seen; the edges and all rooms are there."""
    assert is_in("teacher_cache.kernels.loops", *IMPORTS["teacher_cache.store.reader"])  # inside a function
    assert "student.batch" in IMPORTS["student.masking.masker"]  # relative, two dots
    assert "pipelines.presets.recipe" in IMPORTS["pipelines.presets"]  # from a package's __init__
    assert {"teacher_cache.cli.main", "student.cli.train"} <= EDGE
    assert violations(["teacher_cache.cli.show"], "pipelines")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_along_the_arrows(package):
    """teacher_cache knows no other package, student of that one the base alone, pipelines both; only a program may know all."""
    others = set(PACKAGES) - {package, *PACKAGES[package]}
    allowed = ("teacher_cache", "teacher_cache.files", *BASE) if package == "student" else ()  # `from a import b` names both
    modules = [m for m in IMPORTS if is_in(m, package) and m not in EDGE]
    assert [(m, name) for m in modules for name in IMPORTS[m] if is_in(name, *others) and not is_base(name, allowed)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_downwards(package):
    """Every module of a package is in a room or a program, and a room imports from the rooms below it alone."""
    rooms = [f"{package}.{room}" for room in ROOMS[package]]

    def height(module: str) -> int | None:
        return next((place for place, room in enumerate(rooms) if is_in(module, room)), None)

    modules = [m for m in IMPORTS if is_in(m, package) and m != package and m not in EDGE]
    assert [m for m in modules if height(m) is None] == []
    upwards = [(m, name) for m in modules for name in IMPORTS[m] if (there := height(name)) is not None and there > height(m)]
    assert upwards == []


@pytest.mark.parametrize(("one", "other"), APART)
def test_rooms_beside_each_other(one, other):
    """What is kept of a teacher and what is kept of the images know nothing of each other."""
    assert violations([m for m in IMPORTS if is_in(m, one)], other) == []
    assert violations([m for m in IMPORTS if is_in(m, other)], one) == []


def test_rooms_stay_small():
    """No module grows beyond what is read in one go, and no folder beyond what is seen at one look."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert {str(path): n for path in files if (n := len(path.read_text().splitlines())) > MOST_LINES} == {}
    folders = Counter(path.parent for path in files if path.name != "__init__.py")
    assert {str(folder): n for folder, n in folders.items() if n > MOST_MODULES} == {}


def test_names_of_files_stand_in_one_place():
    """Only layout.py spells the names of a cache's files; student knows one, to refuse a cache as a folder for a run."""
    named = (value for key, value in vars(layout).items() if key.isupper())
    names = {value for value in named if isinstance(value, str) and "." in value}
    assert {"cache.json", "store.json", "crops.beton", "*.zarr", ".claim"} <= names | {*layout.LISTS}
    spelled = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        if module_name(path) not in {"teacher_cache.format.layout", *MAY_SPELL}:
            words = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            spelled += [(module_name(path), word) for word in words if word in names]
    assert spelled == []


def is_base(name: str, allowed: tuple[str, ...]) -> bool:
    return name in allowed or is_in(name, *(module for module in allowed if module in BASE))


def test_the_base_stands_alone():
    """What student may know of a cache imports nothing else of this project, and no torch."""
    found = {name for module in BASE for name in IMPORTS[module] if is_in(name, *PACKAGES)}
    assert {name for name in found if not is_in(name, *BASE)} <= {"teacher_cache", "teacher_cache.files"}
    assert violations(BASE, "torch") == []


def test_nothing_imports_the_edge():
    """A program is where the arrows begin: no module knows one."""
    assert violations(IMPORTS.keys() - EDGE, *EDGE) == []


def test_the_format_needs_no_torch():
    """Of teacher_cache, only the device, extraction and the teachers import torch or what needs it."""
    free = [m for m in IMPORTS if is_in(m, "teacher_cache") and not is_in(m, *MAY_IMPORT_TORCH)]
    assert {"teacher_cache.store.reader", "teacher_cache.store.manifest", "teacher_cache.checking.verify"} <= set(free)
    assert violations(free, "torch", "torchvision", "timm", "open_clip") == []


def test_teachers_stay_in_their_room():
    """pipelines and student are handed a teacher or its targets, and load none; open_clip is known to teachers alone."""
    modules = [m for m in IMPORTS if is_in(m, "pipelines", "student") and m not in EDGE | MAKES_A_TEACHER]
    assert violations(modules, "teacher_cache.teachers", "open_clip") == []
    assert violations([m for m in IMPORTS if not is_in(m, "teacher_cache.teachers")], "open_clip") == []


def test_what_is_loaded_at_run_time():
    """Looking into a cache, and at the presets, loads neither torch nor zarr; training no teacher, open_clip or logger."""
    code = """
import sys
from click.testing import CliRunner
from student.cli.train import train
for asked in ["--list"], ["--show"], ["--show", "--rates"]:
    assert "numpy" not in sys.modules, "words need no numbers"
    assert CliRunner().invoke(train, ["--preset", "maskalign-b16", *asked]).exit_code == 0
import teacher_cache.inspecting.inspect, teacher_cache.cache, teacher_cache.checking.verify
assert not {"torch", "zarr", "numba", "ffcv"} & set(sys.modules), "inspect, verify, --list and --show"
import pipelines.feed.cached_source, pipelines.presets, student.run.trainer
assert {"torch", "timm", "ffcv"} <= set(sys.modules), "this test looks at the wrong modules"
assert not {"tensorboard", "wandb", "mlflow"} & set(sys.modules), "loggers that nobody asked for"
print([name for name in sys.modules if name.startswith(("teacher_cache.teachers", "open_clip"))])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
