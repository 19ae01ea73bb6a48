"""Arrays on their way to the device of the training.

To a GPU they travel on a stream of their own, begun in the background as soon as a batch is ready: while the step before
computes. Whoever computes with them calls `Sent.receive`, which makes the stream wait and not the host, and `Sent.used` when
all that uses them is queued.
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
    done: torch.cuda.Event | None
    """When all are there, or once `used` was called when nothing queued so far needs them; None on a CPU."""

    def receive(self) -> tuple[Tensor, ...]:
        """The tensors, for use on the stream that is current now."""
        if self.done is not None:
            stream = self._current_stream()
            stream.wait_event(self.done)
            for tensor in self.tensors:  # its memory belongs to the other stream, which must not take it back too soon
                tensor.record_stream(stream)
        return self.tensors

    def used(self) -> None:
        """Let `done` wait for what is queued now, too: so no more batches lie on the device than their sender has slots."""
        if self.done is not None:
            self.done.record(self._current_stream())

    def _current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.tensors[0].device)


class Upload:
    """Sends arrays to one device. Any thread may send."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = self.stream.device if self.stream else device  # "cuda" means another one in another thread

    def enter(self) -> None:
        """To be called first in a thread that sends or waits: CUDA would begin with the first GPU there."""
        if self.stream is not None:
            torch.cuda.set_device(self.device)

    def is_quick(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether copies of `arrays` go on beside other work: they lie in pinned memory, or nothing is copied."""
        return self.stream is None or all(torch.from_numpy(array).is_pinned() for array in arrays)

    def send(self, arrays: Sequence[np.ndarray]) -> Sent:
        """Begin to copy `arrays`. From pinned memory it goes on beside other work; they must not change until it is done."""
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.stream is None:
            return Sent(tuple(tensors), None)
        is_pinned = [tensor.is_pinned() for tensor in tensors]
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            try:
                # Those that are not pinned first: the host waits for them, and for what was begun before them.
                for i in sorted(range(len(tensors)), key=is_pinned.__getitem__):
                    tensors[i] = tensors[i].to(self.device, non_blocking=is_pinned[i])
            except BaseException:
                self.stream.synchronize()  # nobody would know that the others are still being read
                raise
            done.record(self.stream)
        return Sent(tuple(tensors), done)
