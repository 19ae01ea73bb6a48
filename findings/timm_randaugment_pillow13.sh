#!/usr/bin/env bash
# The augmentation that most ViTs are fine-tuned with fails on about one image in a thousand since Pillow 13
#
# Versions   timm 1.0.31 with Pillow 13.0.0 and with Pillow 12.0.0; torch 2.15.0, torchvision 0.29.2, Python 3.11.
# Guess      `rand-m9-mstd0.5-inc1` (MAE, BEiT, DeiT) draws magnitudes around 9 of 10, so that "posterize, increasing" keeps 1 bit
#            at the least, and a new major version of Pillow changes at most how the pictures look.
# Seen       Magnitudes are cut off at 10, where timm asks for 0 bits. Pillow 12 gives an image that is black, in silence. Pillow 13
#            raises ValueError, in the midst of an epoch. timm names no upper bound for Pillow, so a new environment has 13.
# Bites      who fine-tunes with timm's transforms in a fresh environment: within the first thousands of images the loader ends with
#            a traceback; and who compares with results of before: there, as rarely, a black image was learned with its label.
#
# Exits with 1 if any of this is no longer so. Needs a network that reaches a package index; 5 GB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install -q --disable-pip-version-check)
"${pip[@]}" torch==2.15.0 torchvision==0.29.2 timm==1.0.31 pillow==13.0.0
cat > "$work/augment.py" <<'PYTHON'
import random

import numpy as np
import PIL
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

random.seed(0)
np.random.seed(0)
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype="uint8"))
augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
errors, n_black = {}, 0
for _ in range(3000):
    try:
        n_black += not np.asarray(augment(image)).any()
    except ValueError as error:
        errors[str(error)] = errors.get(str(error), 0) + 1
print(f"Pillow {PIL.__version__}: of 3,000 images {n_black} black, errors {errors}")
assert sum(errors.values()) > 0 if PIL.__version__ == "13.0.0" else not errors and n_black > 1
PYTHON
"$work/venv/bin/python" "$work/augment.py"
"${pip[@]}" pillow==12.0.0
"$work/venv/bin/python" "$work/augment.py"
