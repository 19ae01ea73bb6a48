"""What a person can choose a teacher by: families, sizes, grids, licences. Facts alone; nothing here imports torch.

The teachers of TEACHERS, and those that people ask timm and open_clip for, as these libraries' own configurations describe them
(tests/test_teachers_families.py compares). A model that is not in this table may be a teacher all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..format.spec import TeacherSpec
from . import _IMAGENET, _OPENAI, OPEN_CLIP_PREFIX, TEACHERS, TIMM_PREFIX, weights_option

NON_COMMERCIAL = ("CC-BY-NC-4.0", "FAIR Noncommercial Research License")
LICENCES = {
    "clip": ("CLIP", "MIT"), "dino": ("DINO", "Apache-2.0"), "moco_v3": ("MoCo v3", "CC-BY-NC-4.0"), "moby_swin": ("MoBY", "MIT"),
    "slip": ("SLIP", "MIT"), "mae": ("MAE", "CC-BY-NC-4.0"), "demo": ("demo", "Apache-2.0"),
}  # fmt: skip
"""Module of a teacher of TEACHERS -> its family, and the licence of its weights."""
FIXED_SIZE = ("moby_swin",)
"""Modules of which the input size cannot be changed."""

_SATELLITE = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_NO_CLS = {"has_cls": False, "attention_source": None}
_POOLS = {"has_cls": False, "attention_source": "pool"}


@dataclass(frozen=True)
class KnownTeacher:
    """A teacher as its line of the table has it."""

    name: str
    """As `--teacher` takes it."""
    family: str
    size: str
    licence: str
    """Of its weights."""
    patch_size: int
    image_size: int
    """Side of its input, pixels, unless `--image-size` says otherwise."""
    dim: int
    depth: int
    heads: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    norm_eps: float
    has_cls: bool = True
    n_registers: int = 0
    attention_source: str | None = "cls"
    head: str = "layernorm"
    projection_dim: int | None = None
    gated: str = ""
    """Which of its files are given only to those who ask for them; empty: none."""
    is_fixed: bool = False
    """Whether it takes no other `--image-size`."""

    @property
    def marks(self) -> list[str]:
        """What to look at before its weights are used: `gated`, `non-commercial`."""
        return ["gated"] * bool(self.gated) + ["non-commercial"] * (self.licence in NON_COMMERCIAL)

    def grid_at(self, image_size: int) -> tuple[int, int] | None:
        """(rows, columns) of patches of an input of so many pixels a side; None if it cannot be had."""
        fits = image_size % self.patch_size == 0 and (not self.is_fixed or image_size == self.image_size)
        return (image_size // self.patch_size,) * 2 if fits else None

    def spec(self, image_size: int | None = None) -> TeacherSpec:
        """The teacher as a store would describe it at an image size, but for its weights and what follows from building it."""
        side = image_size or self.image_size
        return TeacherSpec(
            name=self.name, weights="", weights_sha256="", image_size=side, patch_size=self.patch_size,
            grid=(side // self.patch_size,) * 2, dim=self.dim, depth=self.depth, heads=self.heads, has_cls=self.has_cls,
            n_registers=self.n_registers, mean=self.mean, std=self.std, norm_eps=self.norm_eps,
            projection_dim=self.projection_dim, resize="", activation="", positions="", attention_source=self.attention_source,
            head=self.head,
        )  # fmt: skip


def _family(family: str, licence: str, *lines: tuple, library: str = TIMM_PREFIX, **common) -> list[KnownTeacher]:
    """lines: (name without its prefix, size, patch, image size, width, blocks, heads, what of `common` is otherwise)."""
    return [
        KnownTeacher(f"{library}{name}", family, size, licence, *numbers, **{**common, **(other[0] if other else {})})
        for name, size, *numbers, other in ((*line[:7], line[7:]) for line in lines)
    ]


_DINOV3 = dict(norm_eps=1e-5, n_registers=4, **_IMAGENET)
_METAS_FILES = "Meta's own files on the Hugging Face hub; timm's copies are open"

ON_REQUEST: tuple[KnownTeacher, ...] = (
    *_family(
        "DINOv3", "DINOv3 License",
        ("vit_small_patch16_dinov3_qkvb.lvd1689m", "S", 16, 256, 384, 12, 6),
        ("vit_small_plus_patch16_dinov3_qkvb.lvd1689m", "S+", 16, 256, 384, 12, 6),
        ("vit_base_patch16_dinov3.lvd1689m", "B", 16, 256, 768, 12, 12),
        ("vit_large_patch16_dinov3.lvd1689m", "L", 16, 256, 1024, 24, 16),
        ("vit_large_patch16_dinov3.sat493m", "L, satellite", 16, 256, 1024, 24, 16, _SATELLITE),
        ("vit_huge_plus_patch16_dinov3.lvd1689m", "H+", 16, 256, 1280, 32, 20),
        ("vit_7b_patch16_dinov3.lvd1689m", "7B", 16, 256, 4096, 40, 32),
        gated=_METAS_FILES, **_DINOV3,
    ),
    *_family(
        "EUPE", "FAIR Noncommercial Research License",
        ("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", "T", 16, 256, 192, 12, 3),
        ("vit_small_patch16_dinov3_qkvb.eupe_lvd1689m", "S", 16, 256, 384, 12, 6),
        ("vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", "B", 16, 256, 768, 12, 12),
        **_DINOV3,
    ),
    *_family(
        "DINOv2", "Apache-2.0",
        ("vit_small_patch14_dinov2.lvd142m", "S", 14, 518, 384, 12, 6),
        ("vit_base_patch14_dinov2.lvd142m", "B", 14, 518, 768, 12, 12),
        ("vit_large_patch14_dinov2.lvd142m", "L", 14, 518, 1024, 24, 16),
        ("vit_giant_patch14_dinov2.lvd142m", "g", 14, 518, 1536, 40, 24),
        norm_eps=1e-6, **_IMAGENET,
    ),
    *_family(
        "DINOv2 with registers", "Apache-2.0",
        ("vit_small_patch14_reg4_dinov2.lvd142m", "S", 14, 518, 384, 12, 6),
        ("vit_base_patch14_reg4_dinov2.lvd142m", "B", 14, 518, 768, 12, 12),
        ("vit_large_patch14_reg4_dinov2.lvd142m", "L", 14, 518, 1024, 24, 16),
        ("vit_giant_patch14_reg4_dinov2.lvd142m", "g", 14, 518, 1536, 40, 24),
        norm_eps=1e-6, n_registers=4, **_IMAGENET,
    ),
    *_family(
        "TIPSv2", "Apache-2.0",
        ("vit_base_patch14_reg1_tipsv2.webli", "B", 14, 448, 768, 12, 12),
        ("vit_large_patch14_reg1_tipsv2.webli", "L", 14, 448, 1024, 24, 16),
        ("vit_so400m_patch14_reg1_tipsv2.webli", "So400m", 14, 448, 1152, 27, 16),
        ("vit_giant_patch14_reg1_tipsv2.webli", "g", 14, 448, 1536, 40, 24),
        norm_eps=1e-6, n_registers=1, **_RAW,
    ),
    *_family(
        "SigLIP 2", "Apache-2.0",
        ("vit_base_patch16_siglip_224.v2_webli", "B", 16, 224, 768, 12, 12),
        ("vit_base_patch16_siglip_256.v2_webli", "B", 16, 256, 768, 12, 12),
        ("vit_large_patch16_siglip_256.v2_webli", "L", 16, 256, 1024, 24, 16),
        ("vit_so400m_patch14_siglip_224.v2_webli", "So400m", 14, 224, 1152, 27, 16),
        ("vit_so400m_patch16_siglip_256.v2_webli", "So400m", 16, 256, 1152, 27, 16),
        ("vit_giantopt_patch16_siglip_256.v2_webli", "g-opt", 16, 256, 1536, 40, 16),
        norm_eps=1e-6, **_POOLS, **_HALF,
    ),
    *_family(
        "MetaCLIP 1", "CC-BY-NC-4.0",
        ("ViT-B-16-quickgelu/metaclip_400m", "B", 16, 224, 768, 12, 12, {"projection_dim": 512}),
        ("ViT-B-16-quickgelu/metaclip_fullcc", "B", 16, 224, 768, 12, 12, {"projection_dim": 512}),
        ("ViT-L-14-quickgelu/metaclip_fullcc", "L", 14, 224, 1024, 24, 16, {"projection_dim": 768}),
        ("ViT-H-14-quickgelu/metaclip_fullcc", "H", 14, 224, 1280, 32, 16, {"projection_dim": 1024}),
        library=OPEN_CLIP_PREFIX, norm_eps=1e-5, **_OPENAI,
    ),
    *_family(
        "MetaCLIP 2", "CC-BY-NC-4.0",
        ("ViT-H-14-worldwide-quickgelu/metaclip2_worldwide", "H", 14, 224, 1280, 32, 16, {"projection_dim": 1024}),
        ("ViT-bigG-14-worldwide/metaclip2_worldwide", "G", 14, 224, 1664, 48, 16, {"projection_dim": 1280}),
        library=OPEN_CLIP_PREFIX, norm_eps=1e-5, **_OPENAI,
    ),
    *_family(
        "C-RADIO v3", "NVIDIA Open Model License",
        ("vit_base_patch16_radio_v3.c_radio", "B", 16, 512, 768, 12, 12),
        ("vit_large_patch16_radio_v3.c_radio", "L", 16, 512, 1024, 24, 16),
        ("vit_huge_patch16_radio_v3.c_radio", "H", 16, 512, 1280, 32, 16),
        ("vit_giant_patch16_radio_v3.c_radio", "g", 16, 512, 1536, 40, 24),
        norm_eps=1e-6, n_registers=7, head="none", **_OPENAI,
    ),
    *_family(
        "C-RADIO v4", "NVIDIA Open Model License",
        ("vit_so400m_patch16_radio_v4.c_radio", "So400m", 16, 512, 1152, 27, 16),
        ("vit_huge_patch16_radio_v4.c_radio", "H", 16, 512, 1280, 32, 16),
        norm_eps=1e-6, n_registers=9, head="none", **_OPENAI,
    ),
    *_family(
        "PE core", "Apache-2.0",
        ("vit_pe_core_tiny_patch16_384.fb", "T", 16, 384, 192, 12, 3),
        ("vit_pe_core_small_patch16_384.fb", "S", 16, 384, 384, 12, 6),
        ("vit_pe_core_base_patch16_224.fb", "B", 16, 224, 768, 12, 12),
        ("vit_pe_core_large_patch14_336.fb", "L", 14, 336, 1024, 24, 16),
        ("vit_pe_core_gigantic_patch14_448.fb", "G", 14, 448, 1536, 50, 16, _POOLS),
        norm_eps=1e-5, **_HALF,
    ),
    *_family(
        "PE spatial", "Apache-2.0",
        ("vit_pe_spatial_tiny_patch16_512.fb", "T", 16, 512, 192, 12, 3),
        ("vit_pe_spatial_small_patch16_512.fb", "S", 16, 512, 384, 12, 6),
        ("vit_pe_spatial_base_patch16_512.fb", "B", 16, 512, 768, 12, 12),
        ("vit_pe_spatial_large_patch14_448.fb", "L", 14, 448, 1024, 24, 16),
        ("vit_pe_spatial_gigantic_patch14_448.fb", "G", 14, 448, 1536, 50, 16, _NO_CLS),
        norm_eps=1e-5, head="none", **_HALF,
    ),
    *_family(
        "EVA-02", "MIT",
        ("eva02_tiny_patch14_224.mim_in22k", "T", 14, 224, 192, 12, 3),
        ("eva02_small_patch14_224.mim_in22k", "S", 14, 224, 384, 12, 6),
        ("eva02_base_patch14_224.mim_in22k", "B", 14, 224, 768, 12, 12),
        ("eva02_large_patch14_224.mim_m38m", "L", 14, 224, 1024, 24, 16),
        ("eva02_base_patch16_clip_224.merged2b", "B, CLIP", 16, 224, 768, 12, 12),
        ("eva02_large_patch14_clip_224.merged2b", "L, CLIP", 14, 224, 1024, 24, 16),
        norm_eps=1e-6, **_OPENAI,
    ),
    *_family(
        "AIMv2", "Apple ASCL",
        ("aimv2_large_patch14_224.apple_pt", "L", 14, 224, 1024, 24, 8),
        ("aimv2_huge_patch14_224.apple_pt", "H", 14, 224, 1536, 24, 12),
        ("aimv2_1b_patch14_224.apple_pt", "1B", 14, 224, 2048, 24, 16),
        ("aimv2_3b_patch14_224.apple_pt", "3B", 14, 224, 3072, 24, 24),
        norm_eps=1e-5, head="none", **_NO_CLS, **_OPENAI,
    ),
)  # fmt: skip
"""Teachers that timm and open_clip have by name."""


def in_the_table(name: str) -> KnownTeacher:
    """The line of a teacher of TEACHERS."""
    entry = TEACHERS[name]
    family, licence = LICENCES[entry.module]
    size = name.rpartition("-")[2][0].upper() if "-" in name else ""
    return KnownTeacher(
        name, family, size, licence, entry.patch_size, entry.image_size, entry.dim, entry.depth, entry.heads, entry.mean,
        entry.std, entry.norm_eps, entry.has_cls, attention_source="cls" if entry.has_cls else None,
        projection_dim=entry.projection_dim, is_fixed=entry.module in FIXED_SIZE,
    )  # fmt: skip


def known_teachers() -> dict[str, KnownTeacher]:
    """All lines of the table by name: the project's own names first."""
    return {known.name: known for known in (*map(in_the_table, TEACHERS), *ON_REQUEST)}


def image_size_for(name: str, grid: tuple[int, int]) -> int | None:
    """The side of its input, pixels, at which a teacher has this square grid of patches.

    None where its own size has, where it takes no other, and for a teacher that is not in the table.
    """
    known = known_teachers().get(name)
    if known is None or known.is_fixed:
        return None
    side = grid[0] * known.patch_size
    return None if side == known.image_size else side


def options_for(name: str, grid: tuple[int, int] | None = None) -> str:
    """What a suggested `extract --teacher NAME` needs besides: ` --weights PATH`, and ` --image-size N` for a grid."""
    size = None if grid is None else image_size_for(name, grid)
    return weights_option(name) + (f" --image-size {size}" if size else "")
