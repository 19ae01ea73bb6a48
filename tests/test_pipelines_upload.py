"""Batches on their way to a GPU: in which order copies, waits and buffers follow each other. The GPU is made up."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_pipelines_loader import loader_of

from pipelines import upload
from pipelines.upload import Upload

GPU = torch.device("cuda", 1)


class MadeUpGpu:
    """Stands in for torch in pipelines.upload and notes what is asked of it, in order. Its tensors are arrays."""

    def __init__(self):
        self.said, self.now = [], threading.local()
        self.cuda = SimpleNamespace(Stream=self.new_stream, Event=self.event, device=self.on_device, stream=self.on_stream,
                                    current_stream=self.current_stream)  # fmt: skip

    def new_stream(self, device):
        assert device in (GPU, torch.device("cuda"))
        return SimpleNamespace(name="copies", device=GPU)

    def event(self):
        event = SimpleNamespace()
        event.record = lambda stream: self.said.append(("recorded", id(event), stream.name))
        event.synchronize = lambda: self.said.append(("host waited", id(event)))
        return event

    @contextlib.contextmanager
    def on_device(self, device):
        self.now.device = device
        yield

    @contextlib.contextmanager
    def on_stream(self, stream):
        self.now.stream = stream.name
        yield
        self.now.stream = "compute"

    def current_stream(self, device):
        assert device == GPU
        return SimpleNamespace(name="compute", wait_event=lambda event: self.said.append(("stream waits", id(event))))

    def from_numpy(self, array):
        def to(device, non_blocking):
            assert device == self.now.device == GPU and non_blocking
            self.said.append(("copied", id(array), self.now.stream))
            keep = lambda stream: self.said.append(("kept for", id(array), stream.name))  # noqa: E731
            return SimpleNamespace(values=array.copy(), device=device, record_stream=keep)

        return SimpleNamespace(to=to)


@pytest.fixture
def gpu(monkeypatch) -> MadeUpGpu:
    gpu = MadeUpGpu()
    monkeypatch.setattr(upload, "torch", gpu)
    return gpu


def test_copies_have_a_stream_of_their_own(gpu):
    """Copies and their event go to the upload's stream; the stream that computes waits for the event and keeps the memory."""
    first, second = np.zeros(2), np.ones(3)
    sent = Upload(torch.device("cuda")).send([first, second])  # which one is known from where it is made
    event = id(sent.arrived)
    assert gpu.said == [("copied", id(first), "copies"), ("copied", id(second), "copies"), ("recorded", event, "copies")]
    del gpu.said[:]
    assert [tensor.values.tolist() for tensor in sent.receive()] == [[0, 0], [1, 1, 1]]
    assert gpu.said == [("stream waits", event), ("kept for", id(first), "compute"), ("kept for", id(second), "compute")]


def test_on_a_cpu_nothing_is_copied():
    """Without a GPU the tensors are the arrays."""
    array = np.zeros(3)
    (tensor,) = Upload(torch.device("cpu")).send([array]).receive()
    array[1] = 7
    assert tensor.tolist() == [0, 7, 0]


def test_a_buffer_is_not_written_over_before_it_is_copied(shared_cache, gpu, monkeypatch):
    """The host waits for the event of the last copy from a slot before the slot is filled again, in a later epoch too."""
    loader = loader_of(shared_cache)
    loader.upload = Upload(GPU)
    run = loader.run

    def noting(rows, slot, *patches):
        gpu.said.append(("filled", slot))
        return run(rows, slot, *patches)

    monkeypatch.setattr(loader, "run", noting)
    rows = np.arange(24).reshape(6, 4)
    for _ in range(2):
        for raw, expected in zip(loader.batches(rows), rows, strict=True):
            assert raw.rows.tolist() == expected.tolist() and raw.images.values.shape == (4, 32, 32, 3)

    of_slot, waited_for, slots = {}, [], []  # the last event of each slot; those waited for since a slot was filled
    for what, *told in (entry for entry in gpu.said if entry[0] in ("host waited", "filled", "recorded")):
        if what == "host waited":
            waited_for.append(told[0])
        elif what == "filled":
            slots.append(told[0])
            assert waited_for == ([of_slot[told[0]]] if told[0] in of_slot else [])
            waited_for = []
        else:
            of_slot[slots[-1]] = told[0]
    assert slots == 2 * [0, 1, 2, 3, 0, 1]
