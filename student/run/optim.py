"""AdamW as the MAE family uses it: which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import OptimConfig, TrainConfig
from ..errors import ConfigError


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`; its learning rate is 0 until the trainer sets it.

    Exempt from weight decay: biases, norms and all else with one axis, and what a module names in `no_decay` (MaskAlign's
    mixing weights, SimMIM's mask token). Otherwise CLS and mask tokens, with three axes, do decay, as in MAE, MaskAlign, MILAN
    and CAE, which give timm's grouping no names to skip.
    """
    exempt = {f"{path}.{name}" for path, module in model.named_modules() for name in getattr(module, "no_decay", ())}
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)

    on_cuda = any(parameter.is_cuda for parameter in decayed)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=on_cuda)


def set_hyperparameters(optimizer: torch.optim.AdamW, model: nn.Module, config: OptimConfig) -> None:
    """Let an optimizer that `build_optimizer` gave go on by another config: all but the learning rate, which the trainer sets.

    Raises ConfigError if that config groups the parameters in another way.
    """
    groups = build_optimizer(model, config).param_groups
    members = [[[id(parameter) for parameter in group["params"]] for group in of] for of in (optimizer.param_groups, groups)]
    if members[0] != members[1]:
        raise ConfigError("These settings of optim group the weights in another way than the run has begun with.")
    for there, wanted in zip(optimizer.param_groups, groups, strict=True):
        there.update({key: value for key, value in wanted.items() if key not in ("params", "lr")})


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
