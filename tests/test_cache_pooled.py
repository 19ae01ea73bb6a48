"""A teacher like SigLIP without its norm: no CLS token, attention of a pooling head, no final norm. All that reads a cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_fakes import contents, crop_folder, flip_bit
from click.testing import CliRunner
from fakes import FakeTeacher

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.live_source import LiveSource
from pipelines.feed.teacher_values import stored_shape, teacher_shape
from pipelines.pages.of_cache.summary import provenance
from pipelines.pages.of_crops.laws import laws_for
from pipelines.presets import recipe
from student.batch import Needs
from student.cli.train import train
from student.errors import ConfigError
from student.masking import draw_noise
from student.modules.model import Student
from teacher_cache import teachers
from teacher_cache.cache import Cache
from teacher_cache.checking.repair import repair_store
from teacher_cache.checking.verify import verify
from teacher_cache.cli.main import main
from teacher_cache.errors import MismatchError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.inspecting.compare import compare
from teacher_cache.store.spare import is_current
from teacher_cache.store.store import Store

POOLED = FakeTeacher(has_cls=False, pools=True, has_head=False)
PLAN = ExtractPlan("last2", shard_rows=8, batch_size=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory, image_folder) -> Cache:
    """Stores `fake` of all tokens and `seen` of visible ones. Read only."""
    cache = crop_folder(tmp_path_factory.mktemp("pooled") / "c", image_folder)
    for name, plan in (("fake", PLAN), ("seen", replace(PLAN, visible=6))):
        extract_view(cache.view(0), name, POOLED, plan)
    return cache


@pytest.fixture(autouse=True)
def fake_teacher(monkeypatch):
    monkeypatch.setattr(teachers, "load_teacher", lambda *_, **__: POOLED)


def run(command, *arguments, code=0) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_what_is_stored(made):
    """Attention is the pooling head's, in a row that sums to 1; N tokens without CLS; no head, and no folder of one."""
    store = made.view(0).targets("fake")
    assert store.manifest.format_version == 4 and store.head == {} and not (store.path / "head").exists()
    assert store.tokens([3], 6).shape == (1, 16, 24)
    np.testing.assert_allclose(store.attention(range(24)).sum(1), 1, rtol=1e-5)
    seen = made.view(0).targets("seen")
    np.testing.assert_array_equal(seen.attention(range(24)), store.attention(range(24)))
    assert seen.tokens([3], 6).shape == (1, 6, 24)


def test_all_commands_say_so(made, tmp_path, image_folder):
    """inspect, estimate and verify name the source of attention and the missing norm, and work."""
    said = run(main, "inspect", made.path)
    assert "int8, codec none, pooling attention, no final norm" in said
    assert "pooling attention, 6 patches of each crop, no final norm" in said
    described = json.loads(run(main, "inspect", "--json", made.path))["views"][0]["stores"][0]["teacher"]
    assert (described["attention_source"], described["head"]) == ("pool", "none")
    said = run(main, "estimate", "--teacher", "fake", "--n-images", 100, tmp_path)
    assert "int8, pooling attention, no final norm" in said
    assert "sound and complete" in run(main, "verify", "--images", image_folder, "--weights", "random:0", "--teacher", "fake",
                                       made.path)  # fmt: skip


def test_pictures_and_pages_say_so(made, tmp_path):
    """show, and what a page says of where targets come from, name the pooling head, and no CLS."""
    run(main, "show", "--teacher", "fake", "--row", "0:2", "-o", tmp_path / "a.svg", made.path)
    assert "pooling attention" in (tmp_path / "a.svg").read_text()
    said = dict(provenance(made.view(0).targets("fake")))
    assert said["kept"] == "layers 5, 6, int8, pooling attention"
    assert said["teacher"].endswith("6 blocks, no CLS, 0 registers, no final norm")


def test_compared_with_another(made, tmp_path, image_folder):
    """inspect of two caches names source and head where they differ."""
    other = crop_folder(tmp_path / "o", image_folder)
    extract_view(other.view(0), "fake", FakeTeacher(has_cls=False), PLAN)
    lines = {(line.what, line.text) for line in compare(made, other) if line.kind == "differs"}
    assert ("fake: teacher's attention_source", "pool | None") in lines
    assert ("fake: teacher's head", "none | layernorm") in lines


@pytest.mark.parametrize("file", ["store.json", "probe/c.0.0", "quant/06/centre/c.0", "spare.tar", "attention/c.1.0"])
def test_mended(made, tmp_path, file):
    """Spare copies and repair serve a store without head: any file is restored or made again to the byte."""
    cache = Cache(shutil.copytree(made.path, tmp_path / "c"))
    before, path = contents(cache.path), cache.view(0).store_path("fake")
    assert is_current(path) and verify(cache)[0] == []
    flip_bit(path / file, 30)
    assert verify(cache)[0] != []
    assert list(repair_store(cache.view(0), "fake"))
    extract_view(cache.view(0), "fake", POOLED, PLAN)
    assert verify(cache)[0] == [] and contents(cache.path) == before


def test_a_teacher_with_another_source_or_head_is_refused(made, tmp_path):
    """A begun store is not gone on with by a teacher whose attention comes from elsewhere, or that has a final norm."""
    cache = Cache(shutil.copytree(made.path, tmp_path / "c"))
    shutil.rmtree(cache.view(0).store_path("seen"))
    with pytest.raises(MismatchError) as error:
        extract_view(cache.view(0), "fake", FakeTeacher(has_cls=False, pools=True), PLAN)
    assert "head: none in the store, layernorm given" in str(error.value)
    with pytest.raises(MismatchError, match="attention_source: pool in the store, None given"):
        extract_view(cache.view(0), "fake", FakeTeacher(has_cls=False, has_head=False), PLAN)


@pytest.mark.parametrize("preset", ["maskalign-b16", "mr-mae-b16-mimic-only"])
def test_a_student_learns(made, preset):
    """Masks are drawn by pooled attention, and a step from the cache has nearly the loss of a step from the live teacher."""
    shape = stored_shape(made, "fake")
    config = recipe(preset).tiny((replace(shape, depth=2),)).config
    student = Student(config, (shape,))
    assert student.needs[0].attention and not shape.has_cls
    losses = []
    for source in (
        CachedSource(made, ["fake"], student.needs, batch_size=8),
        LiveSource(made, [POOLED], student.needs, batch_size=8),
    ):
        batch = next(iter(source.micro_batches(0, 1)))
        torch.manual_seed(0)  # drop path
        loss, _ = student(batch, student.draw_mask(batch, draw_noise(0, 0, 8, student.n_patches)))
        losses.append(loss.item())
    assert 0 < abs(losses[0] - losses[1]) < 0.02 * losses[1]
    assert any(law.mask.kind == "attention" for law in laws_for(teacher_shape(POOLED.spec)))


def test_a_student_learns_from_visible_tokens(made):
    """Of a store that pooled attention chose the patches of, its first are the student's mask."""
    shape = stored_shape(made, "seen")
    config = recipe("maskalign-b16").tiny((replace(shape, depth=2),)).config
    student = Student(config, (shape,))
    batch = next(iter(CachedSource(made, ["seen"], student.needs, batch_size=8).micro_batches(0, 1)))
    mask = student.draw_mask(batch, draw_noise(0, 0, 8, student.n_patches))
    seen = made.view(0).targets("seen").read("index", batch.rows.numpy())
    assert torch.equal(mask.keep, torch.from_numpy(seen[:, : mask.keep.shape[1]]).long())
    assert student(batch, mask)[0].isfinite()


@pytest.mark.parametrize("preset", ["milan-b16", "cae-v2-b16", "mimco-swin-t"])
def test_losses_of_the_final_norm_refuse_it(made, preset):
    """What compares with the teacher's own output says that there is none, and which objectives fit."""
    shape = stored_shape(made, "fake")
    config = recipe(preset).tiny((shape,)).config
    objectives = tuple(replace(o, tokens=(0.0, 1.0, 1.0)) if o.kind == "cosine" else o for o in config.objectives)
    with pytest.raises(ConfigError, match="fake has none .*objectives align, mimic and reconstruct.mimic learn from"):
        Student(replace(config, objectives=objectives), (shape,))
    has_norm = replace(shape, has_final_norm=True)
    assert Student(replace(config, objectives=objectives), (has_norm,)).needs[0] | Needs() == Needs(
        (-1,), preset == "milan-b16", True
    )


def test_the_command_refuses_it_too(made, tmp_path):
    """student-train ends with that sentence before anything is written."""
    said = run(train, "--cache", made.path, "--preset", "milan-b16", "--tiny", "--teacher", "fake", "--out", tmp_path / "run",
               "--set", "objectives.0.tokens=0,1,1", code=2)  # fmt: skip
    assert "learns from the output of the teacher's final norm" in said and not (tmp_path / "run").exists()


def test_a_store_of_before_has_no_attention(made):
    """What a store says is what a student is told, whatever its teacher could give today."""
    manifest = Store.open(made.view(0).store_path("fake")).manifest
    old = manifest.teacher.in_version(3)
    assert old.attention_source is None and not teacher_shape(old).has_attention
