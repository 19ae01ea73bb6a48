"""Batches on their way to a GPU: in which order copies, waits and buffers follow each other. The GPU is made up."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_pipelines_loader import loader_of

from pipelines.feed import loader, upload
from pipelines.feed.cached_source import CachedSource
from pipelines.feed.upload import Upload
from student.batch import Needs

GPU = torch.device("cuda", 1)


class MadeUpGpu:
    """Stands in for torch in pipelines.feed.upload and notes what is asked of it, in order. Its tensors are arrays."""

    def __init__(self):
        self.said, self.now, self.pinned = [], threading.local(), lambda array: True
        self.cuda = SimpleNamespace(Stream=self.new_stream, Event=self.event, stream=self.on_stream, set_device=self.set_device,
                                    current_stream=self.current_stream)  # fmt: skip

    def new_stream(self, device):
        assert device in (GPU, torch.device("cuda"))
        return SimpleNamespace(name="copies", device=GPU, synchronize=lambda: self.said.append(("host waited for", "copies")))

    def event(self):
        event = SimpleNamespace()
        event.record = lambda stream: self.said.append(("recorded", id(event), stream.name))
        event.synchronize = lambda: self.said.append(("host waited", id(event), self.now.device))
        return event

    def set_device(self, device):
        self.now.device = device

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
            assert device == GPU and non_blocking == self.pinned(array)
            if array.dtype == "complex64":
                raise torch.OutOfMemoryError
            self.said.append(("copied", id(array), self.now.stream))
            keep = lambda stream: self.said.append(("kept for", id(array), stream.name))  # noqa: E731
            return SimpleNamespace(values=array.copy(), device=device, record_stream=keep)

        return SimpleNamespace(to=to, is_pinned=lambda: self.pinned(array))


@pytest.fixture
def gpu(monkeypatch) -> MadeUpGpu:
    gpu = MadeUpGpu()
    monkeypatch.setattr(upload, "torch", gpu)
    return gpu


def test_copies_have_a_stream_of_their_own(gpu):
    """Copies and their event go to the upload's stream; the stream that computes waits for the event and keeps the memory."""
    first, second = np.zeros(2), np.ones(3)
    sent = Upload(torch.device("cuda")).send([first, second])  # which one is known from where it is made
    event = id(sent.done)
    assert gpu.said == [("copied", id(first), "copies"), ("copied", id(second), "copies"), ("recorded", event, "copies")]
    del gpu.said[:]
    assert [tensor.values.tolist() for tensor in sent.receive()] == [[0, 0], [1, 1, 1]]
    assert gpu.said == [("stream waits", event), ("kept for", id(first), "compute"), ("kept for", id(second), "compute")]
    del gpu.said[:]
    sent.used()
    assert gpu.said == [("recorded", event, "compute")]


def test_what_is_not_pinned_goes_first(gpu):
    """The host waits for copies from other than pinned memory, so nothing of this batch may be begun before them."""
    arrays = [np.zeros(2), np.ones(3), np.ones(4)]
    gpu.pinned = lambda array: len(array) != 3
    sent = Upload(GPU).send(arrays)
    assert [told[1] for told in gpu.said[:3]] == [id(arrays[i]) for i in (1, 0, 2)]
    assert [len(tensor.values) for tensor in sent.tensors] == [2, 3, 4]


def test_a_copy_that_fails_leaves_none_under_way(gpu):
    """When memory runs out in the middle of a batch, the copies that were begun are over before anybody hears of it."""
    first = np.zeros(2)
    with pytest.raises(torch.OutOfMemoryError):
        Upload(GPU).send([first, np.zeros(2, "complex64")])
    assert gpu.said == [("copied", id(first), "copies"), ("host waited for", "copies")]


def test_on_a_cpu_nothing_is_copied():
    """Without a GPU the tensors are the arrays."""
    array = np.zeros(3)
    (tensor,) = Upload(torch.device("cpu")).send([array]).receive()
    array[1] = 7
    assert tensor.tolist() == [0, 7, 0]


def test_a_buffer_is_not_written_over_before_it_is_used(shared_cache, gpu, monkeypatch):
    """Every batch is waited for by the stream that computes before it is handed out; the host waits until all that used a slot is
    done before it is filled again, in a later epoch too, where it was last left by a consumer that went away.
    """
    loader = loader_of(shared_cache)
    loader.upload = Upload(GPU)
    run = loader.run

    def noting(rows, slot, *patches):
        gpu.said.append(("filled", slot))
        return run(rows, slot, *patches)

    monkeypatch.setattr(loader, "run", noting)
    rows = np.arange(24).reshape(6, 4)
    for n_taken in (6, 2, 6):
        batches = loader.batches(rows)
        for expected in rows[:n_taken]:
            raw = next(batches)
            gpu.said.append(("handed out", id(raw)))
            assert raw.rows.tolist() == expected.tolist() and raw.images.values.shape == (4, 32, 32, 3)
        batches.close()

    of_slot, waited_for, slots = {}, [], []  # the last event of each slot; those waited for since a slot was filled
    n_waits, n_kept, n_handed_out, used = 0, 0, 0, []  # of each batch images and records are kept
    for what, *told in gpu.said:
        if what == "host waited":
            waited_for.append(told[0])
            assert told[1] == GPU
        elif what == "filled":
            slots.append(told[0])
            assert waited_for == ([of_slot[told[0]]] if told[0] in of_slot else [])
            waited_for = []
        elif what == "recorded" and told[1] == "copies":
            of_slot[slots[-1]] = told[0]
        elif what == "recorded":
            used.append(told[0])
        n_waits += what == "stream waits"
        n_kept += what == "kept for"
        n_handed_out += what == "handed out"
        assert what != "handed out" or (n_waits, n_kept) == (n_handed_out, 2 * n_handed_out)
    assert n_handed_out == 14 and slots[:6] == [0, 1, 2, 3, 0, 1]
    assert len(used) == 5 + 1 + 5  # a batch is used when the next one is asked for


def test_sources_send_to_their_device(shared_cache, monkeypatch):
    """Batches go where the training is; if they cannot be pinned, that is said once."""
    devices = []

    class Noted(Upload):
        def __init__(self, device):
            devices.append(device)
            super().__init__(torch.device("cpu"))

        def is_quick(self, arrays):
            assert [array.dtype for array in arrays] == ["uint8", "uint8"]
            return False

    monkeypatch.setattr(loader, "Upload", Noted)
    said = []
    monkeypatch.setattr(loader.log, "warning", lambda message, *values: said.append(message))
    source = CachedSource(shared_cache, ["fake"], [Needs((-1,))], batch_size=8)
    source.device = torch.device("meta")
    batches = source.micro_batches(0, 1)
    with contextlib.suppress(Exception):  # tensors of two devices
        next(batches)
    batches.close()
    assert devices == [torch.device("meta")] and len(said) == 1 and "pinned memory" in said[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_on_a_gpu_batches_are_those_of_the_cpu(shared_cache, accumulate):
    """Over two epochs, with a stream that is kept busy, every batch is the one that the CPU gets."""
    options = {"batch_size": 8, "accumulate": accumulate}
    needs = [Needs((-2, -1), attention=True)]
    sources = [CachedSource(shared_cache, ["fake"], needs, device=device, **options) for device in ("cpu", "cuda")]
    busy = torch.zeros(4096, 4096, device="cuda")
    kept = []
    for batch in sources[1].micro_batches(0, 6):
        for _ in range(20):
            busy = busy @ busy
        kept.append((batch.images.clone(), batch.targets[0].tokens.clone(), batch.targets[0].attention.clone()))
    for batch, (images, tokens, attention) in zip(sources[0].micro_batches(0, 6), kept, strict=True):
        torch.testing.assert_close(images.cpu(), batch.images)
        torch.testing.assert_close(tokens.cpu(), batch.targets[0].tokens)
        assert torch.equal(attention.cpu(), batch.targets[0].attention)
