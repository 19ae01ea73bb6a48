"""The processes of one run. Without torch.distributed there is one, and everything here does nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, StudentError


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did, for the length of the block; gives this one's device.

    Any launcher counts that sets what torchrun sets: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and LOCAL_RANK where a machine
    has several. One process alone keeps `device` as it is; of several, `auto` and `cuda` become the GPU of this process's own.
    Raises ConfigError if it was asked for another one, or if WORLD_SIZE speaks of processes that nothing says how to find.
    An error in the block is printed before the process lets go of the others, for that can take long, or fail in its turn.
    """
    n_processes, local_rank = _launched()
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
    except BaseException as error:
        if not isinstance(error, (KeyboardInterrupt, SystemExit)):
            what = str(error) if isinstance(error, StudentError) else "".join(traceback.format_exception(error)).rstrip()
            print(f"Process {os.environ['RANK']} of {n_processes}: {what}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # the first error is the one to tell
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _launched() -> tuple[int, int]:
    """How many processes were started for this run, and this one's place on its machine; ConfigError for what makes no sense."""
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    way_out = "Start all with torchrun --nproc-per-node N -m student ..., or unset WORLD_SIZE to train with one process."
    if given["WORLD_SIZE"] in ("", "1"):
        return 1, 0
    numbers = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT") if given[name]]
    for name in numbers:
        if not (given[name].isascii() and given[name].isdecimal() and len(given[name]) < 10):
            raise ConfigError(f"{name}={given[name][:80]!r} in the environment must be a number. {way_out}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not given[name]]
    world = int(given["WORLD_SIZE"])
    if missing:
        raise ConfigError(f"WORLD_SIZE={world} is set in the environment, but not {', '.join(missing)}. {way_out}")
    if int(given["RANK"]) >= world:
        raise ConfigError(f"RANK={given['RANK']} must be below WORLD_SIZE={world}. {way_out}")
    return world, int(given["LOCAL_RANK"] or 0)


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
