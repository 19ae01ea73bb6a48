"""The encoders a student can be. All say `grid`, `n_patches`, `dim` and `stride` of the tokens that come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .section import Section, require, require_positive


class _Grid:
    """What every backbone says of its output; `stride` is the side of one output token, pixels."""

    image_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of output tokens."""
        side = self.image_size // self.stride
        return side, side

    @property
    def n_patches(self) -> int:
        """N, number of output tokens beside CLS."""
        return self.grid[0] * self.grid[1]

    def validate_grid(self) -> None:
        require_positive(self, "backbone", "image_size")
        below = max(1, self.image_size // self.stride) * self.stride
        require(
            self.image_size % self.stride == 0,
            f"backbone.image_size={self.image_size} is no multiple of the {self.stride} pixels of an output token. Take "
            f"{below} or {below + self.stride}, and crops of that size.",
        )
        require(self.dim % 4 == 0, f"backbone: the width {self.dim} must be a multiple of 4 for the position table.")
        require(0 <= self.drop_path < 1, f"backbone.drop_path must be in 0..1, not {self.drop_path}.")


@dataclass(frozen=True)
class ViTConfig(Section, _Grid):
    """A plain ViT with a CLS token and fixed positions; the defaults are MAE's ViT-B/16 at 224 pixels."""

    kind: ClassVar[str] = "vit"
    has_cls: ClassVar[bool] = True
    image_size: int = 224
    """Side of the square crop, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    dim: int = 768
    """Width of the residual stream."""
    depth: int = 12
    """Number of blocks; block numbers count from 1."""
    heads: int = 12
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer, in units of `dim`."""
    drop_path: float = 0.0
    """Probability of dropping the last block's branches; grows linearly from 0 at the first."""
    fuse_blocks: tuple[int, ...] = ()
    """Blocks whose outputs are summed before the final norm; empty: the last block alone."""
    positions: Literal["mae", "moco"] = "mae"
    """Which half of the fixed position table is for columns: the first (MAE) or the second (MoCo v3, CAE)."""
    layer_scale: float | None = None
    """Initial value of a learned factor a channel on each branch of a block; None: no such factors."""
    hidden: Literal["dropped", "mask-token"] = "dropped"
    """What becomes of hidden patches: the encoder never sees them, or sees a mask token in their place (SimMIM)."""
    init: Literal["mae", "cae"] = "mae"
    """Whose initial patch embedding and CLS token."""

    @property
    def stride(self) -> int:
        return self.patch_size

    def validate(self):
        require_positive(self, "backbone", "patch_size", "dim", "depth", "heads", "mlp_ratio")
        self.validate_grid()
        require(self.dim % self.heads == 0, f"backbone.dim={self.dim} is no multiple of heads={self.heads}.")
        fuse = self.fuse_blocks
        require(
            list(fuse) == sorted(set(fuse)) and all(1 <= block <= self.depth for block in fuse),
            f"backbone.fuse_blocks must be ascending block numbers in 1..{self.depth}, not {fuse}.",
        )


@dataclass(frozen=True)
class MCMAEConfig(Section, _Grid):
    """Two masked-convolution stages, then ViT blocks over the visible tokens; the defaults are MCMAE-B at 224 pixels."""

    kind: ClassVar[str] = "mcmae"
    has_cls: ClassVar[bool] = True
    hidden: ClassVar[str] = "dropped"
    image_size: int = 224
    strides: tuple[int, int, int] = (4, 2, 2)
    """Of the three patch embeddings; their product is the side of an output token, pixels."""
    dims: tuple[int, int, int] = (256, 384, 768)
    """Widths of the three stages."""
    depths: tuple[int, int, int] = (2, 2, 11)
    """Blocks of the three stages."""
    heads: int = 12
    """Of the third stage."""
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    fuse_stages: bool = True
    """Whether strided convolutions of the first two stages are added before the final norm."""

    @property
    def dim(self) -> int:
        return self.dims[-1]

    @property
    def depth(self) -> int:
        """Blocks that see visible tokens only."""
        return self.depths[-1]

    @property
    def stride(self) -> int:
        return self.strides[0] * self.strides[1] * self.strides[2]

    def validate(self):
        require_positive(self, "backbone", "strides", "dims", "depths", "heads", "mlp_ratio")
        self.validate_grid()
        require(self.dim % self.heads == 0, f"backbone.dims={self.dims}: the last is no multiple of heads={self.heads}.")


@dataclass(frozen=True)
class SwinConfig(Section, _Grid):
    """Swin with mask tokens in place of hidden patches (SimMIM); the defaults are Swin-T at 224 pixels. No CLS."""

    kind: ClassVar[str] = "swin"
    has_cls: ClassVar[bool] = False
    hidden: ClassVar[str] = "mask-token"
    image_size: int = 224
    patch_size: int = 4
    embed_dim: int = 96
    """Width of the first stage; every further stage doubles it."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    """Side of an attention window, patches."""
    mlp_ratio: float = 4.0
    drop_path: float = 0.0

    @property
    def dim(self) -> int:
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def validate(self):
        require_positive(self, "backbone", "patch_size", "embed_dim", "depths", "heads", "window", "mlp_ratio")
        require(len(self.depths) == len(self.heads), f"backbone: {len(self.depths)} depths and {len(self.heads)} heads.")
        self.validate_grid()
        for stage, heads in enumerate(self.heads):
            width = self.embed_dim * 2**stage
            require(width % heads == 0, f"backbone.heads: stage {stage + 1} is {width} wide, no multiple of {heads}.")


BackboneConfig = ViTConfig | MCMAEConfig | SwinConfig
