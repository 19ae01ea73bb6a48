#!/usr/bin/env bash
# The augmentation of MAE's and BEiT's fine-tuning ends a training run with an error, some hundred images in, since Pillow 13
#
# Versions   timm 1.0.31, Pillow 13.0.0 (12.0.0 for comparison), torch 2.15.0, torchvision 0.29.2, Python 3.11.
# Guess      "rand-m9-mstd0.5-inc1" is the most used policy there is, so timm's and Pillow's newest releases fit together.
# Seen       timm's PosterizeIncreasing keeps 4 bits down to 0 as the magnitude rises to 10, which "mstd0.5" draws for one image in
#            fifty. ImageOps.posterize of Pillow 13 wants 1 to 8 bits and raises ValueError; Pillow 12 gave a black image. Of 2,000
#            augmented images the first error came at the 93rd; with Pillow 12 there is none.
# Bites      every fine-tuning by timm's RandAugment, in a worker of a DataLoader, minutes after its start. Here: student-eval finetune,
#            which gives black as before (student/evals/finetuning/augmented.py).
#
# Exits with 1 if this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install -q --disable-pip-version-check "$@"; }
pip timm==1.0.31 torch==2.15.0 torchvision==0.29.2 pillow==13.0.0 numpy
cat > "$work/augment.py" <<'PYTHON'
import random
import sys

import numpy as np
import PIL
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

random.seed(0)
np.random.seed(0)
image = Image.fromarray(np.random.randint(0, 256, (64, 64, 3), "uint8"))
augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104)})
for number in range(1, 2001):
    try:
        augment(image)
    except ValueError as error:
        print(f"Pillow {PIL.__version__}: image {number}: ValueError: {error}")
        sys.exit(3)
print(f"Pillow {PIL.__version__}: {number:,} images augmented")
PYTHON
code=0
"$work/venv/bin/python" "$work/augment.py" || code=$?
[ "$code" = 3 ] || { echo "no longer as seen"; exit 1; }
pip pillow==12.0.0
"$work/venv/bin/python" "$work/augment.py" || { echo "no longer as seen"; exit 1; }
