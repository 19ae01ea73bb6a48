"""AdamW as the MAE family uses it: which parameters decay."""

from __future__ import annotations

import torch
from torch import nn

from ..config import OptimConfig
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
