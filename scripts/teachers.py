"""`python -m scripts.teachers > docs/teachers.md`: which ViTs of timm can be teachers, and how far they are from timm's forward.

Some minutes on two CPUs, no network: every model of timm's that is a ViT is built without numbers and asked what it is; of each
family one model is built with two narrow blocks and random weights, and tokens, attention and final norm are compared.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from teacher_cache.teachers import load_teacher, timm_vit
from teacher_cache.teachers.base import whiten
from teacher_cache.teachers.blocks import timm_kinds

MODULES = ("beit", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos",
           "vision_transformer_sam")  # fmt: skip
"""Of timm, in which its ViTs are defined."""
FAMILIES = {
    "DINOv3": "vit_small_patch16_dinov3",
    "DINOv3, q and v biases": "vit_small_patch16_dinov3_qkvb",
    "DINOv3, SwiGLU": "vit_small_plus_patch16_dinov3_qkvb",
    "EUPE": "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
    "LingBot": "vit_base_patch16_lingbot",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2",
    "TIPSv2": "vit_base_patch14_reg1_tipsv2",
    "SigLIP 2": "vit_base_patch16_siglip_224.v2_webli",
    "SigLIP 2, mean pooling": "vit_base_patch16_siglip_gap_224.v2_webli",
    "MetaCLIP": "vit_base_patch16_clip_quickgelu_224.metaclip_2pt5b",
    "MetaCLIP 2": "vit_huge_patch14_clip_quickgelu_224.metaclip2_worldwide",
    "C-RADIO v3": "vit_base_patch16_radio_v3",
    "C-RADIO v4": "vit_so400m_patch16_radio_v4",
    "PE core": "vit_pe_core_base_patch16_224",
    "PE core, no CLS": "vit_pe_core_gigantic_patch14_448",
    "PE spatial": "vit_pe_spatial_base_patch16_512",
    "EVA": "eva_giant_patch14_224",
    "EVA-02": "eva02_tiny_patch14_224",
    "EVA-02, q, k and v apart": "eva02_base_patch14_224",
    "EVA02-CLIP": "eva02_base_patch16_clip_224",
    "AIMv2": "aimv2_large_patch14_224",
    "RoPE mixed": "vit_small_patch16_rope_mixed_ape_224",
}
"""Family -> timm's name of one of its models."""
NARROW = dict(depth=2, embed_dim=64, num_heads=2)
OTHER_GRID = 5
"""Patches a side at the other size."""

HEAD = """# Teachers

Written by `python -m scripts.teachers`. `teacher-cache teachers` is the table to choose by (families, grids, licences);
this page says what is accepted, and how it was compared.

A teacher is accepted by what it *is*: the kind of its blocks, of their attention, and of what follows the last one.

| what it has | what a store keeps |
|---|---|
| a CLS token | attention of CLS in the last block, recomputed with its own rotation (of patches alone) |
| no CLS token, a head that pools by attention (SigLIP, PE core G) | that head's weights over the patches |
| no CLS token, the mean of the patches | no attention |
| a LayerNorm behind the last block, or behind the mean | tokens whitened, and its gamma and beta |
| no norm there (C-RADIO, PE spatial), or an RMSNorm (AIMv2) | block outputs whitened, nothing of a head |

Attention within the blocks of a SigLIP is not offered: it hardly depends on the image. Losses that want the final norm refuse
a teacher without one. Register tokens are run and left out of the store. Means and deviations of pixels are those of the
model's own entry (TIPSv2: 0 and 1). Always in eval mode, which is asserted; never in float16.

**Position tables** follow another input size by the rule of their family's own code, which the store has on record. A store
that was begun under another rule goes on under that one.

| family | rule |
|---|---|
| DINOv2 | bicubic, no antialias, by the factor (grid + 0.1) / 37 |
| DINOv2 with registers | bicubic, antialias, by size |
| TIPSv2 | bilinear, no antialias, by the factor (grid + 0.1) / 32 |
| PE, C-RADIO | bilinear, no antialias, by size |
| all others | bicubic, no antialias, by size |

timm's C-RADIO files hold a table of 32 x 32 that was made from one of 128 x 128. Rotations are timm's,
but for PE at another size than its own: as in Meta's code patches are counted, which timm spreads over the native grid (0.2 of a
token's largest value in a model of two blocks). Meta's DINOv3 files hold RoPE periods
rounded to bfloat16; they are compared with the exact ones, and those are used.

**Files.** timm's names; open_clip's; Meta's own of DINOv2 and DINOv3 (masked key bias, RoPE periods, mask token); Hugging
Face's of ViT, DINOv2, DINOv3, CLIP and SigLIP. All strictly: one name too many or too few is an error. Two things that names
do not tell: Hugging Face's ViT has a LayerNorm eps of 1e-12 and timm's 1e-6 (1e-5 of a token); its SigLIP has the approximate
GELU, as timm's So400m has, and timm's B/16 and L/16 mostly the exact one (1e-4).

**Against the families' own code**, random weights, all 12 blocks, the official file layout, largest difference relative to
the largest value: DINOv3 S and S+ at 256 and 224 px: tokens 0, final norm 1.1e-7, attention 4.8e-7. DINOv2 S at 518, 336, 224
and 196 px, with registers and without: tokens 0, final norm 1.1e-7. Hugging Face (transformers 5.24, two blocks): tokens
3.0e-7, final norm 4.7e-7, attention 4.4e-7. PE core at 224, 112 and 320 px: tokens 0; TIPSv2 at 448,
224 and 70 px: 3.6e-7 (two blocks each).

**On trained weights** (a DINOv2 ViT-S/14 that was tuned for saliency, two photographs) against Meta's code: at 518, 224 and 196
px the normed tokens are 1.0e-7 apart and attention 5.3e-7. Under the rule of before (no antialias, by size) the tokens at 224 px
are 2.2 % off in relative L2 and attention 1.3 % of its largest value, under timm's (antialias) 4.8 % and 4.0 %.

"""


BY_FAMILY = f"""## By family

Largest difference from timm's own forward, relative to the largest value, at the native size and at {OTHER_GRID} x {OTHER_GRID}
patches; float32, random weights, two blocks of width 64.

| family | model of timm's | tokens | attention | final norm |
|---|---|---|---|---|"""


def vit_names() -> list[str]:
    """timm's names of all its ViTs."""
    return [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.rpartition(".")[2] in MODULES]


def kinds() -> dict[tuple[str, str], list[str]]:
    """(what it is, why not: empty where it is accepted) -> names."""
    found = defaultdict(list)
    for name in vit_names():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        reason = timm_kinds.why_not(model)
        if reason:
            found[type(model).__name__, re.sub(r"\d+ x \d+", "...", reason)].append(name)
            continue
        rope = getattr(model, "rope", None)
        source = {"cls": "CLS", "pool": "pooling head", None: "no attention"}[timm_kinds.attention_source(model)]
        parts = [type(model).__name__, type(model.blocks[-1].attn).__name__]
        parts += [f"RoPE {type(rope).__name__.removeprefix('RotaryEmbedding')}"] if rope is not None else []
        parts += [source, "LayerNorm" if timm_kinds.final_norm(model) else "no final norm"]
        found[", ".join(parts), ""].append(name)
    return dict(found)


@contextmanager
def narrow() -> Iterator[None]:
    """timm builds what it is asked for with two narrow blocks, everything else as it is."""
    create = timm.create_model
    with mock.patch.object(timm, "create_model", lambda name, **options: create(name, **NARROW, **options)):
        yield


@contextmanager
def softmaxes() -> Iterator[list[Tensor]]:
    """What every call of Tensor.softmax gives, in order."""
    seen, softmax = [], Tensor.softmax

    def noted(tensor, *args, **named):
        seen.append(softmax(tensor, *args, **named))
        return seen[-1]

    with mock.patch.object(Tensor, "softmax", noted):
        yield seen


def unfused(model: nn.Module) -> nn.Module:
    """The model, every attention of which forms its softmax."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@torch.no_grad()
def differences(name: str, images_u8: Callable[[int, int], Tensor], native: bool) -> dict[str, float]:
    """How far a narrow model as a teacher is from timm's own forward: `tokens`, and where there are such, `attention`, `norm`.

    images_u8: (number, side) to uint8 [number, side, side, 3]
    native:    at its own size, else at OTHER_GRID patches a side
    Largest difference relative to the largest value; float32 on the CPU. timm's forward has no hooks of ours, and its attention
    is the softmax that it computes itself.
    """
    with narrow():
        patch = timm.create_model(name, num_classes=0).patch_embed.patch_size[0]
        teacher = load_teacher(f"timm:{name}", "random:0", None if native else OTHER_GRID * patch)
        counted = {"ref_feat_shape": teacher.spec.grid} if timm_vit.position_rule(teacher.network).counts_patches else {}
        reference = unfused(timm.create_model(name, num_classes=0, img_size=teacher.spec.image_size, **counted).eval())
    spec, images = teacher.spec, images_u8(2, teacher.spec.image_size)
    output, again = teacher(images, [1, 2]), teacher(images, [1, 2])
    reference.load_state_dict(teacher.network.state_dict())
    normalised = teacher.preprocess(images)
    with softmaxes() as seen:
        features = reference.forward_features(normalised)
        reference.forward_head(features)
    n_cls, n_prefix = int(spec.has_cls), reference.num_prefix_tokens
    options = dict(return_prefix_tokens=n_prefix > 0, output_fmt="NLC", intermediates_only=True)
    taps = reference.forward_intermediates(normalised, **options)

    whole = [torch.cat([tap[1], tap[0]], 1) if n_prefix else tap for tap in taps]
    kept = [torch.cat([tokens[:, :n_cls], tokens[:, n_prefix:]], 1) for tokens in (*whole, features)]
    found = {"tokens": max(_apart(output.tokens[:, i], whiten(kept[i], spec.norm_eps)) for i in range(2))}
    found["again"] = float((output.tokens - again.tokens).abs().max())
    if output.attention is not None:
        row = seen[2] if spec.attention_source == "pool" else seen[1][:, :, :1, n_prefix:]
        found["attention"] = _apart(output.attention, row.mean(1)[:, 0])
    if teacher.head:
        gamma, beta = (torch.from_numpy(teacher.head[part]) for part in ("gamma", "beta"))
        found["norm"] = _apart(output.tokens[:, -1] * gamma + beta, reference.fc_norm(kept[-1]))
    return found


def _apart(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape, f"{tuple(found.shape)} and {tuple(wanted.shape)}"
    return float((found - wanted).abs().max() / wanted.abs().max())


def _crops(number: int, side: int) -> Tensor:
    return torch.randint(0, 256, (number, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def page() -> str:
    """docs/teachers.md."""
    found = kinds()
    n_all = sum(map(len, found.values()))
    n_accepted = sum(len(names) for (_, reason), names in found.items() if not reason)
    lines = [HEAD + BY_FAMILY]
    for family, name in FAMILIES.items():
        both = [differences(name, _crops, native) for native in (True, False)]
        cells = [f"{max(each[part] for each in both):.0e}" if part in both[0] else "" for part in ("tokens", "attention", "norm")]
        lines.append(f"| {family} | `{name}` | {' | '.join(cells)} |")
    lines += [f"\n## By kind\n\nOf the {n_all} ViTs of timm {timm.__version__}, {n_accepted} can be teachers.\n",
              "| what it is | models | for example | why not |", "|---|---|---|---|"]  # fmt: skip
    for (what, reason), names in sorted(found.items(), key=lambda item: (bool(item[0][1]), -len(item[1]))):
        lines.append(f"| {what} | {len(names)} | `{names[0]}` | {reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
