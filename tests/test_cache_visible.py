"""Stores of visible tokens and of int4: the race that chooses, and what a student then learns from them."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_fakes import crop_folder
from fakes import FakeTeacher
from oracles import race, take_visible
from store_fakes import compress
from student_fakes import tiny_config

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.teacher_values import stored_shape
from student.batch import Mask, Needs
from student.config import AlignConfig, CosineConfig, MaskConfig, MimicConfig, PredictorConfig, ReconstructConfig, ViTConfig
from student.errors import ConfigError, RunError
from student.masking import draw_noise
from student.modules.model import Student
from teacher_cache.checking.remake import reteach, teach_views_again
from teacher_cache.checking.verify import verify
from teacher_cache.crops.beton import CropReader
from teacher_cache.encoding import encode
from teacher_cache.encoding.encode import Encoder, to_host
from teacher_cache.errors import CacheCorruptError, UsageError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.format.spec import StoreSpec
from teacher_cache.store.reader import READERS, StoreReader
from teacher_cache.teachers.base import TeacherOutput

K = 7
PLAN = ExtractPlan(layers="last3", shard_rows=8, batch_size=5)
STORES = {
    "all": replace(PLAN, dtype="float16"),
    "visible": replace(PLAN, dtype="float16", visible=K),
    "visible4": replace(PLAN, dtype="int4", visible=K),
    "four": replace(PLAN, dtype="int4"),
    "zipped": replace(PLAN, dtype="int4", visible=K),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, image_folder):
    """24 crops in 2 views with every store of STORES."""
    cache = crop_folder(tmp_path_factory.mktemp("visible") / "c", image_folder, n_views=2)
    for view in cache.views():
        for name, plan in STORES.items():
            extract_view(view, name, FakeTeacher(), plan)
    for view in cache.views():
        compress(view.store_path("zipped"))
    return cache


def reader_of(cache, name: str, view=0, **options) -> StoreReader:
    return StoreReader(cache.view(view).store_path(name), **options)


def run_race(attention, rows, view, n_first) -> np.ndarray:
    return encode.race(attention, rows, view, n_first).numpy()


# --- the race ------------------------------------------------------------------------------------------------------------


def test_law_of_the_race():
    """First places are taken in proportion to attention, second ones in proportion among the rest; nothing is drawn twice."""
    attention = np.array([0.5, 0.3, 0.2, 0.0], "float32")
    n = 20_000
    order = run_race(np.tile(attention, (n, 1)), np.arange(n), 0, 4)
    assert (np.sort(order, 1) == np.arange(4)).all() and (order[:, 3] == 3).all() and order.dtype == np.int32
    first = np.bincount(order[:, 0], minlength=4) / n
    assert np.abs(first - attention).max() < 0.015
    second = np.bincount(order[order[:, 0] == 0, 1], minlength=4) / (order[:, 0] == 0).sum()
    assert np.abs(second - [0, 0.6, 0.4, 0]).max() < 0.02


def test_a_race_is_a_function_of_row_and_view():
    """A row's race is the same in any batch; another view or row runs another one; a shorter one is its beginning."""
    attention = np.full((6, 16), 1 / 16, "float32")
    whole = run_race(attention, np.arange(6), 3, 16)
    assert np.array_equal(run_race(attention[:2], np.array([4, 1]), 3, 16), whole[[4, 1]])
    assert np.array_equal(run_race(attention, np.arange(6), 3, 5), whole[:, :5])
    assert len({row.tobytes() for row in [*whole, *run_race(attention, np.arange(6), 4, 16)]}) == 12


def test_the_device_runs_the_same_race():
    """On tensors the race and the choice of tokens are those of numpy, to the bit; also with patches that get no attention."""
    generator = np.random.default_rng(0)
    attention = generator.dirichlet(np.full(16, 0.3), 9).astype("float32")
    attention[:, 5:8] = 0
    tokens, rows = generator.normal(size=(9, 2, 17, 24)).astype("float32"), np.arange(100, 109)
    spec = ExtractPlan(layers="last2", dtype="float16", visible=K).store_spec(FakeTeacher().spec, 200)
    output = TeacherOutput(torch.from_numpy(tokens), torch.from_numpy(attention))
    arrays = Encoder(spec, {}, 2, torch.device("cpu"))(output, rows)()
    index = race(attention, rows, 2, K)
    assert (
        np.array_equal(arrays["index"], index)
        and sorted(arrays) == sorted([*spec.array_names, "finite"])
        and arrays["finite"].all()
    )
    kept = take_visible(tokens, index, 1)
    assert np.array_equal(kept[3, 1, 1 + 4], tokens[3, 1, 1 + index[3, 4]]) and np.array_equal(kept[:, :, 0], tokens[:, :, 0])
    assert np.array_equal(arrays["tokens/06"], kept[:, 1].astype("float16"))


# --- stores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("view", [0, 1])
def test_visible_tokens_are_those_of_the_whole(cache, view, reader):
    """A store of visible tokens holds CLS and, in the order of the race of its attention, the tokens of a store of all."""
    whole, some = reader_of(cache, "all", view), reader_of(cache, "visible", view, reader=reader)
    rows = [23, 0, 8, 7]
    index = some.read("index", rows)
    assert np.array_equal(index, race(whole.read("attention", rows), np.array(rows), view, K))
    for layer in (4, 5, 6):
        expected = take_visible(whole.tokens(rows, layer)[:, None], index, 1)[:, 0]
        assert np.array_equal(some.tokens(rows, layer), expected)
    assert np.array_equal(some.read("attention", rows), whole.read("attention", rows))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["visible4", "zipped"])
def test_int4_is_near(cache, name, reader):
    """int4 tokens are the teacher's within 15 % of their size, whichever reader reads them, and all read the same bytes."""
    exact, near = reader_of(cache, "visible"), reader_of(cache, name, reader=reader)
    rows = np.arange(24)
    for layer in (4, 5, 6):
        difference = near.tokens(rows, layer) - exact.tokens(rows, layer)
        assert 0.01 < np.linalg.norm(difference) / np.linalg.norm(exact.tokens(rows, layer)) < 0.15
        assert np.array_equal(
            near.read(f"tokens/{layer:02d}", rows), reader_of(cache, "visible4").read(f"tokens/{layer:02d}", rows)
        )


def test_verify_and_the_teacher_agree(cache):
    """verify finds nothing in such stores; run again, the teacher gives what they hold, and one wrong index is found."""
    assert verify(cache)[0] == []
    view = cache.view(1)
    for name in STORES:
        assert list(reteach(view, view.store_path(name), FakeTeacher(), np.arange(24))) == []


def test_a_wrong_index_is_found(image_folder, tmp_path, monkeypatch):
    """Patches that the attention does not choose, that come twice or that the grid does not have are findings."""
    cache = crop_folder(tmp_path / "c", image_folder)
    arrays_of = Encoder.__call__

    def spoiled(change):
        def call(self, output, rows):
            arrays = arrays_of(self, output, rows)()
            arrays["index"] = change(arrays["index"].copy())
            return lambda: arrays

        return call

    def swapped(index):
        index[:, [0, 1]] = index[:, [1, 0]]
        return index

    for name, change, words in (
        ("swapped", swapped, None),
        ("twice", lambda index: np.where(np.arange(K) == 1, index[:, :1], index), "holds a patch twice"),
        ("outside", lambda index: np.where(index == index[:, :1], 16, index), "holds numbers of patches that are not 0 to 15"),
        ("filled", lambda index: np.where(index == index[:, :1], -1, index), "holds numbers of patches that are not 0 to 15"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "__call__", spoiled(change))
            extract_view(cache.view(0), name, FakeTeacher(), STORES["visible"])
        found = [finding.message for finding in verify(cache)[0] if f"/{name}.zarr" in finding.path]
        assert all(words in message for message in found) and len(found) == 3 * (words is not None)
    store = cache.view(0).store_path("swapped")
    found = list(reteach(cache.view(0), store, FakeTeacher(), np.arange(24)))
    assert any("visible patches of row 0 are not those that its attention chooses" in finding.message for finding in found)


@pytest.mark.parametrize("wrong", [16, -1])
def test_a_foreign_index_is_no_crash(image_folder, tmp_path, monkeypatch, wrong):
    """Numbers of patches that the grid does not have, with sound checksums, are an error of every reader and of training."""
    cache, arrays_of = crop_folder(tmp_path / "c", image_folder), Encoder.__call__

    def spoiled(self, output, rows):
        arrays = arrays_of(self, output, rows)()
        arrays["index"] = np.where(rows[:, None] == 13, wrong, arrays["index"]).astype("int32")
        return lambda: arrays

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", spoiled)
        extract_view(cache.view(0), "visible", FakeTeacher(), STORES["visible"])
    for reader in READERS:
        with pytest.raises(CacheCorruptError, match="row 13 (names patches that are not 0 to 15|is damaged)"):
            reader_of(cache, "visible", reader=reader).read("index", [1, 13])
    source = CachedSource(cache, ["visible"], [Needs(layers=(-1,))], batch_size=24)
    with pytest.raises(CacheCorruptError, match="row 13 names patches"):
        list(source.micro_batches(0, 1))
    assert [f.kind for f in teach_views_again(cache, FakeTeacher(), "visible", 24)] == ["unchecked"]


def test_copies_wait_for_their_own_device(monkeypatch):
    """What is copied from a GPU is waited for on that GPU, not on whichever is the current one."""
    asked, device = [], torch.device("cuda", 3)

    class Tensor:
        is_cuda, device = True, torch.device("cuda", 3)

        def to(self, where, non_blocking):
            assert (where, non_blocking) == ("cpu", True)
            return torch.ones(1)

    class Event:
        def record(self, stream):
            asked.append(stream)

        def synchronize(self):
            asked.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: ("stream", of))
    assert to_host({"a": Tensor(), "b": Tensor()})()["b"].tolist() == [1]
    assert asked == [("stream", device), "waited"]


def test_versions(cache):
    """Before version 3, a store that says nothing new was of version 1; int4 and visible tokens made version 2, nothing else."""
    for name in STORES:
        new = cache.view(0).store(name).manifest
        assert new.to_json()["format_version"] == 4
        teacher = dataclasses.replace(new.teacher, activation=None, positions=None)
        manifest = dataclasses.replace(new, teacher=teacher, format_version=new.store.least_version, made=None)
        value = json.loads(json.dumps(manifest.to_json()))
        assert value["format_version"] == (1 if name == "all" else 2) and ("visible" in value["store"]) == (name != "all")
        assert type(manifest).from_json(value) == manifest
        with pytest.raises(CacheCorruptError, match="version|expected the keys"):
            type(manifest).from_json({**value, "format_version": 3 - value["format_version"]})


def test_extraction_goes_on(image_folder, tmp_path, cache):
    """Interrupted in the middle and continued, such a store has the bytes of one made in one go."""
    again = crop_folder(tmp_path / "c", image_folder)

    class Failing(FakeTeacher):
        def __call__(self, images, layers):
            output = super().__call__(images, layers)
            if self.n_calls == 9:
                raise KeyboardInterrupt
            return output

    store = again.view(0).store_path("visible4")
    with pytest.raises(KeyboardInterrupt):
        extract_view(again.view(0), "visible4", Failing(), STORES["visible4"])
    assert StoreReader(store).finished.tolist() == [True, False, False]
    extract_view(again.view(0), "visible4", FakeTeacher(), STORES["visible4"])
    whole = cache.view(0).store_path("visible4")
    for path in whole.rglob("c.*"):
        assert (store / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("visible", "has_cls", "words"),
    [(17, True, "--tokens visible:17: fake has 16 patches"), (4, False, "fake gives no attention to choose by")],
)
def test_what_cannot_be_kept(visible, has_cls, words):
    """More patches than there are, or a choice by attention where there is none, are refused."""
    with pytest.raises(UsageError, match=words):
        ExtractPlan(visible=visible).store_spec(FakeTeacher(has_cls=has_cls).spec, 9)


def test_bytes():
    """For ViT-B/16, five layers: int4 is below .33 and int8 below .52 of float16; 59 of 197 tokens are .30 of all."""
    clip = replace(FakeTeacher().spec, grid=(14, 14), dim=768, depth=12)

    def row_bytes(**plan) -> int:
        spec: StoreSpec = ExtractPlan(**plan).store_spec(clip, 10_000)
        return sum(spec.row_bytes(array, clip) for array in spec.array_names)

    whole = row_bytes(dtype="float16")
    assert row_bytes(dtype="int4") / whole < 0.33 and row_bytes(dtype="int8") / whole < 0.52
    assert row_bytes(dtype="int8", visible=58) / row_bytes(dtype="int8") == pytest.approx(59 / 197, abs=0.003)


# --- students ------------------------------------------------------------------------------------------------------------

ALIGN, MIMIC = (AlignConfig(levels=3),), (MimicConfig(),)
PIXELS = ReconstructConfig(decoder=PredictorConfig(dim=32, depth=1, heads=2))
BACKBONE = ViTConfig(image_size=32, patch_size=8, dim=16, depth=3, heads=2)
DRAWN = MaskConfig(kind="attention", ratio=0.7)  # keeps 4 of 16


def first_batch(cache, name, needs):
    return next(iter(CachedSource(cache, [name], [needs], batch_size=8).micro_batches(0, 1)))


@pytest.mark.parametrize("objectives", [ALIGN, MIMIC, (*MIMIC, PIXELS)], ids=["align", "mimic", "mimic and pixels"])
def test_visible_tokens_teach_the_same(cache, objectives):
    """From a store of visible tokens come the loss and the gradients that a store of all gives for the same mask."""
    config = tiny_config(objectives=objectives, mask=DRAWN, backbone=BACKBONE)
    student = Student(config, (stored_shape(cache, "visible"),))
    batch = first_batch(cache, "visible", student.needs[0])
    mask = student.draw_mask(batch, draw_noise(0, 0, 8, 16))
    assert torch.equal(mask.keep, batch.targets[0].index[:, :4]) and mask.keep.shape == (8, 4)
    assert torch.equal(torch.cat([mask.keep, mask.drop], 1).sort(1).values, torch.arange(16).expand(8, 16))

    results = []
    for given in (batch, first_batch(cache, "all", student.needs[0])):
        student.zero_grad()
        loss, parts = student(given, Mask(mask.keep, mask.drop))
        loss.backward()
        results.append([loss.item(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    assert results[0][0] == results[1][0] and len(results[0]) == len(results[1]) > 5
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_views_bring_other_masks(cache):
    """In another view the same image has another race, so another mask; in the same view it has the same in every epoch."""
    student = Student(tiny_config(objectives=ALIGN, mask=DRAWN), (stored_shape(cache, "visible"),))
    source = CachedSource(cache, ["visible"], list(student.needs), batch_size=24)
    masks = []
    for step in range(3):
        batch = next(iter(source.micro_batches(step, step + 1)))
        masks.append(student.draw_mask(batch, draw_noise(0, step, 24, 16)).keep[batch.rows.argsort()])
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


COSINE = (CosineConfig(predictor=PredictorConfig(dim=32, depth=1, heads=2)),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"objectives": ALIGN, "mask": replace(DRAWN, kind="random")},
            "mask.kind=random chooses other patches than those stored",
        ),
        ({"objectives": ALIGN, "mask": replace(DRAWN, ratio=0.4)}, "leaves 9 patches visible, .*--tokens visible:9"),
        ({"objectives": COSINE, "mask": DRAWN}, "objective cosine learns from the tokens of hidden patches too"),
    ],
    ids=["mask", "ratio", "objective"],
)
def test_students_that_need_more_are_refused(cache, options, words):
    """Another mask, more patches than stored, or a loss on hidden patches: refused with the command that makes what is needed."""
    with pytest.raises(ConfigError, match=words):
        Student(tiny_config(**options), (stored_shape(cache, "visible"),))


def test_hidden_tokens_are_never_made_up(cache):
    """Code that asks a store of visible tokens for all patches gets an error, not the tokens of others."""
    batch = first_batch(cache, "visible", Needs(layers=(-1,)))
    with pytest.raises(RunError, match=re.escape("tokens of visible patches only")):
        batch.targets[0].patches(-1)
    assert batch.targets[0].layer(-1).shape == (8, 1 + K, 24)


def test_the_crops_are_the_same(cache):
    """Whatever is kept of the teacher, the pixels are those of the view."""
    batch = first_batch(cache, "visible4", Needs(layers=(-1,)))
    assert batch.images.shape == (8, 3, 32, 32) and len(CropReader(cache.view(0).path)) == 24
