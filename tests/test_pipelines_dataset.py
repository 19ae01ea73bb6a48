"""CachedDataset gives a trainer of one's own what the student's source gives, in this process and in workers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_fakes import flip_bit
from torch.utils.data import DataLoader

import pipelines
from pipelines import CachedDataset
from pipelines.feed.cached_source import CachedSource
from student.batch import Needs
from teacher_cache.errors import CacheCorruptError, NotInCacheError, UsageError
from teacher_cache.extraction.extract import ExtractPlan, extract_view

ROWS = [17, 4, 23, 0, 4]


def stacked(items) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


@pytest.mark.parametrize("store", ["fake", "fake16", "fake-zstd"])
def test_equals_the_source(shared_cache, store):
    """Crops, tokens, attention, labels and rows are those of the student's source, to the bit, whatever the store keeps."""
    layers = (-4, -1)
    source = CachedSource(shared_cache, [store], [Needs(layers, attention=True)], batch_size=8)
    batch = next(iter(source.micro_batches(0, 1)))
    dataset = CachedDataset(shared_cache.path, store, layers, normalised=True)
    found = stacked(dataset.__getitems__(batch.rows.tolist()))
    expected = {"crop": batch.images, "tokens": batch.targets[0].tokens, "attention": batch.targets[0].attention,
                "label": batch.labels, "row": batch.rows}  # fmt: skip
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["tokens"].shape == (8, 2, 17, 24) and found["tokens"].dtype == found["attention"].dtype == torch.float32


def test_of_visible_tokens(cache, teacher):
    """A store of visible tokens gives those, and which patches they are, as the source does."""
    extract_view(cache.view(0), "seen", teacher, ExtractPlan(visible=5, shard_rows=8, batch_size=5))
    batch = next(iter(CachedSource(cache, ["seen"], [Needs((-1,))], batch_size=8, n_views=1).micro_batches(0, 1)))
    found = stacked(CachedDataset(cache, "seen", attention=False).__getitems__(batch.rows.tolist()))
    assert torch.equal(found["tokens"], batch.targets[0].tokens) and torch.equal(found["index"], batch.targets[0].index)
    assert "attention" not in found


def test_pixels_and_views(shared_cache):
    """Unless they are to be normalised, crops are the pixels that the teacher saw; each view has its own."""
    crops = []
    for view in (0, 1):
        dataset = CachedDataset(shared_cache, "fake", view=view)
        crop = dataset[17]["crop"]
        assert crop.dtype == torch.uint8
        assert np.array_equal(crop.permute(1, 2, 0), shared_cache.view(view).pixels([17])[0])
        crops.append(crop)
    assert not torch.equal(*crops)


def test_as_a_sequence(shared_cache):
    """It has a length, rows count from either end, and behind the last one there is none."""
    dataset = CachedDataset(shared_cache, "fake")
    assert len(dataset) == 24 and dataset[-1]["row"] == 23 and len(list(dataset)) == 24
    assert dataset.labels.tolist() == [int(item["label"]) for item in dataset]
    with pytest.raises(IndexError):
        dataset[24]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_workers(shared_cache, start):
    """DataLoader's workers give, forked after it has read or started anew, what this process gives."""
    dataset = CachedDataset(shared_cache, "fake", (-2, -1))
    expected = stacked([dataset[row] for row in range(24)])
    loader = DataLoader(dataset, batch_size=7, num_workers=2, multiprocessing_context=start)
    batches = list(loader)
    assert [len(batch["row"]) for batch in batches] == [7, 7, 7, 3]
    for name in expected:
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])


def test_a_copy_opens_its_own_files(shared_cache):
    """A pickled dataset has no open files in it, and reads the same."""
    dataset = CachedDataset(shared_cache, "fake")
    before = dataset[3]
    data = pickle.dumps(dataset)
    assert len(data) < 10_000 and torch.equal(pickle.loads(data)[3]["tokens"], before["tokens"])


def test_refused(cache, teacher):
    """A view, layer or store that is not there, or not finished, is refused when the dataset is made."""
    with pytest.raises(NotInCacheError, match="has no view 2"):
        CachedDataset(cache, "fake", view=2)
    with pytest.raises(UsageError, match="has targets of fake, fake-zstd, fake16"):
        CachedDataset(cache)
    with pytest.raises(NotInCacheError, match="lacks layers 1; it holds layers 2, 3, 4, 5, 6 of 6 and attention"):
        CachedDataset(cache, "fake", (-6,))
    extract_view(cache.view(0), "part", teacher, ExtractPlan(shard_rows=8, batch_size=5), range(1))
    with pytest.raises(NotInCacheError, match="is not complete. Finish it: teacher-cache extract --teacher fake"):
        CachedDataset(cache, "part")


def test_damage_is_named(cache):
    """A damaged row is an error with its number when it is read, never numbers; its neighbours are read."""
    shard = next((cache.path / "view-000" / "fake16.zarr" / "tokens" / "06").glob("c.0*"))
    flip_bit(shard, 8 * 5000)
    dataset, n_damaged = CachedDataset(cache, "fake16"), 0
    for row in range(8):
        try:
            dataset[row]
        except CacheCorruptError as error:
            n_damaged += 1
            assert f"row {row} is damaged" in str(error)
    assert n_damaged == 1


def test_importing_is_quick():
    """`import pipelines` loads neither torch nor ffcv."""
    code = "import sys, pipelines; print({'torch', 'ffcv', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "set()\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute"):
        pipelines.CachedDatasets  # noqa: B018
