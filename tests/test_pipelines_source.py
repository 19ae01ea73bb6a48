"""Batches from a cache equal batches from the live teacher, and caches that do not fit are refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import FakeTeacher

from pipelines.presets import PRESETS, recipe
from pipelines.source import CachedSource, CropSource, LiveSource, dequantise, teacher_shape
from student.batch import Needs
from student.config import AlignConfig
from student.masking import draw_noise
from student.model import Student
from teacher_cache import quantize
from teacher_cache.beton import CropReader
from teacher_cache.errors import CacheCorruptError, MismatchError, NotInCacheError
from teacher_cache.extract import ExtractPlan, extract_view

ALL = Needs(layers=(-5, -4, -3, -2, -1), attention=True)
# The stated bounds, relative: float16 rounding (2**-11 a value), and int8 with its measured error of about 1 %.
BOUND = {"fake16": (2e-4, 2e-3), "fake": (1e-2, 5e-2)}


def small_config(preset: str):
    """The preset's method on the crops and grid of the test cache."""
    config = recipe(preset).tiny().config
    levels = [replace(o, levels=3) if isinstance(o, AlignConfig) else o for o in config.objectives]
    return replace(
        config, backbone=replace(config.backbone, image_size=32, patch_size=8), objectives=tuple(levels), batch_size=12
    )


def loss_and_gradients(config, source, teacher):
    """Loss, parts and gradients of one step of a fresh student on the source's first batch."""
    student = Student(config, teacher_shape(teacher.spec))
    batch = next(iter(source(student.needs).micro_batches(0, 1)))
    noise = draw_noise(config.seed, 0, config.batch_size, student.n_patches)
    torch.manual_seed(0)  # drop path
    loss, parts = student(batch, noise)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("store", BOUND)
@pytest.mark.parametrize("preset", ["mr-mae-b16", "maskalign-b16", "mr-mae-demo", "maskalign-demo"])
def test_cached_equals_live(shared_cache, teacher, preset, store):
    """Loss and gradients from a cache equal the live teacher's: to float16 rounding, or within int8's stated bound."""
    config = small_config(preset)
    options = {"batch_size": config.batch_size}
    live_loss, live = loss_and_gradients(config, lambda needs: LiveSource(shared_cache, teacher, needs, **options), teacher)
    loss, cached = loss_and_gradients(config, lambda needs: CachedSource(shared_cache, store, needs, **options), teacher)
    loss_bound, gradient_bound = BOUND[store]
    assert abs(loss - live_loss) / live_loss < loss_bound
    assert (cached - live).norm() / live.norm() < gradient_bound
    assert loss != live_loss  # the two really took different ways


def test_mae_has_the_same_pixels(shared_cache, teacher):
    """A method without a teacher reads the very crops that the others read, in the same order, and nothing else."""
    plain = CropSource(shared_cache, batch_size=8)
    joined = CachedSource(shared_cache, "fake", ALL, batch_size=8)
    for mae, other in zip(plain.micro_batches(0, 7), joined.micro_batches(0, 7), strict=True):
        assert torch.equal(mae.images, other.images) and torch.equal(mae.rows, other.rows)
        assert torch.equal(mae.labels, other.labels) and mae.targets is None


def test_targets_and_labels_belong_to_their_rows(shared_cache, teacher):
    """Over two views and a resume, every batch's targets are the teacher's on that batch's own pixels."""
    source = CachedSource(shared_cache, "fake16", ALL, batch_size=8, accumulate=2)
    labels = shared_cache.images().labels
    live = LiveSource(shared_cache, teacher, ALL, batch_size=8, accumulate=2)
    n_batches = 0
    for cached, on_the_spot in zip(source.micro_batches(2, 8), live.micro_batches(2, 8), strict=True):
        n_batches += 1
        assert torch.equal(cached.images, on_the_spot.images) and len(cached.images) == 4
        assert cached.labels.tolist() == labels[cached.rows.numpy()].tolist()
        for layer in ALL.layers:
            torch.testing.assert_close(cached.targets.layer(layer), on_the_spot.targets.layer(layer), atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(cached.targets.attention, on_the_spot.targets.attention, atol=0, rtol=0)
        torch.testing.assert_close(cached.targets.head.projection, on_the_spot.targets.head.projection, atol=0, rtol=0)
    assert n_batches == 12


def test_batches_stay_what_they_were(shared_cache):
    """A batch kept by the consumer is not overwritten by later ones, although the loader's buffers are."""
    source = CachedSource(shared_cache, "fake", ALL, batch_size=4)
    kept = list(source.micro_batches(0, 12))
    for batch, again in zip(kept, source.micro_batches(0, 12), strict=True):
        assert torch.equal(batch.images, again.images) and torch.equal(batch.targets.tokens, again.targets.tokens)
        assert torch.equal(batch.targets.attention, again.targets.attention)


def test_dequantise_equals_the_reference():
    """The device's dequantisation equals teacher_cache.quantize's, also where the last group is short."""
    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(3, 5, 200)).astype("float32") * generator.lognormal(size=200).astype("float32")
    statistics = quantize.ChannelStatistics.fit(tokens.reshape(-1, 200))
    q, scale = quantize.quantise(tokens, statistics, 128)
    reference = quantize.dequantise(q, scale, statistics, 128)
    ours = dequantise(*map(torch.from_numpy, (q, scale, statistics.centre, statistics.spread)), 128)
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda c: CropSource(c, batch_size=25), "24 rows, one step takes 25"),
        (lambda c: CropSource(c, batch_size=4, n_views=3), "has 2 finished views, 3 are asked for.*--views 3"),
        (lambda c: CachedSource(c, "nope", ALL, batch_size=4), "no targets of nope; it has fake, fake-zstd, fake16.*extract"),
        (lambda c: CachedSource(c, "fake", Needs(layers=(-6, -1)), batch_size=4), "lacks layers 1;.*--layers 1,2,3,4,5,6"),
    ],
    ids=["few rows", "few views", "no store", "no layer"],
)
def test_caches_that_do_not_fit_are_refused(shared_cache, make, message):
    """Too few rows, views, stores or layers: refused with the numbers and the command that mends it."""
    with pytest.raises(NotInCacheError, match=re.compile(message, re.DOTALL)):
        make(shared_cache)


def test_an_incomplete_view_is_refused(cache):
    """A store whose extraction was interrupted is refused with its rows and the command that finishes it."""
    store = cache.view(1).store_path("fake")
    (store / "complete.json").unlink()
    (store / "commits").mkdir()
    with pytest.raises(NotInCacheError, match="View 1 .* 0 of 24 rows .* teacher-cache extract"):
        CachedSource(cache, "fake", ALL, batch_size=4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    """Every preset builds, is named like its function, and its docstring has command, and what differs from the paper."""
    made = recipe(name)
    assert made.name == name and made.plan.size == made.config.backbone.image_size
    text = PRESETS[name].__doc__
    assert f"--preset {name} " in text and "Deviations:" in text
    tiny = made.tiny().config
    assert Student(tiny, TEACHERS_OF_PRESETS.get(made.teacher)).n_patches == made.config.backbone.n_patches
    assert sum(p.numel() for p in Student(tiny, TEACHERS_OF_PRESETS.get(made.teacher)).parameters()) < 1e6


def _shapes():
    from student.batch import TeacherShape

    clip = TeacherShape("clip-b16", (14, 14), 768, 12, True, True, 512)
    return {None: None, "clip-b16": clip, "demo": TeacherShape("demo", (8, 8), 64, 6, True, True, None)}


TEACHERS_OF_PRESETS = _shapes()


def test_papers_numbers():
    """Batch, learning rate, epochs, mask and loss weights of the presets are the papers' (method_specs 1.5 and 5.5)."""
    mr, align, mae = (recipe(name).config for name in ("mr-mae-b16", "maskalign-b16", "mae-b16"))
    assert (mr.batch_size, mr.epochs, mr.optim.warmup_epochs, mr.optim.peak_lr(1024)) == (1024, 400, 80, pytest.approx(6e-4))
    assert [o.weight for o in mr.objectives] == [0.5, 0.5] and mr.mask.n_keep(196) == 49
    assert (align.batch_size, align.epochs, align.optim.warmup_epochs, align.optim.min_lr) == (1024, 200, 20, 1e-5)
    assert align.optim.peak_lr(1024) == pytest.approx(6e-4) and align.mask.n_keep(196) == 58
    assert align.objectives[0].levels == 5 and align.backbone.drop_path == 0.1
    assert (mae.batch_size, mae.optim.peak_lr(4096), mae.optim.warmup_epochs) == (4096, pytest.approx(2.4e-3), 40)


def test_foreign_stores_are_refused(cache, shared_cache):
    """Targets made from other crops, or quantised with another view's statistics, are never trained on."""
    store = cache.view(1).store_path("fake")
    shutil.rmtree(store)
    shutil.copytree(shared_cache.view(0).store_path("fake"), store)
    with pytest.raises(CacheCorruptError, match="made from other crops"):
        CachedSource(cache, "fake", ALL, batch_size=4)

    shutil.rmtree(store)
    other = FakeTeacher(seed=1)
    shutil.rmtree(cache.view(0).store_path("fake"))
    for number in (0, 1):
        extract_view(cache.view(number), "fake", other, ExtractPlan(shard_rows=8, batch_size=5))
    shutil.rmtree(cache.view(1).store_path("fake"))
    shutil.copytree(shared_cache.view(1).store_path("fake"), cache.view(1).store_path("fake"))
    with pytest.raises(CacheCorruptError, match="quantised otherwise"):
        CachedSource(cache, "fake", ALL, batch_size=4)


def test_another_decoder_is_refused(cache, monkeypatch):
    """A machine whose JPEG decoder gives other pixels than the teacher saw is refused before the first batch."""
    read = CropReader.read
    monkeypatch.setattr(CropReader, "read", lambda self, rows, out=None: read(self, rows, out) ^ 1)
    with pytest.raises(MismatchError, match="24 of 24 crops decode to other pixels"):
        next(iter(CropSource(cache, batch_size=4).micro_batches(0, 1)))


def test_a_row_is_checked_once_a_run(shared_cache):
    """With check="first", the second epoch compares no checksum again: readers stay open for the whole run."""
    source = CachedSource(shared_cache, "fake", ALL, batch_size=8)
    list(source.micro_batches(0, 6))
    stores = [store for _, store in source._opened.values()]
    assert len(stores) == 2 and all(store.mapped("tokens/06").checked.all() for store in stores)
    list(source.micro_batches(6, 12))
    assert [store for _, store in source._opened.values()] == stores
