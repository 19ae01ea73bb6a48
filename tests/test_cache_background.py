"""The thread that writes shards: order, back-pressure, and errors that reach whoever waits."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from cache_fakes import contents
from store_fakes import begin, fill, make_store, same, spec_of, values_of

from teacher_cache.extraction.background import THREAD, BackgroundWriter
from teacher_cache.store.folding import fold
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.store import Store
from teacher_cache.store.writer import ShardWriter


def put_all(out: BackgroundWriter, spec, arrays, shards=None, batch=2) -> None:
    for shard in range(spec.n_shards) if shards is None else shards:
        rows = spec.rows_of(shard)
        for start in range(rows.start, rows.stop, batch):
            stop = min(start + batch, rows.stop)
            out.put(shard, {name: values[start:stop] for name, values in arrays.items()}, is_last=stop == rows.stop)


@pytest.fixture
def begun(tmp_path):
    """A store without rows, and what belongs into it."""
    spec = spec_of(codec="zstd")
    begin(tmp_path / "s.zarr", spec)
    return tmp_path / "s.zarr", spec, values_of(spec)


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
def test_the_same_bytes(tmp_path, codec):
    """A store written in the background is to the byte the one written in the foreground; every row is counted."""
    spec, counted = spec_of(codec=codec), []
    arrays = make_store(tmp_path / "foreground" / "s.zarr", spec)
    path = tmp_path / "background" / "s.zarr"
    begin(path, spec)
    with BackgroundWriter(Store.open(path), counted.append) as out:
        put_all(out, spec, arrays)
    fold(Store.open(path))
    assert contents(path.parent) == contents(tmp_path / "foreground") and sum(counted) == spec.n_rows
    assert not [thread for thread in threading.enumerate() if thread.name.startswith((THREAD, "checksum"))]


def test_back_pressure(begun, monkeypatch):
    """No more batches wait than are allowed: `put` waits while the disk does, and the time is told."""
    path, spec, arrays = begun
    gate, append, n_put = threading.Event(), ShardWriter.append, []
    monkeypatch.setattr(ShardWriter, "append", lambda *arguments: gate.wait(30) and append(*arguments))
    with BackgroundWriter(Store.open(path), lambda n: None, ahead=1) as out:

        def produce():
            for shard in range(spec.n_shards):
                put_all(out, spec, arrays, [shard], batch=3)
                n_put.append(shard)

        producer = threading.Thread(target=produce)
        producer.start()
        producer.join(0.5)
        assert producer.is_alive() and len(n_put) <= 2  # one is being written, one waits
        gate.set()
        producer.join(30)
        assert n_put == [0, 1, 2]
    assert out.waited_s > 0.3
    assert same(StoreReader(path).read("tokens/03", range(7)), arrays["tokens/03"])


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_an_error_reaches_the_caller(begun, monkeypatch, fails_at):
    """What goes wrong in the thread is raised to the caller, who never hangs; shards before it are kept, none is left aside."""
    path, spec, arrays = begun
    append, n_calls = ShardWriter.append, 0

    def failing(*arguments):
        nonlocal n_calls
        n_calls += 1
        if n_calls == fails_at:
            raise OSError(28, "No space left on device")
        append(*arguments)

    monkeypatch.setattr(ShardWriter, "append", failing)
    with pytest.raises(OSError, match="No space left"), BackgroundWriter(Store.open(path), lambda n: None) as out:
        put_all(out, spec, arrays)
    assert StoreReader(path).finished.tolist() == [fails_at > 2, False, False] and not list(path.rglob("*.partial"))


def test_leaving_early_on_a_disk_that_fails(begun, monkeypatch):
    """Left by an exception while files cannot even be removed, the writer ends all the same, with that exception."""
    path, _, arrays = begun
    monkeypatch.setattr(ShardWriter, "_abandon", lambda self: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(Store.open(path), lambda n: None) as out:
        out.put(0, {name: values[:2] for name, values in arrays.items()}, is_last=False)
        raise KeyboardInterrupt


def test_leaving_early(begun):
    """Left by an exception, what was put is still written: whole shards are kept, the one that is not whole is given up."""
    path, spec, arrays = begun
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(Store.open(path), lambda n: None) as out:
        put_all(out, spec, arrays, [0])
        out.put(1, {name: values[3:5] for name, values in arrays.items()}, is_last=False)
        raise KeyboardInterrupt
    assert StoreReader(path).finished.tolist() == [True, False, False] and not list(path.rglob("*.partial"))
    fill(path, spec, arrays, [1, 2])
    assert same(StoreReader(path).read("scale", np.arange(7)), arrays["scale"])
