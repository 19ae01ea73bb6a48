"""The learning rate of probes and of fine-tuning."""

from __future__ import annotations

import math


def rate_at(epoch: float, peak: float, epochs: int, warmup: float, lowest: float = 0.0) -> float:
    """The learning rate at a moment, in epochs: linear over the warm-up, then half a cosine to `lowest` (MAE lr_sched.py)."""
    if epoch < warmup:
        return peak * epoch / warmup
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
