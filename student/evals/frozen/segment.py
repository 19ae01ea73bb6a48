"""Linear segmentation: one linear layer on frozen patch tokens says the class of every pixel.

Batch norm without affine, then a linear layer on each token; its logits are enlarged bilinearly to the pixels of the mask.
AdamW, half a cosine. The score is mIoU as ADE20K, Cityscapes and VOC define it: intersections and unions are summed over all
images, then divided class by class, then averaged over the classes that occur.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...seeds import position_seed
from ..schedule import rate_at
from ..watch import Watch, unwatched

# n images, N patches in a grid of rows x columns, D width, K classes, S side of a mask, pixels

IGNORED = 255


@dataclass(frozen=True)
class Segmented:
    """Patch tokens of images and the classes of their pixels."""

    tokens: Tensor  # float16 [n, N, D], on the CPU
    masks: Tensor  # uint8 [n, S, S], IGNORED where a pixel has no class


def mean_iou(said: Tensor, true: Tensor, n_classes: int) -> tuple[float, list[float]]:
    """(mIoU over the classes that occur in either, IoU of each class, NaN where it occurs in none), 0..1.

    said, true: int [n, S, S]; pixels that are IGNORED in `true` do not count.
    """
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(n_classes, average="none", ignore_index=IGNORED, validate_args=False)
    metric.update(said.long(), true.long())
    counted = metric.confmat
    occurs = (counted.sum(0) + counted.sum(1)) > 0
    by_class = [float(value) if there else float("nan") for value, there in zip(metric.compute(), occurs, strict=True)]
    there = [value for value in by_class if value == value]
    return sum(there) / len(there), by_class


class PixelHead(nn.Module):
    """Batch norm without affine and a linear layer, token by token."""

    def __init__(self, width: int, n_classes: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """float32 [B, K, side, side] of tokens [B, N, D]."""
        flat = self.linear(self.norm(tokens.float().flatten(0, 1)))
        logits = flat.view(len(tokens), *self.grid, -1).permute(0, 3, 1, 2)
        return F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Segment:
    epochs: int = 20
    rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 16
    name = "segment"
    main = "miou"
    draws = True

    @property
    def protocol(self) -> str:
        return (
            f"segment: batch norm and linear layer on patch tokens, AdamW {self.rate:g}, weight decay {self.weight_decay:g}, "
            f"{self.epochs} epochs of batches of {self.batch_size}, half a cosine; mIoU over all pixels of middle crops"
        )

    def score(
        self,
        train: Segmented,
        val: Segmented,
        grid: tuple[int, int],
        seed: int = 0,
        watch: Watch = unwatched,
        device: str | torch.device = "cpu",
    ) -> Iterator[tuple[str, float]]:
        """Yields "miou", "pixels" (share of right pixels) and "at CLASS" (IoU), all in 0..1."""
        n_classes = number_of_classes(train, val)
        head = self._fit(train, n_classes, grid, seed, watch, torch.device(device)).eval()
        side, said = val.masks.shape[-1], []
        with torch.no_grad():
            for tokens in val.tokens.split(self.batch_size):
                said.append(head(tokens.to(device), side).argmax(1).to(torch.uint8).cpu())
        said = torch.cat(said)
        whole, by_class = mean_iou(said, val.masks, n_classes)
        counts = val.masks != IGNORED
        yield "miou", whole
        yield "pixels", float((said == val.masks)[counts].double().mean())
        for label, value in enumerate(by_class):
            yield f"at {label}", value

    def _fit(self, data: Segmented, n_classes: int, grid, seed: int, watch: Watch, device: torch.device) -> PixelHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(position_seed("segment", seed, 0) % 2**63)
            head = PixelHead(data.tokens.shape[-1], n_classes, grid).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.rate, weight_decay=self.weight_decay)
        n, side = len(data.tokens), data.masks.shape[-1]
        batch_size = min(self.batch_size, n)
        n_batches = n // batch_size
        with watch("segment", self.epochs, "epochs") as advance:
            for epoch in range(self.epochs):
                order = torch.randperm(n, generator=torch.Generator().manual_seed(position_seed("segment order", seed, epoch)))
                for index in range(n_batches):
                    rows = order[index * batch_size : (index + 1) * batch_size]
                    masks = data.masks[rows].to(device).long()
                    if (masks == IGNORED).all():
                        continue  # nothing to learn from, and the mean over no pixels is not a number
                    for group in optimizer.param_groups:
                        group["lr"] = rate_at(epoch + index / n_batches, self.rate, self.epochs, 0)
                    loss = F.cross_entropy(head(data.tokens[rows].to(device), side), masks, ignore_index=IGNORED)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                advance(1)
        return head


def number_of_classes(train: Segmented, val: Segmented) -> int:
    """Of masks whose values count from 0. Raises ConfigError where val has a class that train lacks, or there is but one."""
    seen = [set(part.masks.unique().tolist()) - {IGNORED} for part in (train, val)]
    if unknown := sorted(seen[1] - seen[0]):
        raise ConfigError(f"The masks of --val have {len(unknown)} classes that those of --train lack: {unknown[:5]}. "
                          "Their values must mean the same in both folders; 255 is a pixel of no class.")  # fmt: skip
    if len(seen[0]) < 2 or not seen[1]:
        raise ConfigError("The masks have fewer than two classes: there is nothing to tell apart. Values count from 0.")
    return max(seen[0]) + 1
