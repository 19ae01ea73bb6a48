"""The teacher of a study, trained where it is not there yet."""

from __future__ import annotations

from pathlib import Path

from teacher_cache.terminal.command import say
from teacher_cache.words import quoted

from ..pretrain import Pretraining, pretrain
from .machine import machine

WEIGHTS = "teacher.safetensors"
PLANS = {"self": Pretraining("self", epochs=8), "supervised": Pretraining("supervised", epochs=4, batch_size=128, rate=1e-3)}
"""Kind -> how it is trained unless told otherwise."""


def train_teacher(plan: Pretraining, train: Path, out: Path, device: str) -> Path:
    """The weights file of a teacher, trained by `plan` if it is not there yet; says what goes on. Raises as `pretrain` does."""

    def told(step: int, steps: int, loss: float, seconds: float) -> None:
        left = seconds / step * (steps - step)
        say(f"teacher  {plan.kind}, step {step:,} of {steps:,}: loss {loss:.3f}, {seconds:.0f} s, about {left:.0f} s left")

    is_new = not (out / WEIGHTS).exists()
    if is_new:
        say(f"teacher  {plan.kind}, {plan.epochs} epochs of {quoted(train)}; interrupted, the same command goes on")
    facts = pretrain(plan, train, out, about={"machine": machine()}, device=device, progress=told)
    assert facts is not None, "only most_steps ends it early"
    if not is_new:
        return out / WEIGHTS
    found = ", ".join(f"{name} {value:.1%}" for name, value in facts["held_out_accuracy"].items())
    say(f"teacher  {out / WEIGHTS}: {facts['seconds']:.0f} s; kNN of {facts['held_out']:,} held-out training images: {found}")
    return out / WEIGHTS
