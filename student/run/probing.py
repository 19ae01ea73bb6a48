"""Probes of a run: what its weights are good for while it goes on, without a change of the run.

A probe is due at the begin of a run, behind every so many epochs and at the end; it is asked when its step is saved. So one that
an interruption or a kill left out is asked when the run goes on, before its next step, and none is asked twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Probe:
    """What is asked of the encoder, and how often."""

    measure: Callable[[nn.Module], dict]
    """Encoder -> ProbeReport.probe without its seconds. The encoder must be left as it was."""
    every: int = 1
    """Epochs between two of them; at least 1."""

    def is_due(self, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether it is asked behind `step` completed ones."""
        return step % (self.every * steps_per_epoch) == 0 or step == total_steps

    def ask(self, encoder: nn.Module, device: torch.device) -> dict:
        """ProbeReport.probe of the encoder on `device`. No random number of torch's generators is used up."""
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            found = self.measure(encoder)
        return found | {"seconds": round(time.perf_counter() - began, 3)}


def sentence(epoch: float, found: dict) -> str:
    """What is printed of a probe: `probe    epoch 3: knn 93.1% (cls/20), mean/20 92.8% ...`, the value that counts first."""
    main, values = found["main"], found["values"]
    others = ", ".join(f"{name} {value:.1%}" for name, value in values.items() if name != main)
    return f"probe    epoch {epoch:g}: {found['name']} {values[main]:.1%} ({main})" + (f"; {others}" if others else "")
