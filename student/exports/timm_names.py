"""Which of timm's models an encoder is, and what has to be said beside its name."""

from __future__ import annotations

from ..config import BackboneConfig, SwinConfig, ViTConfig


def _vit(patch_size: int, embed_dim: int, depth: int, num_heads: int) -> dict:
    return {"img_size": 224, "patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads,
            "mlp_ratio": 4.0, "init_values": None}  # fmt: skip


def _swin(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> dict:
    return {"img_size": 224, "patch_size": 4, "embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, "window_size": 7,
            "mlp_ratio": 4.0}  # fmt: skip


MODELS = {
    ViTConfig: {
        "vit_base_patch16_224": _vit(16, 768, 12, 12),
        "vit_tiny_patch16_224": _vit(16, 192, 12, 3),
        "vit_small_patch16_224": _vit(16, 384, 12, 6),
        "vit_large_patch16_224": _vit(16, 1024, 24, 16),
        "vit_small_patch8_224": _vit(8, 384, 12, 6),
        "vit_base_patch8_224": _vit(8, 768, 12, 12),
        "vit_small_patch32_224": _vit(32, 384, 12, 6),
        "vit_base_patch32_224": _vit(32, 768, 12, 12),
        "vit_large_patch14_224": _vit(14, 1024, 24, 16),
        "vit_huge_patch14_224": _vit(14, 1280, 32, 16),
    },
    SwinConfig: {
        "swin_tiny_patch4_window7_224": _swin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
        "swin_small_patch4_window7_224": _swin(96, (2, 2, 18, 2), (3, 6, 12, 24)),
        "swin_base_patch4_window7_224": _swin(128, (2, 2, 18, 2), (4, 8, 16, 32)),
        "swin_large_patch4_window7_224": _swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    },
}
"""Name in timm -> the arguments it stands for."""


def timm_name(config: BackboneConfig) -> tuple[str, dict]:
    """(name, keyword arguments) with which `timm.create_model` builds this ViT or Swin, beside `num_classes=0`.

    The name that needs the fewest of them: none for the sizes of the field, the number of heads alone where nothing else is
    other than the name says. No shape of a weight tells that number, and with a wrong one the weights load without an error.
    """
    same = {"img_size": config.image_size, "patch_size": config.patch_size, "mlp_ratio": config.mlp_ratio,
            "num_heads": config.heads}  # fmt: skip
    if isinstance(config, ViTConfig):
        wanted = same | {"embed_dim": config.dim, "depth": config.depth, "init_values": config.layer_scale}
    else:
        wanted = same | {"embed_dim": config.embed_dim, "depths": config.depths, "window_size": config.window}
    needed = {
        name: {key: value for key, value in wanted.items() if value != own[key]} for name, own in MODELS[type(config)].items()
    }
    name = min(needed, key=lambda name: (len(needed[name].keys() - {"num_heads"}), len(needed[name])))
    return name, needed[name]
