"""The names of an export (`--format torch`) as MMSegmentation's backbone MAE has them: python for_mmseg.py student.pth OUT.pth

MMSegmentation loads weights with strict=False: names that it does not know are left out in silence.
"""

import re
import sys

import torch

NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"layers.\1.ln\2."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"layers.\1.ffn.layers.0.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"layers.\1.ffn.layers.1."),
    (r"^blocks\.", "layers."),
)
LEFT_OUT = "norm."
"""The final norm: this network takes the outputs of blocks as they are."""


def renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


if __name__ == "__main__":
    source, target = sys.argv[1:]
    weights = torch.load(source, map_location="cpu", weights_only=True)["model"]
    kept = {renamed(name): tensor for name, tensor in weights.items() if not name.startswith(LEFT_OUT)}
    torch.save({"state_dict": kept}, target)
    print(f"{target}: {len(kept)} of {len(weights)} weights")
