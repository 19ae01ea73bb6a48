"""Compiled loops are kept where only their user can write, and compiled where they cannot be kept."""

from __future__ import annotations

import os
import shutil
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


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where a first process has kept what it compiled; made once, for compiling takes seconds."""
    path = tmp_path_factory.mktemp("home")
    assert run(path) == (0, "")
    return path


def test_compiled_once_a_machine(home):
    """The second process compiles nothing, and nobody else may write where the machine code lies."""
    assert run(home) == (1, "")
    folders = [path for path in (home / "teacher-cache").glob("**") if path.is_dir()][:3]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700} and len(folders) == 3


DAMAGES = {"empty": lambda data: b"", "cut short": lambda data: data[: len(data) // 2], "zeros": lambda data: b"\0" * len(data)}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
def test_what_a_power_cut_left_is_compiled_anew(tmp_path, home, kind, damage):
    """Files that are empty, cut short or zero are made again, in silence: afterwards they are there as before."""
    copied = shutil.copytree(home, tmp_path / "home")
    (file,) = copied.glob(f"teacher-cache/kernels/*/*/{kind}")
    n_bytes = file.stat().st_size
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert run(copied) == (0, "")
    (file,) = copied.glob(f"teacher-cache/kernels/*/*/{kind}")
    assert file.stat().st_size == n_bytes and file.read_bytes() != bytes(n_bytes)


@pytest.mark.parametrize("what", ["a file", "open to others", "a link"])
def test_without_a_folder_of_its_own(tmp_path, home, what):
    """Where there can be no safe folder nothing is kept or read, the loops work, and one line says so."""
    folder = tmp_path / "home" / "teacher-cache"
    folder.parent.mkdir()
    if what == "a file":
        folder.write_text("")
    elif what == "a link":
        folder.symlink_to(home / "teacher-cache")
    else:
        shutil.copytree(home / "teacher-cache", folder)
        folder.chmod(0o755)
    hits, said = run(tmp_path / "home")
    assert hits == 0 and len(said.splitlines()) == 1 and str(folder) in said and "XDG_CACHE_HOME" in said


ON_ONE_PROCESSOR = """
import os, threading; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np; from teacher_cache.kernels import loops
none = [np.zeros(0, kind) for kind in ("uint64", "uint64", "uint32")]
def decode():
    loops.decode_rows(np.zeros(0, "int64"), np.zeros((0, 8, 8, 3), "uint8"), np.uint64(0), *none, True, np.zeros(0, "int64"))
"""


@pytest.mark.parametrize("code", [
    "thread = threading.Thread(target=decode); thread.start(); thread.join()",
    "decode(); child = os.fork(); child or (decode(), os._exit(0)); raise SystemExit(os.waitpid(child, 0)[1])",
], ids=["thread", "fork"])  # fmt: skip
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_process_with_one_processor_ends(code, threads):
    """Where crops were decoded in a thread that has ended, or are decoded by a process that was forked from one that has decoded
    some, on one processor, the process ends all the same, and well."""
    process = subprocess.Popen([sys.executable, "-c", ON_ONE_PROCESSOR + code], env={**os.environ, "NUMBA_NUM_THREADS": threads})
    try:
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
