"""The learning rate of every step."""

from __future__ import annotations

import math

from ..config import OptimConfig, TrainConfig


def learning_rate(step: int, steps_per_epoch: int, epochs: int, batch_size: int, config: OptimConfig) -> float:
    """The learning rate of a step, counted from 0, by the law `config.schedule` names: a warm-up, then half a cosine.

    mae: linear over the warm-up, the first step behind it has the peak; the cosine spans the rest (MAE util/lr_sched.py).
    simmim: as mae, but the cosine spans all steps, of which the warm-up hides the start, so the rate falls at its end; and a
    step takes the rate of the one before it, as the scheduler hears of a step when that is done (SimMIM lr_scheduler.py,
    main_simmim.py; timm's CosineLRScheduler).
    beit: the last step of the warm-up has the peak already, and the first behind it once more (CAE furnace/utils.py).
    All start from `warmup_start` and head for `min_lr`, which no step quite has.
    """
    peak, start = config.peak_lr(batch_size), config.warmup_start
    if config.schedule == "mae":  # in epochs, which a warm-up need not fill
        step, warmup, total = step / steps_per_epoch, config.warmup_epochs, epochs
    else:
        warmup, total = int(config.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
    if config.schedule == "simmim":
        step = max(step - 1, 0)
    if step < warmup:
        rise = max(warmup - 1, 1) if config.schedule == "beit" else warmup
        return start + (peak - start) * step / rise
    skipped = 0 if config.schedule == "simmim" else warmup
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * (step - skipped) / (total - skipped)))


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step of a run."""
    steps = range(config.epochs * steps_per_epoch)
    return [learning_rate(step, steps_per_epoch, config.epochs, config.batch_size, config.optim) for step in steps]
