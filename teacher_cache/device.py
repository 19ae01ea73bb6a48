"""Which device and precision a command means by `auto`, and what a device is called."""

from __future__ import annotations

import functools
from pathlib import Path

from .errors import UsageError

_CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Instructions that multiply bfloat16, as Linux names them; the last is Arm's. Without any it is slower than float32."""


@functools.cache
def cpu_bf16() -> str | None:
    """Which of this processor's instructions multiply bfloat16, by Linux's name; None if there are none."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return None
    features = {feature for name, _, value in lines if name.strip() in ("flags", "Features") for feature in value.split()}
    return next((name for name in _CPU_BF16 if name in features), None)


def require_bf16(device: str) -> None:
    """Raise UsageError if bfloat16 would be a mistake on this device."""
    if device.startswith("cpu") and cpu_bf16() is None:
        raise UsageError(
            f"bf16 on {device}: this processor has no instruction for it ({', '.join(_CPU_BF16)}), so that it would be about "
            "four times slower than fp32. Use fp32."
        )


def pick_device(device: str, precision: str, local_rank: int = 0) -> tuple[str, str]:
    """Resolve `auto`, or UsageError for a device that is not there, or without bf16. local_rank: which GPU is meant if none is
    named. Of the precision, `auto` is bf16 on a GPU, and fp32 on any CPU: what is made must not depend on which one it is."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank:
        device = f"cuda:{local_rank}"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: give auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no GPU here. Give --device cpu, or install torch for your GPU.")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here, counted from cuda:0.")
    if precision == "bf16":
        require_bf16(device)
    return device, ("bf16" if kind == "cuda" else "fp32") if precision == "auto" else precision


def device_name(device) -> str:
    """The kind of a torch.device: a GPU's product name, or `cpu` and the instructions that torch uses there."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
