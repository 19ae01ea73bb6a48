#!/usr/bin/env bash
# Set up .venv (or VENV=) with everything the project needs. Run by make; safe to run again: what is there is not installed twice.
# Python: PYTHON=, or else the newest of 3.13, 3.12 and 3.11 on PATH that runs.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/pythons.sh

# FFCV is compiled against the system's OpenCV and libjpeg-turbo.
packages=(libopencv-dev libturbojpeg0-dev pkg-config g++ python3-dev python3-venv)

is_there() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'install ok installed'; }

as_root() {
    if [[ $EUID -eq 0 ]]; then "$@"; else sudo -n "$@"; fi
}

install() { # PACKAGE...
    echo "Installing system packages: $*"
    command -v apt-get >/dev/null && as_root apt-get update -qq \
        && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

missing=()
for package in "${packages[@]}"; do
    is_there "$package" || missing+=("$package")
done
if ((${#missing[@]})) && ! install "${missing[@]}"; then
    echo "These system packages are needed and could not be installed by apt-get: ${missing[*]}" >&2
    echo "Install them (Debian 12 names; elsewhere the OpenCV and libjpeg-turbo headers, pkg-config, a C++ compiler)," >&2
    echo "then run make again." >&2
    exit 1
fi

# For the tests that open pages.
if ! command -v chromium chromium-browser google-chrome >/dev/null && ! install chromium; then
    echo "Chromium could not be installed by apt-get: the tests that open pages in a browser will be skipped." >&2
fi

venv=${VENV:-.venv}
if [[ ! -x $venv/bin/python ]]; then
    if [[ -n ${PYTHON:-} ]]; then
        python=$PYTHON
        runs "$python" || { echo "PYTHON=$python does not run, is not 3.11, 3.12 or 3.13, or lacks venv or Python.h." >&2; exit 1; }
    else
        python=$(newest_python) || { echo "Python 3.11, 3.12 or 3.13 is needed, with venv and Python.h (Debian: python3-venv and" \
            "python3-dev); set PYTHON=/path/to/python3.12 and run make again." >&2; exit 1; }
    fi
    "$python" -m venv "$venv"
elif [[ -n ${PYTHON:-} && $(version "$PYTHON") != "$(version "$venv/bin/python")" ]]; then
    echo "$venv is of Python $(version "$venv/bin/python"), PYTHON=$PYTHON is $(version "$PYTHON"). Remove $venv and run make again." >&2
    exit 1
fi

# uv comes from PyPI, into an environment of its own, so that the other one holds the project alone.
[[ -x $venv/uv/bin/uv ]] || { "$venv/bin/python" -m venv "$venv/uv" && "$venv/uv/bin/python" -m pip install -q uv; }
echo "Installing Python packages into $venv (Python $(version "$venv/bin/python"))"
"$venv/uv/bin/uv" pip install -q --compile-bytecode --python "$venv/bin/python" -c constraints.txt -e '.[dev]'
touch "$venv/.ready"
