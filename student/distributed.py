"""The processes of one run. Without torch.distributed there is one, and everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError
from .launch import launch_of


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did, for the length of the block; gives this one's device.

    One process alone keeps `device` as it is; of several, `auto` and `cuda` become the GPU of this process's own. Raises
    ConfigError if it was asked for another one, or if the environment says half of how the processes meet (launch.py).
    """
    launch = launch_of()
    n_processes, local_rank = launch.n_processes, launch.local_rank
    if n_processes == 1:
        yield device
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise ConfigError(
            f"--device {device}: {n_processes} processes were started; each takes its own GPU. Give auto, cuda or cpu."
        )
    dist.init_process_group("nccl" if device != "cpu" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def local_processes() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all processes; gradients flow back to all of them."""
    return _Summed.apply(values) if world_size() > 1 else values


class _Summed(torch.autograd.Function):
    """All processes get the sum, so the gradient of each one's part is the sum of all gradients."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def any_of(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds in any process."""
    if world_size() == 1:
        return condition
    count = torch.tensor(int(condition), device=device)
    dist.all_reduce(count)
    return bool(count)


@torch.no_grad()
def gathered(values: Tensor) -> Tensor:
    """`values` [n, ...] of all processes, one behind the other by rank: [world * n, ...]; no gradient."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
