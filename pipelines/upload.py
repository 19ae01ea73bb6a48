"""Arrays on their way to the device of the training.

To a GPU they travel on a stream of their own, begun in the background as soon as a batch is ready: while the step before
computes. Whoever computes with them calls `Sent.receive`, which makes the stream wait and not the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """Copies that have been begun."""

    tensors: tuple[Tensor, ...]
    """On the device. On a CPU they are the very memory of the arrays."""
    arrived: torch.cuda.Event | None
    """When all are there and the arrays may be written over; None on a CPU."""

    def receive(self) -> tuple[Tensor, ...]:
        """The tensors, for use on the stream that is current now."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.arrived)
            for tensor in self.tensors:  # its memory belongs to the other stream, which must not take it back too soon
                tensor.record_stream(stream)
        return self.tensors


class Upload:
    """Sends arrays to one device. Any thread may send."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = self.stream.device if self.stream else device  # "cuda" means another one in another thread

    def send(self, arrays: Sequence[np.ndarray]) -> Sent:
        """Begin to copy `arrays`. From pinned memory it goes on beside other work; they must not change until it is done."""
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        if self.stream is None:
            return Sent(tensors, None)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            there = tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return Sent(there, arrived)
