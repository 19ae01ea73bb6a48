"""The initialisation all MAE-family modules share (MAE models_mae.py:65-93)."""

from __future__ import annotations

from torch import nn


def init_linear_and_norm(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear in `module`, gain 1 and bias 0 for every LayerNorm."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm) and child.elementwise_affine:
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


def init_narrow(parameter: nn.Parameter) -> None:
    """A normal of standard deviation .02, cut off at one deviation (CAE modeling_cae_helper.py:9-10)."""
    nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
