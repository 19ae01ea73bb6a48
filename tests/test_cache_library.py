"""`import teacher_cache`: making, reading and checking a cache from a program, without the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_fakes import contents, flip_bit
from click.testing import CliRunner

import teacher_cache
from teacher_cache import CropPlan, make_cache, teachers
from teacher_cache.cli.main import main
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import MismatchError, NotInCacheError, UnknownNameError, UsageError
from teacher_cache.store.store import Store

PLAN = CropPlan(size=32)
SMALL = {"layers": (5, 6), "shard_rows": 8, "batch_size": 5}


def command(*arguments) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stderr


def test_importing_is_quick():
    """The names are there without torch or numba; opening a cache, and all names but none of the teachers, need neither."""
    code = "import sys, teacher_cache\n[getattr(teacher_cache, name) for name in teacher_cache.__all__]\n"
    code += "import teacher_cache.cli.main\nprint({'torch', 'numba', 'zarr', 'ffcv', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "set()\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        teacher_cache.opne  # noqa: B018


# --- making ----------------------------------------------------------------------------------------------------------


def test_one_call_makes_what_the_command_makes(tmp_path, image_folder, teacher, monkeypatch, capsys):
    """Bytes are those of `teacher-cache extract`; nothing is printed; what is done is told to functions, from none to all."""
    lines, told = [], []
    cache = make_cache(
        tmp_path / "a", images=image_folder, teacher=teacher, plan=PLAN, views=2, **SMALL,
        say=lines.append, progress=lambda *state: told.append(state),
    )  # fmt: skip
    assert capsys.readouterr() == ("", "") and [view.number for view in cache.views()] == [0, 1]
    assert any("24 images in 3 classes, 2 views to make" in line for line in lines)
    assert {("cropping", 0, 24), ("cropping", 24, 24), ("view 1: fake", 0, 24), ("view 1: fake", 24, 24)} <= set(told)
    monkeypatch.setattr(teachers, "load_teacher", lambda *_, **__: teacher)
    small = ["--layers", "5,6", "--shard-rows", 8, "--batch-size", 5]
    command("extract", "--teacher", "fake", "--images", image_folder, "--views", 2, *small, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_by_the_name_of_a_teacher(tmp_path, image_folder, capsys):
    """A teacher that is named is loaded; nothing is printed where nobody wants to be told."""
    cache = make_cache(tmp_path / "c", images=str(image_folder), teacher="demo", layers="last", dtype="float16", device="cpu")
    assert cache.view(0).store("demo").teacher.name == "demo" and capsys.readouterr() == ("", "")


def test_called_again_it_goes_on(tmp_path, image_folder, teacher):
    """Interrupted in the crops or in the targets, the same call ends with the same bytes; on a finished cache it changes none."""
    whole = make_cache(tmp_path / "whole", images=image_folder, teacher=teacher, plan=PLAN, **SMALL)

    def make(progress=None):
        return make_cache(tmp_path / "c", images=image_folder, teacher=teacher, plan=PLAN, **SMALL, progress=progress)

    for stopped_at in ("cropping", "view 0: fake"):

        def stop(what, done, total, stopped_at=stopped_at):
            if what == stopped_at and done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(stop)
    for _ in range(2):
        assert contents(make().path) == contents(whole.path)


def test_crops_alone_then_targets(tmp_path, image_folder, teacher):
    """Without a teacher there are crops; targets come later, without the images, and by several calls with a share each."""
    make_cache(tmp_path / "c", images=image_folder, plan=PLAN)
    for shards in (range(1, 3), range(0, 1)):
        cache = make_cache(tmp_path / "c", teacher=teacher, shards=shards, **SMALL)
    one = make_cache(tmp_path / "one", images=image_folder, teacher=teacher, plan=PLAN, **SMALL)
    assert contents(cache.path) == contents(one.path)


def test_the_plan_is_the_plan(tmp_path, image_folder, teacher):
    """Every field of a plan is taken as it is given, its seed too; a cache of another is refused with what differs."""
    plan = CropPlan(size=40, scale=(0.5, 0.9), flip_p=0.0, seed=7, jitter=0.2)
    assert make_cache(tmp_path / "c", images=image_folder, plan=plan).plan == plan
    assert make_cache(tmp_path / "c").plan == plan
    with pytest.raises(MismatchError, match="crop plan seed: 7 in the cache, 0 given"):
        make_cache(tmp_path / "c", images=image_folder, plan=CropPlan(size=40))


def test_tokens_and_layers(tmp_path, image_folder, teacher):
    """Layers are numbers or words, tokens are all or the visible ones, and the store has its own name."""
    make_cache(tmp_path / "c", images=image_folder, teacher=teacher, plan=PLAN, name="seen", layers="last2", tokens="visible:5")
    store = Store.open(tmp_path / "c" / "view-000" / "seen.zarr").spec
    assert (store.layers, store.visible) == ((5, 6), 5)


REFUSED = {
    "tokens": ({"tokens": "visible:0"}, UsageError, "give all, or visible:K"),
    "layers": ({"layers": (5, 9)}, UsageError, "has blocks 1 to 6"),
    "dtype": ({"dtype": "int3"}, UsageError, "dtype is one of"),
    "name": ({"name": "../x"}, UsageError, "give letters, digits"),
    "weights of a loaded teacher": ({"weights": "random:0"}, UsageError, "give neither"),
    "no images": ({"images": None}, UsageError, "give --images DIR"),
    "no such teacher": ({"teacher": "clip-b61"}, UnknownNameError, "Did you mean clip-b16"),
    "shards before crops": ({"shards": range(1)}, UsageError, "First run: teacher-cache crop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, image_folder, teacher, case):
    """What the command refuses raises an error with its words, and nothing is written."""
    change, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        make_cache(tmp_path / "c", **{"images": image_folder, "teacher": teacher, "plan": PLAN, **change})
    assert not (tmp_path / "c").exists()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reading(shared_cache, teacher):
    """Tokens and attention of any rows, in any order, are the teacher's of those very pixels; layers count from either end."""
    view, rows = teacher_cache.open(str(shared_cache.path)).view(1), [17, 4, 17]
    pixels = view.pixels(rows)
    assert np.array_equal(pixels, CropReader(view.path).read(rows)) and pixels.dtype == np.uint8
    said, targets = teacher(torch.from_numpy(pixels), [2, 6]), view.targets("fake16")
    for place, layers in enumerate(((2, -5), (6, -1))):
        expected = said.tokens[:, place].numpy()
        for layer in layers:
            found = targets.tokens(rows, layer=layer)
            assert found.shape == (3, 17, 24) and found.dtype == np.float32
            assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    assert np.array_equal(targets.tokens(rows), targets.tokens(rows, layer=6))
    assert np.allclose(targets.attention(rows), said.attention.numpy(), atol=1e-3)


def test_what_cannot_be_read(shared_cache, tmp_path):
    """A store, block or row that is not there is an error that names those that are."""
    view = teacher_cache.open(shared_cache.path).view(0)
    with pytest.raises(UsageError, match="has targets of fake, fake-zstd, fake16. Choose"):
        view.targets()
    with pytest.raises(UnknownNameError, match="no targets of dino; it has those of fake, fake-zstd, fake16"):
        view.targets("dino")
    for layer in (1, -6, 0, 7, -7):
        with pytest.raises(NotInCacheError, match="has no tokens/.*; it has tokens/02"):
            view.targets("fake").tokens([0], layer=layer)
    with pytest.raises(NotInCacheError, match="it has 0 to 23"):
        view.targets("fake").tokens([24])
    with pytest.raises(NotInCacheError, match="it has 0 to 23"):
        view.pixels([-1])
    with pytest.raises(UsageError, match="is no cache"):
        teacher_cache.open(tmp_path)


def test_verify(cache, capsys):
    """verify takes a path or a cache, gives a list that is empty for a sound one, and prints nothing."""
    told = []
    assert teacher_cache.verify(cache.path) == teacher_cache.verify(cache, sample=2, progress=lambda *s: told.append(s)) == []
    flip_bit(cache.path / "view-001" / "crops.beton", -5000)
    (finding,) = teacher_cache.verify(str(cache.path))
    assert (finding.kind, finding.path) == ("damaged", str(cache.path / "view-001" / "crops.beton"))
    assert told and capsys.readouterr() == ("", "")
