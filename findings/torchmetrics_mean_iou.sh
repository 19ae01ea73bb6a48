#!/usr/bin/env bash
# torchmetrics' MeanIoU is a mean over images, not the mIoU of segmentation benchmarks
#
# Versions   torchmetrics 1.9.0, torch 2.15.0, Python 3.11.
# Guess      `torchmetrics.segmentation.MeanIoU` sums intersections and unions over all updates and divides once a class, as
#            the mIoU of ADE20K, Cityscapes or VOC is defined.
# Seen       It takes the mean over classes of each image and then the mean over images: .4792 where the benchmarks' formula
#            gives .5833 (two images of four pixels). A class that is in neither image nor prediction is -1 under
#            per_class=True, so that the mean of that vector is no mIoU either. `MulticlassJaccardIndex` of the same package
#            is the benchmarks' mIoU. (The two agree on a single image, so a test of one image cannot tell them apart.)
# Bites      whoever reports a linear segmentation probe beside published figures.
#
# Exits with 1 if any of this is no longer so. Needs a network that reaches a package index; 2 GB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.15.0 torchmetrics==1.9.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

said = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 0]]])  # two images of 2 x 2 pixels
true = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 1]]])

inter, union = (torch.tensor([op(said == c, true == c).sum() for c in (0, 1)]) for op in (torch.logical_and, torch.logical_or))
benchmark = float((inter / union).mean())

mean_iou, jaccard = MeanIoU(num_classes=2, input_format="index"), MulticlassJaccardIndex(num_classes=2)
for image in range(2):
    mean_iou.update(said[image : image + 1], true[image : image + 1])
    jaccard.update(said[image : image + 1], true[image : image + 1])
absent = MeanIoU(num_classes=4, input_format="index", per_class=True)
absent.update(said[:1], true[:1])

print(f"intersections / unions over both images {benchmark:.4f}")
print(f"MeanIoU                                 {mean_iou.compute():.4f}")
print(f"MulticlassJaccardIndex                  {jaccard.compute():.4f}")
print(f"MeanIoU per class, of 4 two there       {[round(float(v), 4) for v in absent.compute()]}")
as_seen = (
    abs(benchmark - 7 / 12) < 1e-6
    and abs(float(mean_iou.compute()) - 23 / 48) < 1e-6
    and abs(float(jaccard.compute()) - 7 / 12) < 1e-6
    and absent.compute()[2:].tolist() == [-1, -1]
)
raise SystemExit(0 if as_seen else "no longer as seen")
PYTHON
