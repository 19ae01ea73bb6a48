"""The rooms and the arrows between them (docs/design/0001), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"teacher_cache": [], "student": [], "pipelines": ["teacher_cache", "student"]}
"""Room -> the other rooms that it may import."""
MAY_IMPORT_TORCH = tuple(f"teacher_cache.{name}" for name in ("extract", "encode", "trial", "device", "compiled", "teachers"))
"""In the room of the format; everything else there works where torch is not installed."""
BASE = tuple(f"teacher_cache.{name}" for name in ("claims", "claim_file", "guard", "durable", "errors"))
"""How files are written and who may write them is one thing for a cache and for a run: all that student may know of a cache."""


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


IMPORTS = {module_name(path): imports_of(path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
EDGE = {module for module in IMPORTS if module.endswith((".cli", ".__main__"))}
"""Programs: the commands, and the demo, which runs commands. They may import from every room."""
MAKES_A_TEACHER = "pipelines.demo.train_teacher"


def violations(modules, *forbidden: str) -> list[str]:
    return [f"{m} imports {name}" for m in sorted(modules) for name in sorted(IMPORTS[m]) if is_in(name, *forbidden)]


def test_the_walk_sees_what_it_should():
    """Imports inside functions, relative ones and those of submodules are all seen; the edges and all rooms are there."""
    assert is_in("teacher_cache.compiled", *IMPORTS["teacher_cache.reader"])  # inside a function
    assert "student.batch" in IMPORTS["student.masking"]  # relative
    assert "pipelines.recipe" in IMPORTS["pipelines.presets"]  # from a package's __init__, two dots
    assert {"teacher_cache.cli", "student.cli"} <= EDGE
    assert violations(["teacher_cache.cli"], "pipelines")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_along_the_arrows(room):
    """teacher_cache knows no other room, student of that one the base alone, pipelines both; only a program may know all."""
    others = set(ROOMS) - {room, *ROOMS[room]}
    allowed = ("teacher_cache", *BASE) if room == "student" else ()  # `from teacher_cache import guard` names both
    modules = [m for m in IMPORTS if is_in(m, room) and m not in EDGE]
    assert [(m, name) for m in modules for name in IMPORTS[m] if is_in(name, *others) and not is_base(name, allowed)] == []


def is_base(name: str, allowed: tuple[str, ...]) -> bool:
    return name in allowed or is_in(name, *(module for module in allowed if module in BASE))


def test_the_base_stands_alone():
    """What student may know of a cache imports nothing else of this project, and no torch."""
    found = {name for module in BASE for name in IMPORTS[module] if is_in(name, *ROOMS)}
    assert {name for name in found if not is_in(name, *BASE)} <= {"teacher_cache"}
    assert violations(BASE, "torch") == []


def test_nothing_imports_the_edge():
    """A program is where the arrows begin: no module knows one."""
    assert violations(IMPORTS.keys() - EDGE, *EDGE) == []


def test_the_format_needs_no_torch():
    """Of teacher_cache, only the compiled loops, the device, extraction and the teachers import torch or what needs it."""
    free = [m for m in IMPORTS if is_in(m, "teacher_cache") and not is_in(m, *MAY_IMPORT_TORCH)]
    assert {"teacher_cache.reader", "teacher_cache.store", "teacher_cache.verify"} <= set(free)
    assert violations(free, "torch", "torchvision", "timm", "open_clip") == []


def test_teachers_stay_in_their_room():
    """pipelines and student are handed a teacher or its targets, and load none; open_clip is known to teachers alone."""
    modules = [m for m in IMPORTS if is_in(m, "pipelines", "student") and m not in EDGE | {MAKES_A_TEACHER}]
    assert violations(modules, "teacher_cache.teachers", "open_clip") == []
    assert violations([m for m in IMPORTS if not is_in(m, "teacher_cache.teachers")], "open_clip") == []


def test_what_is_loaded_at_run_time():
    """Looking into a cache loads neither torch nor zarr; training from one loads no teacher and no open_clip."""
    code = """
import sys
import teacher_cache.inspect, teacher_cache.cache, teacher_cache.verify
assert not {"torch", "zarr", "numba", "ffcv"} & set(sys.modules), "inspect and verify"
import pipelines.source, pipelines.presets, student.trainer
assert {"torch", "timm", "ffcv"} <= set(sys.modules), "this test looks at the wrong modules"
print([name for name in sys.modules if name.startswith(("teacher_cache.teachers", "open_clip"))])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
