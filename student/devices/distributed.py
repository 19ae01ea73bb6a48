"""The processes of one run. Without torch.distributed there is one, and everything here does nothing.

One that fails says so in the store that all of them share, and every wait for the others looks there: nobody waits for a
process that will not come. What they exchange beside gradients goes over CPUs, which a GPU's queue cannot hold up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, PeerFailedError
from .launch import launch_of

FAILED = "student/failed"
"""Key in the shared store: what the process that failed says."""
LOOK_EVERY = 0.3
"""Seconds between two looks at it while waiting."""


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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    try:
        yield device
    except BaseException as error:
        if isinstance(error, Exception):  # at once: leaving the group may fail itself, hang, or end the process
            print(f"Process {rank()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        tell_failure(str(error) or type(error).__name__)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
        raise
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
    """All processes get the sum, so the gradient of what each one gave is the sum of all gradients."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return _sum_of_all(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _sum_of_all(gradient)


def _sum_of_all(values: Tensor) -> Tensor:
    total = values.clone()
    if torch.compiler.is_compiling() or total.is_cuda:  # one graph, which knows no other way; on a GPU the device waits anyhow
        dist.all_reduce(total)
    else:
        _finish(dist.all_reduce(total, async_op=True), total)
    return total


def tell_failure(text: str) -> None:
    """Let the others know that this process will not come to the next meeting; the first that says so is heard."""
    if world_size() > 1:
        with contextlib.suppress(RuntimeError):  # the store went with its process: there is nobody left to tell
            store = dist.distributed_c10d._get_default_store()
            if not store.check([FAILED]):
                store.set(FAILED, f"{rank()} {text}")


def abandon() -> None:
    """After a failure: leave what the GPU still waits for. The processes have nothing to say to each other any more."""
    if world_size() > 1 and torch.device("cuda") in dist.group.WORLD._device_types:
        dist.group.WORLD.abort()


def _finish(work: dist.Work, values: Tensor) -> None:
    """Wait until a collective is done. On a GPU the device waits, in its own order; on a CPU the host does, and raises
    PeerFailedError when another process has failed.
    """
    if values.device.type == "cpu":
        # asked again and again: a callback would be run by a thread of the group, which may outlive the interpreter
        looked, pause = time.monotonic(), 5e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 5e-3)
            if time.monotonic() - looked > LOOK_EVERY:
                _require_peers()
                looked = time.monotonic()
    try:
        work.wait()
    except RuntimeError:
        _require_peers()  # its connections end with a process
        raise


def _require_peers() -> None:
    try:
        store = dist.distributed_c10d._get_default_store()
        if not store.check([FAILED]):
            return
        failed, _, text = store.get(FAILED).decode().partition(" ")
    except RuntimeError:
        failed, text = 0, "the store that all processes share has gone with it"
    raise PeerFailedError(int(failed), text)


def sharing_gradients(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as one whose gradients are the mean over all processes; itself where there is one. Every process calls it."""
    if world_size() == 1:
        return model
    barrier()  # finds out who failed before this; the next line waits for all and does not look
    shared = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if device.type == "cpu":
        shared.register_comm_hook(None, _averaged_on_cpu)
    return shared


def _averaged_on_cpu(_, bucket):  # torch compares annotations, and would not know these as text
    """A hook of DistributedDataParallel: the mean of a bucket of gradients over all processes, waited for as everything here."""
    gradients = bucket.buffer().div_(world_size())
    _finish(dist.all_reduce(gradients, async_op=True), gradients)
    result = torch.futures.Future()
    result.set_result(gradients)
    return result


def barrier() -> None:
    """Wait until every process is here."""
    any_of(False)


@torch.no_grad()
def any_of(condition: bool) -> bool:
    """Whether `condition` holds in any process."""
    if world_size() == 1:
        return condition
    count = torch.tensor(int(condition))
    _finish(dist.all_reduce(count, async_op=True), count)
    return bool(count)


@torch.no_grad()
def gathered(values: Tensor) -> Tensor:
    """`values` [n, ...] of all processes, one behind the other by rank: [world * n, ...]; no gradient."""
    if world_size() == 1:
        return values
    by_rank = [torch.empty_like(values) for _ in range(world_size())]
    _finish(dist.all_gather(by_rank, values.contiguous(), async_op=True), values)
    return torch.cat(by_rank)
