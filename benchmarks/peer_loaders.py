"""The loaders that the joined loader is compared with, each holding the very crops (JPEG bytes) and rows, each as fast as we
could make it: no shuffling for the streaming formats, batches collated straight into shared memory, and for all of them FFCV's
own JPEG decoder, so that pixels are equal bit for bit and what differs is the loader.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from teacher_cache.crops.beton import CropReader
from teacher_cache.store.reader import StoreReader


def decode(data, size: int) -> torch.Tensor:
    """uint8 [size, size, 3] of one encoded JPEG (bytes or an array of bytes)."""
    from teacher_cache.kernels.loops import OK, crc32c_at, decode_one

    source, out = np.frombuffer(data, "u1"), np.empty((size, size, 3), "u1")
    address, n_bytes = np.uint64(source.ctypes.data), np.uint64(len(source))
    if decode_one(address, n_bytes, crc32c_at(address, n_bytes), True, out) != OK:
        raise ValueError("a JPEG that cannot be decoded")
    return torch.from_numpy(out)


class Samples:
    """Encoded crop and record of each row, as the peers' files are made from."""

    def __init__(self, crops: CropReader, store: StoreReader, arrays: list[str]):
        self.crops, self.store, self.arrays = crops, store, arrays

    def __len__(self) -> int:
        return len(self.crops)

    def jpeg(self, row: int) -> bytes:
        start = int(self.crops.pointers[row])
        return self.crops.bytes[start : start + int(self.crops.sizes[row])].tobytes()

    def record(self, row: int) -> bytes:
        return b"".join(self.store.read(array, [row]).tobytes() for array in self.arrays)


def _workers_of(n_workers: int) -> dict:
    """Options of a DataLoader. Workers come from a server that has imported what they need and runs no threads of numba."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "teacher_cache.kernels.loops", "zarr"])
    return {"num_workers": n_workers, "persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": context}


class ZarrDataset(Dataset):
    """Crops out of crops.beton, rows through zarr-python, one index at a time (a list of indices is ten times slower)."""

    def __init__(self, view: Path, store: Path, arrays: list[str]):
        self.view, self.store, self.array_names = view, store, arrays
        self.crops = None

    def __len__(self) -> int:
        return StoreReader(self.store).spec.n_rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        import zarr

        if self.crops is None:  # in the worker
            torch.set_num_threads(1)
            self.crops = CropReader(self.view)
            self.arrays = [zarr.open_array(self.store / array, mode="r") for array in self.array_names]
        start = int(self.crops.pointers[row])
        image = decode(self.crops.bytes[start : start + int(self.crops.sizes[row])], self.crops.size)
        record = np.concatenate([np.asarray(array[row]).reshape(-1).view("u1") for array in self.arrays])
        return {"row": torch.tensor(row), "image": image, "record": torch.from_numpy(record)}


def zarr_loader(view: Path, store: Path, arrays: list[str], batch: int, n_workers: int, order: np.ndarray) -> DataLoader:
    """torch's DataLoader, in a given order."""
    return DataLoader(ZarrDataset(view, store, arrays), batch, sampler=order.reshape(-1).tolist(), **_workers_of(n_workers))


class Unpack:
    """A sample of the streaming formats, out of its bytes."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, sample: dict) -> dict[str, torch.Tensor]:
        row = torch.tensor(int(sample["__key__"]))
        record = torch.from_numpy(np.frombuffer(sample["bin"], "u1").copy())
        return {"row": row, "image": decode(sample["jpg"], self.size), "record": record}


def write_webdataset(folder: Path, samples: Samples, n_shards: int) -> list[str]:
    """Tar files with the rows in order; returns their paths."""
    import webdataset

    folder.mkdir()
    paths = [str(folder / f"{shard:03d}.tar") for shard in range(n_shards)]
    for path, rows in zip(paths, np.array_split(np.arange(len(samples)), n_shards), strict=True):
        with webdataset.TarWriter(path) as tar:
            for row in rows.tolist():
                tar.write({"__key__": f"{row:08d}", "jpg": samples.jpeg(row), "bin": samples.record(row)})
    return paths


def webdataset_loader(paths: list[str], size: int, batch: int, n_workers: int):
    """webdataset, tar after tar, samples of a tar in their order."""
    import webdataset

    split = webdataset.split_by_worker
    dataset = webdataset.WebDataset(paths, shardshuffle=False, workersplitter=split).map(Unpack(size))
    dataset = dataset.batched(batch, collation_fn=default_collate, partial=False)
    return webdataset.WebLoader(dataset, batch_size=None, shuffle=False, **_workers_of(n_workers))


def write_litdata(folder: Path, samples: Samples) -> None:
    """Chunks of 64 MB with the rows in order."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for row in range(len(samples)):
        writer[row] = {"__key__": f"{row:08d}", "jpg": samples.jpeg(row), "bin": samples.record(row)}
    writer.done()
    writer.merge()


def litdata_loader(folder: Path, size: int, batch: int, n_workers: int):
    """litdata's own loader, in the order of its chunks."""
    import litdata

    dataset = litdata.StreamingDataset(str(folder), shuffle=False, transform=Unpack(size))
    return litdata.StreamingDataLoader(dataset, batch_size=batch, collate_fn=default_collate, **_workers_of(n_workers))
