#!/usr/bin/env bash
# Set up .venv with everything the project needs. Run by make; safe to run again: what is there is not installed twice.
set -euo pipefail
cd "$(dirname "$0")/.."

# FFCV is compiled against the system's OpenCV and libjpeg-turbo.
packages=(libopencv-dev libturbojpeg0-dev pkg-config g++ python3-dev python3-venv)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
    sudo=()
    [[ $EUID -eq 0 ]] || sudo=(sudo -n)
    echo "Installing system packages: ${missing[*]}"
    if ! { command -v apt-get >/dev/null \
        && "${sudo[@]}" apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }; then
        echo "These system packages are needed and could not be installed by apt-get: ${missing[*]}" >&2
        echo "Install them (Debian 12 names; elsewhere the OpenCV and libjpeg-turbo headers, pkg-config, a C++ compiler)," >&2
        echo "then run make again." >&2
        exit 1
    fi
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python=python3.11
    command -v "$python" >/dev/null || { echo "Python 3.11 is needed; set PYTHON=/path/to/python3.11 and run make again." >&2; exit 1; }
fi

# uv comes from PyPI, into an environment of its own, so that .venv holds the project alone.
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
[[ -x .venv/uv/bin/uv ]] || { "$python" -m venv .venv/uv && .venv/uv/bin/python -m pip install -q uv; }
echo "Installing Python packages into .venv"
.venv/uv/bin/uv pip install -q --python .venv/bin/python -c constraints.txt -e '.[dev]'
touch .venv/.ready
