"""Batches from a cache equal batches from the live teacher, and caches that do not fit are refused."""

from __future__ import annotations

import queue
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_fakes import crop_folder, flip_bit
from fakes import FakeTeacher
from oracles import quantise

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.crop_source import CropSource
from pipelines.feed.dequantise import dequantise
from pipelines.feed.live_source import LiveSource
from pipelines.feed.loader import JoinedLoader
from pipelines.feed.teacher_values import stored_shape, teacher_shape
from pipelines.presets import PRESETS, recipe
from student.batch import Batch, Needs
from student.masking import draw_noise
from student.modules.model import Student
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import CacheCorruptError, MismatchError, NotInCacheError, UsageError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.format import quantize
from teacher_cache.store.reader import READERS

ALL = Needs(layers=(-5, -4, -3, -2, -1), attention=True)
# The stated bounds, relative: float16 rounding (2**-11 a value), and int8 with its measured error of about 1 %.
BOUND = {"fake16": (2e-4, 2e-3), "fake": (1e-2, 5e-2)}


class Unlike(FakeTeacher):
    """A FakeTeacher with something left out, for methods whose teachers lack it."""

    def __init__(self, has_cls: bool, pools: bool = False):
        super().__init__(has_cls=has_cls, pools=pools)
        self.spec = replace(self.spec, projection_dim=None)
        del self.head["projection"]


TEACHERS = {"fake": FakeTeacher(), "plain": Unlike(True), "gap": Unlike(False), "pooled": Unlike(False, pools=True)}
"""With projection and CLS, as CLIP; with CLS alone, as DINO; with neither, as a Swin; with a pooling head instead, as SigLIP."""


def stand_in(name: str) -> str:
    """Which of the fake teachers has what a preset's real one has."""
    return next((like for part, like in {"moby": "gap", "clip-": "fake", "siglip": "pooled"}.items() if part in name), "plain")


@pytest.fixture(scope="module")
def batches(tmp_path_factory, image_folder):
    """The first batch of 8 with all layers of three teachers: live, from float16 and from int8 stores of one cache."""
    cache = crop_folder(tmp_path_factory.mktemp("teachers") / "c", image_folder)
    for name, teacher in TEACHERS.items():
        for suffix, dtype in (("", "int8"), ("16", "float16")):
            plan = ExtractPlan(layers="last6", dtype=dtype, shard_rows=8, batch_size=5)
            extract_view(cache.view(0), name + suffix, teacher, plan)
    every = tuple(range(-6, 0))
    needs = [Needs(every, attention=teacher.spec.attention_source is not None) for teacher in TEACHERS.values()]
    sources = {"live": LiveSource(cache, list(TEACHERS.values()), needs, batch_size=8)}
    for suffix in ("", "16"):
        sources["fake" + suffix] = CachedSource(cache, [name + suffix for name in TEACHERS], needs, batch_size=8)
    return {name: next(iter(source.micro_batches(0, 1))) for name, source in sources.items()}


def loss_and_gradients(preset: str, batch: Batch) -> tuple[float, torch.Tensor]:
    """Loss and gradients of one step of a preset's fresh miniature on the targets that it wants of a batch of all."""
    names = [stand_in(name) for name in recipe(preset).teachers]
    shapes = tuple(teacher_shape(TEACHERS[name].spec) for name in names)
    config = recipe(preset).tiny(shapes).config
    student = Student(config, shapes)
    batch = replace(batch, targets=tuple(batch.targets[list(TEACHERS).index(name)] for name in names))
    torch.manual_seed(0)  # drop path
    loss, _ = student(batch, student.draw_mask(batch, draw_noise(config.seed, 0, 8, student.n_patches)))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("store", BOUND)
@pytest.mark.parametrize("preset", [name for name in PRESETS if recipe(name).teachers])
def test_cached_equals_live(batches, preset, store):
    """Loss and gradients from a cache equal the live teachers': to float16 rounding, or within int8's stated bound."""
    live_loss, live = loss_and_gradients(preset, batches["live"])
    loss, cached = loss_and_gradients(preset, batches[store])
    loss_bound, gradient_bound = BOUND[store]
    assert abs(loss - live_loss) / live_loss < loss_bound
    assert (cached - live).norm() / live.norm() < gradient_bound
    assert loss != live_loss  # the two really took different ways


def test_one_store_trains_five_methods(batches):
    """The targets of one CLIP store train MR-MAE, MR-MCMAE, MaskAlign, MILAN and CAE v2: a step lowers each one's loss."""
    batch = replace(batches["fake"], targets=batches["fake"].targets[:1])
    shapes = (teacher_shape(TEACHERS["fake"].spec),)
    for preset in ("mr-mae-b16", "mr-mcmae-b", "maskalign-b16", "milan-b16", "cae-v2-b16"):
        config = recipe(preset).tiny(shapes).config
        student = Student(config, shapes)
        mask = student.draw_mask(batch, draw_noise(0, 0, 8, student.n_patches))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        student.eval()
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss, _ = student(batch, mask)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > losses[1] > losses[2], preset


def test_processes_share_a_step(shared_cache):
    """Every process takes its own slice of each micro-batch, together the rows that one process takes, in its order."""
    whole = CachedSource(shared_cache, ["fake"], [ALL], batch_size=8, accumulate=2)
    parts = [CachedSource(shared_cache, ["fake"], [ALL], batch_size=8, accumulate=2, rank=rank, world=2) for rank in (0, 1)]
    rows = [[batch.rows for batch in source.micro_batches(1, 5)] for source in (whole, *parts)]
    one, first, second = (torch.stack(of).reshape(4, 2, -1) for of in rows)  # [step, micro-batch, rows]
    assert torch.equal(one, torch.cat([first, second], 2)) and first.shape == (4, 2, 2)


AHEAD = ["maskalign-b16", "maskalign-b16-random", "mr-mae-b16", "mr-mae-b16-clip-dino", "mr-mcmae-b"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("preset", AHEAD)
def test_visible_tokens_alone_teach_the_same(shared_cache, preset, reader):
    """Where no loss looks at hidden patches, only visible tokens are read; masks, loss and gradients are those of whole rows."""
    names = ["fake", "fake-zstd"][: len(recipe(preset).teachers)]
    shapes = tuple(stored_shape(shared_cache, name) for name in names)
    config = replace(recipe(preset).tiny(shapes).config, batch_size=8, accumulate=2)
    student = Student(config, shapes)
    options = {"batch_size": 8, "accumulate": 2, "reader": reader}
    whole = CachedSource(shared_cache, names, student.needs, **options)
    ahead = CachedSource(shared_cache, names, student.needs, masks=student.masks_ahead(config), **options)
    assert whole.identity == ahead.identity
    for place, batches in enumerate(zip(whole.micro_batches(2, 7), ahead.micro_batches(2, 7), strict=True)):  # over two views
        assert batches[0].mask is None
        noise = draw_noise(config.seed, 2 + place // 2, 8, student.n_patches).chunk(2)[place % 2]
        masks = [student.draw_mask(batches[0], noise), batches[1].mask]
        assert torch.equal(masks[0].keep, masks[1].keep) and torch.equal(masks[0].drop, masks[1].drop)
        n_keep = masks[0].keep.shape[1]
        for all_, visible in zip(batches[0].targets, batches[1].targets, strict=True):
            assert visible.tokens.shape[2] == 1 + n_keep < all_.tokens.shape[2]
        results = []
        for batch, mask in zip(batches, masks, strict=True):
            student.zero_grad()
            torch.manual_seed(0)  # drop path
            loss, _ = student(batch, mask)
            loss.backward()
            results.append([loss, *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) > 5
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("preset", ["milan-b16", "cae-v2-b16", "mimco-b16", "mr-mae-b16-joint-decoder"])
def test_whole_rows_where_hidden_tokens_teach(shared_cache, preset):
    """A loss on hidden patches gets the tokens of all, and its student draws the masks."""
    shapes = (stored_shape(shared_cache, "fake"),)
    config = recipe(preset).tiny(shapes).config
    student = Student(config, shapes)
    source = CachedSource(shared_cache, ["fake"], student.needs, batch_size=8, masks=student.masks_ahead(config))
    batch = next(iter(source.micro_batches(0, 1)))
    assert batch.mask is None and batch.targets[0].tokens.shape[2] == 17


def test_processes_share_the_masks_of_a_step(shared_cache):
    """Every process draws the masks of its own slice, together those that one process draws."""
    shapes = (stored_shape(shared_cache, "fake"),)
    config = replace(recipe("maskalign-b16").tiny(shapes).config, batch_size=8, accumulate=2)
    student = Student(config, shapes)
    options = {"batch_size": 8, "accumulate": 2, "masks": student.masks_ahead(config)}
    whole = CachedSource(shared_cache, ["fake"], student.needs, **options)
    parts = [CachedSource(shared_cache, ["fake"], student.needs, rank=rank, world=2, **options) for rank in (0, 1)]
    keeps = [[batch.mask.keep for batch in source.micro_batches(1, 5)] for source in (whole, *parts)]
    one, first, second = (torch.stack(of).reshape(4, 2, -1, keeps[0][0].shape[1]) for of in keeps)
    assert torch.equal(one, torch.cat([first, second], 2)) and first.shape[:3] == (4, 2, 2)


def test_mae_has_the_same_pixels(shared_cache, teacher):
    """A method without a teacher reads the very crops that the others read, in the same order, and nothing else."""
    plain = CropSource(shared_cache, batch_size=8)
    joined = CachedSource(shared_cache, ["fake"], [ALL], batch_size=8)
    for mae, other in zip(plain.micro_batches(0, 7), joined.micro_batches(0, 7), strict=True):
        assert torch.equal(mae.images, other.images) and torch.equal(mae.rows, other.rows)
        assert torch.equal(mae.labels, other.labels) and mae.targets == ()


def test_targets_and_labels_belong_to_their_rows(shared_cache, teacher):
    """Over two views and a resume, every batch's targets are the teacher's on that batch's own pixels."""
    source = CachedSource(shared_cache, ["fake16"], [ALL], batch_size=8, accumulate=2)
    labels = shared_cache.images().labels
    live = LiveSource(shared_cache, [teacher], [ALL], batch_size=8, accumulate=2)
    n_batches = 0
    for cached, on_the_spot in zip(source.micro_batches(2, 8), live.micro_batches(2, 8), strict=True):
        n_batches += 1
        assert torch.equal(cached.images, on_the_spot.images) and len(cached.images) == 4
        assert cached.labels.tolist() == labels[cached.rows.numpy()].tolist()
        for layer in ALL.layers:
            torch.testing.assert_close(cached.targets[0].layer(layer), on_the_spot.targets[0].layer(layer), atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(cached.targets[0].attention, on_the_spot.targets[0].attention, atol=0, rtol=0)
        torch.testing.assert_close(cached.targets[0].head.projection, on_the_spot.targets[0].head.projection, atol=0, rtol=0)
    assert n_batches == 12


def test_batches_stay_what_they_were(shared_cache):
    """A batch kept by the consumer is not overwritten by later ones, although the loader's buffers are."""
    source = CachedSource(shared_cache, ["fake"], [ALL], batch_size=4)
    kept = list(source.micro_batches(0, 12))
    for batch, again in zip(kept, source.micro_batches(0, 12), strict=True):
        assert torch.equal(batch.images, again.images) and torch.equal(batch.targets[0].tokens, again.targets[0].tokens)
        assert torch.equal(batch.targets[0].attention, again.targets[0].attention)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group", [16, 100, 128])
@pytest.mark.parametrize("dim", [199, 200, 256])
def test_dequantise_equals_the_reference(dim, group, dtype):
    """The device's dequantisation equals teacher_cache.format.quantize's, also where the last group or byte is short."""
    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(3, 5, dim)).astype("float32") * generator.lognormal(size=dim).astype("float32")
    statistics = quantize.ChannelStatistics.fit(tokens.reshape(-1, dim))
    q, scale = quantise(tokens, statistics, dtype, group)
    reference = quantize.dequantise(q, scale, statistics, dtype, group)
    given = *map(torch.from_numpy, (q, scale, statistics.centre, statistics.spread)), group
    np.testing.assert_allclose(dequantise(*given).numpy(), reference, rtol=1e-6, atol=1e-6)
    out = torch.full((3, 2, 5, dim), 7.0)
    dequantise(*given, out=out[:, 1])
    assert torch.equal(out[:, 1], dequantise(*given)) and (out[:, 0] == 7).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda c: CropSource(c, batch_size=25), "24 rows, one step takes 25"),
        (lambda c: CropSource(c, batch_size=4, n_views=3), "has 2 finished views, 3 are asked for.*--views 3"),
        (lambda c: CachedSource(c, ["nope"], [ALL], batch_size=4), "no targets of nope; it has fake, fake-zstd, fake16.*extract"),
        (lambda c: CachedSource(c, ["fake"], [Needs(layers=(-6, -1))], batch_size=4), "lacks layers 1;.*--layers 1,2,3,4,5,6"),
    ],
    ids=["few rows", "few views", "no store", "no layer"],
)
def test_caches_that_do_not_fit_are_refused(shared_cache, make, message):
    """Too few rows, views, stores or layers: refused with the numbers and the command that mends it."""
    with pytest.raises((NotInCacheError, UsageError), match=re.compile(message, re.DOTALL)):
        make(shared_cache)


def test_an_incomplete_view_is_refused(cache):
    """A store whose extraction was interrupted is refused with its rows and the command that finishes it."""
    store = cache.view(1).store_path("fake")
    (store / "complete.json").unlink()
    (store / "commits").mkdir()
    with pytest.raises(NotInCacheError, match="View 1 .* 0 of 24 rows .* teacher-cache extract"):
        CachedSource(cache, ["fake"], [ALL], batch_size=4)


def test_foreign_stores_are_refused(cache, shared_cache):
    """Targets made from other crops, or quantised with another view's statistics, are never trained on."""
    store = cache.view(1).store_path("fake")
    shutil.rmtree(store)
    shutil.copytree(shared_cache.view(0).store_path("fake"), store)
    with pytest.raises(CacheCorruptError, match="made from other crops"):
        CachedSource(cache, ["fake"], [ALL], batch_size=4)

    shutil.rmtree(store)
    other = FakeTeacher(seed=1)
    shutil.rmtree(cache.view(0).store_path("fake"))
    for number in (0, 1):
        extract_view(cache.view(number), "fake", other, ExtractPlan(shard_rows=8, batch_size=5))
    shutil.rmtree(cache.view(1).store_path("fake"))
    shutil.copytree(shared_cache.view(1).store_path("fake"), cache.view(1).store_path("fake"))
    with pytest.raises(CacheCorruptError, match="quantised otherwise"):
        CachedSource(cache, ["fake"], [ALL], batch_size=4)


def test_foreign_crops_are_refused(cache, image_folder, tmp_path):
    """A view of another cache in place of one's own is refused, whether or not it has as many rows."""
    for name, crop_format in (("few", "jpeg95"), ("other", "jpeg90")):
        images = shutil.copytree(image_folder, tmp_path / name)
        if name == "few":
            shutil.rmtree(images / "class-2")
        other = crop_folder(tmp_path / f"{name}-cache", images, crop_format=crop_format)
        shutil.rmtree(cache.view(0).path)
        shutil.copytree(other.view(0).path, cache.view(0).path)
        with pytest.raises(CacheCorruptError, match=f"view-000 holds {len(other.view(0).crops())} crops of another cache"):
            next(iter(CropSource(cache, batch_size=4).micro_batches(0, 1)))


@pytest.mark.parametrize("reader", READERS)
def test_readers_give_equal_batches(shared_cache, reader):
    """Whichever way targets are read, a run sees the same batches, and its identity is the same."""
    plain, other = (CachedSource(shared_cache, ["fake"], [ALL], batch_size=8, reader=name) for name in ("mmap", reader))
    assert plain.identity == other.identity
    for expected, batch in zip(plain.micro_batches(1, 5), other.micro_batches(1, 5), strict=True):
        assert torch.equal(batch.targets[0].tokens, expected.targets[0].tokens) and torch.equal(batch.rows, expected.rows)
        assert torch.equal(batch.targets[0].attention, expected.targets[0].attention) and torch.equal(
            batch.images, expected.images
        )


def test_another_quantiser_is_another_run(cache, teacher, monkeypatch):
    """A run's identity tells stores apart that differ in nothing but how they were quantised."""
    before = CachedSource(cache, ["fake"], [ALL], batch_size=8).identity
    fit = quantize.ChannelStatistics.fit
    monkeypatch.setattr(quantize.ChannelStatistics, "fit", lambda tokens: replace(fit(tokens), spread=2 * fit(tokens).spread))
    for view in cache.views():  # a store that is left would give its quantiser to the others
        shutil.rmtree(view.store_path("fake"))
    for view in cache.views():
        extract_view(view, "fake", teacher, ExtractPlan(shard_rows=8, batch_size=5))
    after = CachedSource(cache, ["fake"], [ALL], batch_size=8).identity
    assert {key for key in before if before[key] != after[key]} == {"teachers"}
    (one,), (two,) = before["teachers"], after["teachers"]
    assert {key for key in one if one[key] != two[key]} == {"shared_sha256"}


def test_another_decoder_is_refused(cache, monkeypatch):
    """A machine whose JPEG decoder gives other pixels than the teacher saw is refused before the first batch."""
    decode = CropReader._decode
    monkeypatch.setattr(CropReader, "_decode", lambda self, row: decode(self, row) ^ 1)
    with pytest.raises(MismatchError, match="24 of 24 crops decode to other pixels"):
        next(iter(CropSource(cache, batch_size=4).micro_batches(0, 1)))


def test_a_row_is_checked_once_a_run(shared_cache):
    """With check="first", the second epoch compares no checksum again: readers stay open for the whole run."""
    source = CachedSource(shared_cache, ["fake"], [ALL], batch_size=8)
    list(source.micro_batches(0, 6))
    stores = [store for _, (store,) in source._opened.values()]
    assert len(stores) == 2 and all(store.shards.checked[store.columns["tokens/06"]].all() for store in stores)
    list(source.micro_batches(6, 12))
    assert [store for _, (store,) in source._opened.values()] == stores


def test_the_next_epoch_is_prepared_before_it_is_asked_for(shared_cache, monkeypatch):
    """While the last batch of an epoch is worked on, the first of the next one is made, of the other view."""
    made, run = queue.Queue(), JoinedLoader.run
    monkeypatch.setattr(JoinedLoader, "run", lambda loader, *given: (run(loader, *given), made.put(loader.decode.crops.path))[0])
    source = CropSource(shared_cache, batch_size=8)
    batches = source.micro_batches(0, 6)
    next(batches)
    views = [made.get(timeout=60).parent for _ in range(4)]
    assert views == [shared_cache.view(number).path for number in (0, 0, 0, 1)]
    assert [batch.rows.tolist() for batch in batches] == [source.rows_of(step)[1] for step in range(1, 6)]


def test_what_is_wrong_with_the_next_view_is_said_when_it_is_its_turn(cache):
    """All batches of the views before are given first."""
    source, given = CachedSource(cache, ["fake"], [ALL], batch_size=8), []
    (cache.view(1).store_path("fake") / "tokens/06/c.1.0.0").unlink()
    with pytest.raises(CacheCorruptError, match="view-001/fake.zarr/tokens/06/c.1.0.0"):
        for batch in source.micro_batches(0, 6):
            given += batch.rows.tolist()
    assert sorted(given[:24]) == list(range(24))


def test_other_labels_than_the_caches_are_refused(cache):
    """Labels come from the crops' file, and only if they are those of cache.json."""
    path = cache.view(0).path / "crops.beton"
    flip_bit(path, 8 * (2106 + 5 * 24 + 16))  # of row 5: docs/format.md has the table
    with pytest.raises(CacheCorruptError, match="crops.beton has other labels than the cache"):
        next(CropSource(cache, batch_size=8).micro_batches(0, 1))
