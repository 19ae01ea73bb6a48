#!/usr/bin/env bash
# timm and open_clip disagree about the activation of one CLIP, and it is the one without a note
#
# Versions   timm 1.0.31, open_clip_torch 3.3.0, torch 2.15.0, Python 3.11.
# Guess      Of the DFN CLIPs that open_clip's table calls QuickGELU, each has a timm entry that says so in its notes, and a
#            `*_quickgelu_*` variant that is built with it: so timm's notes are enough to tell which tower runs as trained.
# Seen       True of L/14, H/14 and H/14-378. Not of B/16: open_clip's entry (ViT-B-16, dfn2b) says quick_gelu, timm's
#            `vit_base_patch16_clip_224.dfn2b` has no note, is built with the exact GELU, and no quickgelu variant has that tag.
#            Which of the two is right the weights alone can show; both cannot be.
# Bites      whoever takes DFN B/16 through timm as a teacher or a backbone: it loads in silence.
#
# Exits with 1 if any of this is no longer so. Needs a network that reaches a package index, none that reaches a model hub; 5 GB in
# a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.15.0 timm==1.0.31 open_clip_torch==3.3.0
"$work/venv/bin/python" - <<'PYTHON'
import open_clip
import timm
from timm.models import get_arch_pretrained_cfgs

PAIRS = {
    "vit_base_patch16_clip{}_224": ("ViT-B-16", "dfn2b"),
    "vit_large_patch14_clip{}_224": ("ViT-L-14", "dfn2b"),
    "vit_huge_patch14_clip{}_224": ("ViT-H-14", "dfn5b"),
    "vit_huge_patch14_clip{}_378": ("ViT-H-14-378", "dfn5b"),
}
found = {}
for name, (arch, tag) in PAIRS.items():
    quick = bool(open_clip.get_pretrained_cfg(arch, tag)["quick_gelu"])
    plain, variant = name.format(""), name.format("_quickgelu")
    notes = get_arch_pretrained_cfgs(plain)[f"{plain}.{tag}"].notes
    has_variant = timm.is_model(variant) and f"{variant}.{tag}" in get_arch_pretrained_cfgs(variant)
    found[plain] = (quick, any("QuickGELU" in note for note in notes or ()), has_variant)
    print(f"{plain}.{tag}: open_clip says QuickGELU {quick}, timm notes it {found[plain][1]}, has a variant {has_variant}")
built = type(timm.create_model("vit_base_patch16_clip_224.dfn2b", pretrained=False).blocks[0].mlp.act).__name__
print(f"timm builds vit_base_patch16_clip_224.dfn2b with {built}")
wanted = {plain: (True, True, True) for plain in found} | {"vit_base_patch16_clip_224": (True, False, False)}
raise SystemExit(0 if found == wanted and "Quick" not in built else "no longer as seen")
PYTHON
