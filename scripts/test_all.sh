#!/usr/bin/env bash
# The test suite on every Python that is installed (all_pythons, or PYTHONS="..."), each in an environment of its own, .venv-3.N.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/pythons.sh

read -ra pythons <<<"${PYTHONS:-$(all_pythons | tr '\n' ' ')}"
((${#pythons[@]})) || { echo "No Python 3.11, 3.12 or 3.13 runs here; set PYTHONS=\"/path/to/python3.12 ...\"." >&2; exit 1; }
failed=()
for python in "${pythons[@]}"; do
    runs "$python" || { echo "PYTHONS: $python does not run, is not 3.11, 3.12 or 3.13, or lacks venv or Python.h." >&2; exit 1; }
    number=$(version "$python")
    PYTHON=$python VENV=.venv-$number bash scripts/setup.sh
    echo "== Python $number"
    ".venv-$number/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile || failed+=("$number")
done
if ((${#failed[@]})); then
    echo "Failed on Python ${failed[*]}." >&2
    exit 1
fi
