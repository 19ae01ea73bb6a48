"""Compiled loops are kept where only their user can write, and compiled where they cannot be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import sys
import numpy as np
from teacher_cache.kernels import loops
data = np.frombuffer(b"123456789", "u1")
assert loops.crc32c_at(np.uint64(data.ctypes.data), np.uint64(9)) == 0xE3069283
assert not {"torch", "ffcv", "zarr"} & set(sys.modules)
print(sum(loops.crc32c_at.stats.cache_hits.values()))
"""


def run(cache_home: Path) -> tuple[int, str]:
    """How many functions a new process had not to compile, and what it said."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), done.stderr


def kept(cache_home: Path, pattern: str) -> list[Path]:
    return sorted(cache_home.glob(f"teacher-cache/kernels/*/*/{pattern}"))


def test_compiled_once_a_machine(tmp_path):
    """The second process compiles nothing, and nobody else may write where the machine code lies."""
    assert run(tmp_path / "home") == (0, "") and run(tmp_path / "home") == (1, "")
    folders = [path for path in (tmp_path / "home" / "teacher-cache").glob("**") if path.is_dir()][:3]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700} and len(folders) == 3


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\0" * len(data)])
@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
def test_what_a_power_cut_left_is_compiled_anew(tmp_path, kind, damage):
    """Files that are empty, cut short or zero are made again, in silence."""
    run(tmp_path)
    (file,) = kept(tmp_path, kind)
    file.write_bytes(damage(file.read_bytes()))
    assert run(tmp_path) == (0, "") and run(tmp_path) == (1, "")


@pytest.mark.parametrize("what", ["a file", "open to others", "a link"])
def test_without_a_folder_of_its_own(tmp_path, what):
    """Where there can be no safe folder nothing is kept or read, the loops work, and one line says so."""
    run(tmp_path / "other")
    folder = tmp_path / "home" / "teacher-cache"
    folder.parent.mkdir()
    if what == "a file":
        folder.write_text("")
    elif what == "a link":
        folder.symlink_to(tmp_path / "other" / "teacher-cache")
    else:
        (tmp_path / "other" / "teacher-cache").rename(folder)
        folder.chmod(0o755)
    hits, said = run(tmp_path / "home")
    assert hits == 0 and len(said.splitlines()) == 1 and str(folder) in said and "XDG_CACHE_HOME" in said
