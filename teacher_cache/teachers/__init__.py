"""The teachers by name. Listing them imports no torch; `load_teacher` does.

A new teacher is one line in TEACHERS, and in its module the rules for the names in its weights file.
"""

from __future__ import annotations

import difflib
import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnknownNameError
from ..format.spec import TeacherSpec

if TYPE_CHECKING:
    from .base import Teacher

_OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CANNOT_TELL = (
    "A file in that layout does not tell its activation: LAION's, trained with GELU, would run with QuickGELU unnoticed and is "
    "open_clip:ARCH/TAG's"
)
_NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


@dataclass(frozen=True)
class TeacherEntry:
    """A teacher that can be asked for by name: what it is, and all that is needed to build it."""

    name: str
    module: str
    """The file of this folder whose `load(entry, weights, image_size, device, precision)` builds it."""
    about: str
    weights_from: str
    """Which file to pass as `--weights`, for people."""
    dim: int
    depth: int
    """Blocks that can be asked for: all of a ViT, those of the last stage of a Swin."""
    heads: int
    """Of the last block. No weights file tells how many a ViT has."""
    patch_size: int
    """Pixels of the input, a side, for one token; of a Swin at its last stage."""
    image_size: int
    """Side of the input, pixels, unless `--image-size` says otherwise."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    norm_eps: float
    projection_dim: int | None = None
    has_cls: bool = True
    """Whether there is a CLS token, and with it attention to keep."""
    native_size: int | None = None
    """Side of the input that its position table was trained at, where that is not `image_size`."""
    pickled: tuple[str, ...] = ()
    """What its official file pickles beside tensors: names of weight_files.STAND_INS, read as inert stand-ins."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at `image_size`."""
        return (self.image_size // self.patch_size,) * 2


_SMALL = dict(dim=384, depth=12, patch_size=16, image_size=224, norm_eps=1e-6, **_IMAGENET)
_BASE = dict(dim=768, depth=12, heads=12, patch_size=16, image_size=224, norm_eps=1e-6, **_IMAGENET)

TEACHERS: dict[str, TeacherEntry] = {
    entry.name: entry
    for entry in (
        TeacherEntry(
            name="clip-b16",
            module="clip",
            about="CLIP ViT-B/16 of OpenAI (QuickGELU), image tower",
            weights_from="OpenAI's ViT-B-16.pt (sha256 5806e77c...), or the same weights in open_clip's layout: "
            "open_clip_model.safetensors or open_clip_pytorch_model.bin of `ViT-B-16-quickgelu`, tag `openai`. " + _CANNOT_TELL,
            dim=768, depth=12, heads=12, patch_size=16, image_size=224, norm_eps=1e-5, projection_dim=512, **_OPENAI,
        ),
        TeacherEntry(
            name="clip-l14",
            module="clip",
            about="CLIP ViT-L/14 of OpenAI (QuickGELU), image tower, at 196 px so that it has the 14 x 14 tokens of a ViT/16",
            weights_from="OpenAI's ViT-L-14.pt (sha256 b8cca3fd...), or the same weights in open_clip's layout: "
            "open_clip_model.safetensors or open_clip_pytorch_model.bin of `ViT-L-14-quickgelu`, tag `openai`. " + _CANNOT_TELL,
            dim=1024, depth=24, heads=16, patch_size=14, image_size=196, native_size=224, norm_eps=1e-5, projection_dim=768,
            **_OPENAI,
        ),
        TeacherEntry(
            name="dino-s16",
            module="dino",
            about="DINO ViT-S/16",
            weights_from="dino_deitsmall16_pretrain.pth, or the teacher in dino_deitsmall16_pretrain_full_checkpoint.pth, from "
            "dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/",
            heads=6, pickled=("argparse.Namespace", *_NUMPY_SCALARS), **_SMALL,
        ),
        TeacherEntry(
            name="dino-b16",
            module="dino",
            about="DINO ViT-B/16",
            weights_from="dino_vitbase16_pretrain.pth, or the teacher in dino_vitbase16_pretrain_full_checkpoint.pth, from "
            "dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/",
            pickled=("argparse.Namespace", *_NUMPY_SCALARS), **_BASE,
        ),
        TeacherEntry(
            name="moco-v3-s16",
            module="moco_v3",
            about="MoCo v3 ViT-S/16, which has 12 heads",
            weights_from="vit-s-300ep.pth.tar from dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/",
            heads=12, **_SMALL,
        ),
        TeacherEntry(
            name="moco-v3-b16",
            module="moco_v3",
            about="MoCo v3 ViT-B/16",
            weights_from="vit-b-300ep.pth.tar from dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/",
            **_BASE,
        ),
        TeacherEntry(
            name="moby-swin-t",
            module="moby_swin",
            about="MoBY Swin-T, window 7: no CLS, no attention; its 2 blocks are those of the last stage",
            weights_from="moby_swin_t_300ep_pretrained.pth of github.com/SwinTransformer/storage, release v1.0.3 "
            "(Transformer-SSL's README links it in the row of DeiT-S, and DeiT-S's in the row of Swin-T)",
            dim=768, depth=2, heads=24, patch_size=32, image_size=224, norm_eps=1e-5, has_cls=False,
            pickled=("yacs.config.CfgNode",), **_IMAGENET,
        ),
        TeacherEntry(
            name="moby-swin-b",
            module="moby_swin",
            about="MoBY Swin-B, window 7: no CLS, no attention; its 2 blocks are those of the last stage",
            weights_from="a checkpoint of your own, trained with Transformer-SSL: none was published",
            dim=1024, depth=2, heads=32, patch_size=32, image_size=224, norm_eps=1e-5, has_cls=False,
            pickled=("yacs.config.CfgNode",), **_IMAGENET,
        ),
        TeacherEntry(
            name="slip-b16",
            module="slip",
            about="SLIP ViT-B/16, image tower and projection",
            weights_from="slip_base_25ep.pt (MILAN's), slip_base_50ep.pt or slip_base_100ep.pt from dl.fbaipublicfiles.com/slip/",
            projection_dim=512, pickled=("argparse.Namespace", *_NUMPY_SCALARS), **_BASE,
        ),
        TeacherEntry(
            name="mae-b16",
            module="mae",
            about="MAE ViT-B/16, encoder",
            weights_from="mae_pretrain_vit_base.pth from dl.fbaipublicfiles.com/mae/pretrain/",
            pickled=("argparse.Namespace",), **_BASE,
        ),
        TeacherEntry(
            name="demo",
            module="demo",
            about="a small ViT trained on 4,000 MNIST digits, for trying things out in seconds",
            weights_from="built in",
            dim=64, depth=6, heads=4, patch_size=4, image_size=32,
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), norm_eps=1e-6,
        ),
    )
}  # fmt: skip

TIMM_PREFIX, OPEN_CLIP_PREFIX = "timm:", "open_clip:"
OTHER_TEACHERS = {
    f"{TIMM_PREFIX}NAME": (
        "most ViTs of timm (docs/teachers.md), e.g. timm:vit_small_patch16_224",
        "downloaded by timm, or --weights PATH, or --weights random:SEED; weights made for QuickGELU need the name of a model "
        "that has it",
    ),
    f"{OPEN_CLIP_PREFIX}ARCH/TAG": (
        "the image tower of most ViTs of open_clip, e.g. open_clip:ViT-B-16/laion2b_s34b_b88k",
        "downloaded by open_clip, or --weights PATH, or --weights random:SEED (for these two /TAG may be left out; a file tells "
        "its activation only if it is OpenAI's own)",
    ),
}
"""Besides those of the table: how they are asked for -> (what they are, where their weights come from)."""


def crop_size(name: str, teacher: TeacherSpec) -> int:
    """Side of the crops of a new cache, pixels: the teacher's input, or what it was trained at if that is larger."""
    native = TEACHERS[name].native_size if name in TEACHERS else None
    return max(teacher.image_size, native or 0)


def weights_option(name: str) -> str:
    """What a suggested command needs besides a teacher's name: ` --weights PATH`; nothing where they come by themselves."""
    comes_by_itself = name not in TEACHERS or TEACHERS[name].weights_from == "built in"
    return "" if comes_by_itself else " --weights PATH"


def load_teacher(
    name: str,
    weights: str | os.PathLike | None = None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    begun: TeacherSpec | None = None,
) -> Teacher:
    """Build a teacher, fill in its weights, freeze it.

    name:       one of TEACHERS, `timm:NAME`, or `open_clip:ARCH/TAG`
    weights:    PATH of a weights file, PATH#KEY for a part of it (file_parts.py), or `random:SEED` for a trial without one;
                None where they are built in, or for timm or open_clip to download
    image_size: side of the teacher's input, pixels; None is its own. Position tables follow (`TeacherSpec.positions`)
    precision:  `fp32` or, on a GPU or a CPU that has it, `bf16`
    begun:      the teacher as a store describes it that is gone on with: where that was begun under another rule for position
                tables, or before weights were refused for the activation that they were trained with, it stays so
    Raises UnknownNameError, UsageError, or BadInputError for weights that cannot be used.
    """
    if name.startswith(TIMM_PREFIX):
        from .timm_vit import load_timm

        return load_timm(name, weights, image_size, device, precision, begun)
    if name.startswith(OPEN_CLIP_PREFIX):
        from .open_clip_vit import load_open_clip

        return load_open_clip(name, weights, image_size, device, precision, begun)
    if name not in TEACHERS:
        close = difflib.get_close_matches(name, TEACHERS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UnknownNameError(
            f"There is no teacher named {name!r}.{hint} Known: {', '.join(TEACHERS)}; and besides {TIMM_PREFIX}NAME and "
            f"{OPEN_CLIP_PREFIX}ARCH/TAG (`teacher-cache teachers` describes them)."
        )
    module = importlib.import_module(f".{TEACHERS[name].module}", __name__)
    return module.load(TEACHERS[name], weights, image_size, device, precision)
