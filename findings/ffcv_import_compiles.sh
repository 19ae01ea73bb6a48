#!/usr/bin/env bash
# Importing FFCV compiles half a hundred functions, for a table of two words
#
# Versions   ffcv 1.0.2, numba 0.68.1, torch 2.15.0, Python 3.11.
# Guess      FFCV compiles its pipeline when a Loader is made; importing it costs what torch and numba cost, and compiles nothing.
# Seen       `import ffcv` compiles 53 functions (5 to 7 s of CPU beside a busy program, more than torch and numba together):
#            ffcv/fields/rgb_image.py fills a numba.typed.Dict, {'jpg': 0, 'raw': 1}, when it is imported. Its decoders look the
#            two numbers up in Python, before they compile: a plain dict would do.
# Bites      whoever starts many short processes that import ffcv: tests, sweeps, workers that are spawned.
#
# Exits with 1 if this is no longer so. FFCV is built from source: needs libopencv-dev, libturbojpeg0-dev, pkg-config and a compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check ffcv==1.0.2 numba==0.68.1 torch==2.15.0 opencv-python-headless pillow
"$work/venv/bin/python" - <<'PYTHON'
import time

import numba.typed
import torch
from numba.core import event

before = time.process_time()
with event.install_recorder("numba:compile") as recorder:
    import ffcv.fields.rgb_image as rgb_image
n_compiled = sum(entry.is_start for _, entry in recorder.buffer)
print(f"import ffcv: {n_compiled} functions compiled, {time.process_time() - before:.1f} s of CPU beyond torch and numba")
print(f"IMAGE_MODES is a {type(rgb_image.IMAGE_MODES).__module__}.{type(rgb_image.IMAGE_MODES).__name__}: {dict(rgb_image.IMAGE_MODES)}")
is_typed = isinstance(rgb_image.IMAGE_MODES, numba.typed.Dict)
raise SystemExit(0 if is_typed and n_compiled >= 40 else "no longer as seen")
PYTHON
