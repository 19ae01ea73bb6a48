#!/usr/bin/env bash
# Two processes that save to numba's cache at once can leave an index that hands out one signature's machine code for the other
#
# Versions   numba 0.68.1, Python 3.11.
# Guess      Index and data files are each written aside and renamed, so at worst an entry is lost and compiled again.
# Seen       True of each file, not of the pair. Both savers read the index before either has written it, and both choose the
#            name `.1` for their data. Whoever renames the index last is in it; whoever renames the data last is what it names.
#            Where these are two different processes, a reader that asks for the one signature gets the other's code. Nothing in
#            the data says whose it is, and nothing repairs it. With the same signature twice it is harmless.
# Bites      `cache=True` where many processes start on a fresh machine and one function is called with several signatures:
#            workers of a loader, a node of a cluster. A lock around saving is enough.
#
# Exits with 1 if this is no longer so. Plain strings stand for machine code; the order of the two savers is fixed by hand.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check numba==0.68.1
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

from numba.core.caching import IndexDataCacheFile


def saver(folder: Path) -> IndexDataCacheFile:
    return IndexDataCacheFile(str(folder), "function", "stamp")


def found(folder: Path) -> dict:
    return {key: saver(folder).load(key) for key in ("int64", "float64")}


def overlapping(folder: Path, data_last: str) -> dict:
    """Both have chosen a name; then float64 renames its index last, and `data_last` its data."""
    folder.mkdir()
    first, second, waiting = saver(folder), saver(folder), []
    rename_index, rename_data = second._save_index, second._save_data

    def index(overloads):
        if data_last == "int64":  # its data comes behind both
            put, first._save_data = first._save_data, lambda *given: waiting.append((put, given))
        first.save("int64", "code for int64")
        rename_index(overloads)

    second._save_index, second._save_data = index, rename_data
    second.save("float64", "code for float64")
    for put, given in waiting:
        put(*given)
    return found(folder)


one_after_the_other = Path(sys.argv[1]) / "a"
one_after_the_other.mkdir()
for key in ("int64", "float64"):
    saver(one_after_the_other).save(key, f"code for {key}")
seen = [found(one_after_the_other), overlapping(Path(sys.argv[1]) / "b", "float64"), overlapping(Path(sys.argv[1]) / "c", "int64")]
for what, values in zip(("one after the other", "overlapping", "overlapping, the other's data last"), seen):
    print(f"{what}: {values}")
wanted = [
    {"int64": "code for int64", "float64": "code for float64"},
    {"int64": None, "float64": "code for float64"},
    {"int64": None, "float64": "code for int64"},
]
raise SystemExit(0 if seen == wanted else "no longer as seen")
PYTHON
