"""Which device and precision a command means by `auto`, and what a device is called."""

from __future__ import annotations

from .errors import UsageError


def pick_device(device: str, precision: str, local_rank: int = 0) -> tuple[str, str]:
    """Resolve `auto`, or UsageError for a device that is not there. local_rank: which GPU is meant if none is named."""
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
    return device, ("bf16" if kind == "cuda" else "fp32") if precision == "auto" else precision


def device_name(device) -> str:
    """The kind of a torch.device: a GPU's product name, or `cpu` and the instructions that torch uses there."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
