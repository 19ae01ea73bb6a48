"""Training from stores coded by a transform: what reaches a student is what the format says, by every way there is."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_fakes import crop_folder, flip_bit
from fakes import FakeTeacher, write_images
from klt_fakes import DIM, fitted, residual_stream
from store_fakes import shard_of

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.dataset import CachedDataset
from pipelines.feed.dequantise import TransformDecoder
from pipelines.feed.live_source import LiveSource
from pipelines.feed.teacher_values import stored_shape
from pipelines.pages.of_cache.cache_report import Options, report
from pipelines.presets import recipe
from student.batch import Needs
from student.modules.model import Student
from teacher_cache.encoding.klt_encode import TransformEncoder
from teacher_cache.errors import CacheCorruptError, NotInCacheError
from teacher_cache.extraction.extract import extract_view
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.spec import ARRAY_NAME
from teacher_cache.format.transform import ESCAPED, decode
from teacher_cache.store.reader import READERS, StoreReader

N = 200


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Two views of 200 crops; `all` has all tokens of three layers, `some` those of visible patches."""
    folder = tmp_path_factory.mktemp("klt")
    cache = crop_folder(folder / "cache", write_images(folder / "images", 2, N // 2), 2)
    for view in cache.views():
        for name, visible in (("all", 0), ("some", 9)):
            plan = ExtractPlan("last3", "klt:4", shard_rows=64, batch_size=64, visible=visible)
            extract_view(view, name, FakeTeacher(), plan)
    return cache


def stored(cache, name: str, rows, layers) -> np.ndarray:
    """What StoreReader says of block numbers: float32 [n, L, T, D]."""
    reader = StoreReader(cache.view(0).store_path(name))
    return np.stack([reader.tokens(rows, layer) for layer in layers], 1)


@pytest.mark.parametrize("name", ["all", "some"])
@pytest.mark.parametrize("layers", [(-1,), (-3,), (-1, -2, -3), (-2, -1)])
def test_the_dataset_has_what_the_store_says(cache, name, layers):
    """Of any layers in any order, as the reader that follows the document reads them."""
    items = CachedDataset(cache, name, layers).__getitems__([5, 199, 0])
    expected = stored(cache, name, [5, 199, 0], [7 + layer for layer in layers])
    np.testing.assert_allclose(torch.stack([item["tokens"] for item in items]).numpy(), expected, atol=1e-5)
    assert ("index" in items[0]) == (name == "some")


@pytest.mark.parametrize("reader", READERS)
def test_a_source_reads_the_codes_it_needs(cache, reader):
    """The last layer alone reads its own codes and no others; an earlier one those behind it too. Values are the store's."""
    for layers, blocks in (((-1,), [6]), ((-2,), [5, 6]), ((-3, -1), [4, 5, 6])):
        source = CachedSource(cache, ["all"], [Needs(layers)], reader=reader, batch_size=8, n_views=1)
        assert source.stored[0].arrays == [ARRAY_NAME.format(block) for block in blocks]
        batch = next(iter(source.micro_batches(0, 1)))
        expected = stored(cache, "all", batch.rows.numpy(), [7 + layer for layer in layers])
        np.testing.assert_allclose(batch.targets[0].tokens.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["klt:1.5", "klt:3.2", "klt:6"])
@pytest.mark.parametrize("n_odd", [0, 7])
def test_the_device_reads_what_the_document_says(dtype, n_odd):
    """The decoder of the training and the plain one give the same tokens, also of those that are coded by themselves."""
    spec, transform, statistics = fitted(dtype)
    tokens = residual_stream(40, seed=8)
    tokens[:, :n_odd] = 30 * np.random.default_rng(0).standard_normal((3, n_odd, DIM))
    arrays = TransformEncoder(spec, transform, statistics, torch.device("cpu"))(torch.from_numpy(tokens)[None])
    assert not n_odd or any((codes[..., 0] >= ESCAPED).any() for codes in arrays.values())
    out = torch.empty(3, 1, 40, DIM)
    TransformDecoder(spec, transform, (4, 5, 6), torch.device("cpu"))(arrays.__getitem__, out)
    for place, layer in enumerate((4, 5, 6)):
        layers = spec.read_with(layer)
        expected = decode([arrays[ARRAY_NAME.format(other)][0].numpy() for other in layers], layers, transform)
        np.testing.assert_allclose(out[place, 0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_cached_is_near_to_live(cache):
    """Batch for batch the same crops and attention, and tokens as near as the store says they are."""
    needs = Needs((-3, -2, -1), attention=True)
    sources = CachedSource(cache, ["all"], [needs], batch_size=8), LiveSource(cache, [FakeTeacher()], [needs], batch_size=8)
    batches = [next(iter(source.micro_batches(3, 4))) for source in sources]
    assert torch.equal(batches[0].rows, batches[1].rows) and torch.equal(batches[0].images, batches[1].images)
    mine, live = (batch.targets[0] for batch in batches)
    torch.testing.assert_close(mine.attention, live.attention)
    errors = (mine.tokens - live.tokens).norm(dim=-1) / live.tokens.norm(dim=-1)
    worst = max(layer.worst for layer in StoreReader(cache.view(0).store_path("all")).manifest.fidelity)
    assert 0 < errors.median() < 0.06 and errors.max() < 2 * worst


def test_tokens_of_visible_patches_alone(cache):
    """Where a run draws its masks ahead, only the codes of visible tokens are read, and their tokens are those of whole rows."""
    config = replace(recipe("mr-mae-b16").tiny((stored_shape(cache, "all"),)).config, batch_size=8)
    student = Student(config, (stored_shape(cache, "all"),))
    whole = CachedSource(cache, ["all"], student.needs, batch_size=8)
    ahead = CachedSource(cache, ["all"], student.needs, batch_size=8, masks=student.masks_ahead(config))
    full, part = (next(iter(source.micro_batches(2, 3))) for source in (whole, ahead))
    chosen, n_tokens = part.targets[0], full.targets[0].tokens.shape[2]
    assert chosen.index is not None and chosen.tokens.shape[2] < n_tokens
    places = torch.cat([torch.zeros(8, 1, dtype=torch.int64), chosen.index + 1], 1)
    expected = full.targets[0].tokens.take_along_dim(places[:, None, :, None], 2)
    torch.testing.assert_close(chosen.tokens, expected, atol=1e-5, rtol=0)


def test_what_is_not_there_raises(cache, tmp_path):
    """A layer that is not stored, and a flipped bit in codes that are needed for another layer: a sentence, never a number."""
    with pytest.raises(NotInCacheError, match="lacks layers 3"):
        CachedDataset(cache, "all", (-4,))
    with pytest.raises(NotInCacheError, match="has no tokens/03"):
        StoreReader(cache.view(0).store_path("all")).tokens([0], 3)
    copy = tmp_path / "cache"
    shutil.copytree(cache.path, copy)
    flip_bit(shard_of(copy / "view-000/all.zarr", "tokens/06", 1), 8 * 200)
    dataset = CachedDataset(copy, "all", (-3,))
    with pytest.raises(CacheCorruptError, match="tokens/06: row 64 is damaged"):
        dataset.__getitems__(range(64, 100))


def test_a_page_of_a_cache(cache, tmp_path):
    """`report` shows what is on record of such a store, CLS apart."""
    assert report(cache.path, tmp_path / "page.html", Options(teacher="all", rows=50), lambda _: None) > 10_000
    page = (tmp_path / "page.html").read_text()
    assert "klt:4" in page and "4 CLS" in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reads_the_same(cache):
    """Rounded to bfloat16 before the product, tokens differ by less than a twentieth of what storing does to them."""
    reader = StoreReader(cache.view(0).store_path("all"))
    rows, names = np.arange(20), [ARRAY_NAME.format(layer) for layer in (4, 5, 6)]
    arrays = {name: torch.from_numpy(reader.read(name, rows)).cuda() for name in names}
    out = torch.empty(3, 20, 17, 24, device="cuda")
    TransformDecoder(reader.spec, reader.transform, (4, 5, 6), torch.device("cuda"))(arrays.__getitem__, out)
    expected = torch.from_numpy(stored(cache, "all", rows, (4, 5, 6))).transpose(0, 1)
    assert (out.cpu() - expected).norm() / expected.norm() < 2e-3
