"""`teacher-cache show`: what is drawn is what is stored, and what cannot be drawn is said."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_fakes import crop_folder
from click.testing import CliRunner
from fakes import FakeTeacher
from PIL import Image

from pipelines.feed.teacher_values import teacher_shape
from pipelines.pages.maps import NOTHING, colours_of_tokens, hide, similarities
from pipelines.pages.of_crops.crops import box_of, finished_ranges, look
from pipelines.pages.of_crops.laws import METHODS, hidden_patches, laws_for, one_a_kind
from pipelines.presets import PRESETS, recipe
from student.batch import TeacherShape
from teacher_cache.cache import Cache
from teacher_cache.cli.main import main
from teacher_cache.crops.cutting import cut, draw
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.crop_record import CROP_DTYPE
from teacher_cache.store.reader import StoreReader

VIT = TeacherShape("t", (14, 14), 768, 12, True, True, None)


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["show", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


# --- masks -------------------------------------------------------------------------------------------------------------


def test_every_preset_of_the_grid_has_its_law():
    """Each preset on 14 x 14 patches stands behind one law, and that law hides exactly as many patches as the preset."""
    laws = laws_for(VIT)
    by_preset = {name: law for law in laws for name in law.presets}
    for name in PRESETS:
        config = recipe(name).config
        if config.backbone.grid == (14, 14):
            law = by_preset[name]
            hidden = hidden_patches(law, VIT, np.full((2, 196), 1 / 196, "float32"), 2, seed=0)
            assert (hidden.sum(1) == 196 - config.mask.n_keep(config.backbone)).all(), name
            assert law.mask.kind == config.mask.kind and not law.scaled
    assert {law.mask.kind for law in one_a_kind(laws)} == {"attention", "random", "block", "unit"}


@pytest.mark.parametrize("side", [1, 2])
def test_a_grid_too_small_for_a_law_lacks_it(side):
    """A grid so small that a preset would hide all of it gets the laws that are left, and no error."""
    assert all(law.mask.n_keep(law.backbone) > 0 for law in laws_for(replace(VIT, grid=(side, side), dim=64)))


def test_names_are_drawn_as_they_are(tmp_path, image_folder):
    """File and class names with dollars are names, not formulas."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "class-0").rename(folder / r"$\frac$")
    cache = crop_folder(tmp_path / "c", folder)
    extract_view(cache.view(0), "fake", FakeTeacher(), ExtractPlan(layers="last", shard_rows=8, batch_size=5))
    labels = cache.images().labels
    rows = [int(np.flatnonzero(labels == label)[0]) for label in (0, 1)]
    names = [cache.images().names[row] for row in rows]
    assert any("$" in name for name in names)
    for asked in (["--row", rows[0]], ["--row", rows[0], "--row", rows[1]], ["--row", rows[1]]):
        code, said = run(*asked, "-o", tmp_path / "out.png", cache.path)
        assert code == 0, said


def test_a_small_grid_gets_the_laws_scaled():
    """On a grid of no preset every kind comes from the presets of other grids, marked as scaled; on one of a preset none does."""
    for grid, scaled in (((10, 10), True), ((8, 8), False)):
        laws = laws_for(replace(VIT, grid=grid, dim=64))
        kinds = ("attention", "random", "block", "unit")
        assert {(law.mask.kind, law.scaled) for law in laws} == {(kind, scaled) for kind in kinds}


def test_no_law_looks_at_attention_that_is_not_there():
    """Without attention there are no masks by attention; on a grid that is not square there is none at all."""
    laws = laws_for(replace(VIT, has_cls=False, has_attention=False))
    assert {law.mask.kind for law in laws} == {"random", "block", "unit"}
    assert hidden_patches(laws[0], VIT, None, 3, seed=0).shape == (3, 196)
    assert laws_for(replace(VIT, grid=(14, 10))) == []


def test_masks_by_attention_follow_it():
    """Patches with all of the attention stay visible, whatever the seed; another seed hides others."""
    attention = np.full((1, 196), 1e-6, "float32")
    attention[0, :20] = 0.05
    law = next(law for law in laws_for(VIT) if law.mask.kind == "attention")
    first, second = (hidden_patches(law, VIT, attention, 1, seed)[0] for seed in (0, 1))
    assert not first[:20].any() and not second[:20].any() and (first != second).any()


def test_every_preset_belongs_to_a_method():
    """The module of every preset has the name of its method."""
    assert {function.__module__.rpartition(".")[2] for function in PRESETS.values()} == METHODS.keys()


# --- maps --------------------------------------------------------------------------------------------------------------


def test_equal_colours_mean_like_tokens():
    """The same token has the same colour in two crops, another token another; of equal tokens nothing is made up."""
    tokens = np.random.default_rng(0).normal(size=(2, 16, 24)).astype("float32")
    tokens[1, 5] = tokens[0, 3]
    colours, share = colours_of_tokens(tokens)
    assert colours.dtype == np.uint8 and colours.shape == (2, 16, 3) and 0 < share < 1
    assert (colours[1, 5] == colours[0, 3]).all() and len(np.unique(colours.reshape(-1, 3), axis=0)) > 25
    flat, share = colours_of_tokens(np.ones((1, 4, 8), "float32"))
    assert (flat == flat[0, 0]).all() and share == 0


def test_similarities_are_cosines():
    """1 with itself and with a longer token of its direction, 0 at a right angle, -1 the other way, 0 with nothing."""
    tokens = np.array([[1, 0], [3, 0], [0, 2], [-1, 0], [0, 0]], "float32")
    assert similarities(tokens, 0).tolist() == [1, 1, 0, -1, 0]


def test_hidden_patches_are_covered_and_others_untouched():
    """A hidden patch has one colour, every pixel of the others is the crop's, also where the grid does not divide the crop."""
    pixels = np.random.default_rng(0).integers(0, 255, (10, 10, 3), "uint8")
    hidden = np.array([0, 0, 0, 1, 0, 0], bool)  # the first patch of the second line of 3
    covered = (hide(pixels, hidden, (2, 3)) == NOTHING).all(2)
    assert covered[5:, :4].all() and covered.sum() == 20
    assert (hide(pixels, hidden, (2, 3))[~covered] == pixels[~covered]).all()


@pytest.mark.parametrize("plan", [CropPlan(size=32), CropPlan.center(32)], ids=lambda plan: plan.kind)
def test_the_box_is_what_was_cut(plan):
    """The box on the original holds the pixels of the crop, for random and for centre crops."""
    y, x = np.mgrid[:60, :90]
    image = Image.fromarray(np.stack([x * 2, y * 2, 0 * x], -1).astype("uint8"))
    record = np.zeros((), CROP_DTYPE)
    crop = draw(replace(plan, flip_p=0.0), "a.png", 0, 60, 90)
    record["image_height"], record["image_width"] = 60, 90
    for field in ("top", "left", "height", "width"):
        record[field] = getattr(crop, field)
    left, top, width, height = box_of(plan, record)
    pixels = np.asarray(cut(plan, image, crop), float) / 2
    centre = left + width / 2, top + height / 2
    assert np.abs(pixels[..., :2].mean((0, 1)) - centre).max() < 1.6  # half a pixel before and half a pixel after resizing
    assert abs(pixels[0, -1, 0] - pixels[0, 0, 0] - width) < 3


# --- the command -------------------------------------------------------------------------------------------------------


def test_what_is_looked_at_is_what_is_stored(shared_cache, image_folder):
    """Pixels, tokens without CLS, attention, name and original are those of the row."""
    view = shared_cache.view(1)
    store = view.targets("fake16")
    (crop,) = look(view, store, [5], image_folder)
    names = shared_cache.images().names
    assert crop.name == names[5] and crop.class_name == names[5].split("/")[0]
    assert crop.original.size == Image.open(image_folder / names[5]).size
    output = FakeTeacher()(torch.from_numpy(crop.pixels[None]), store.spec.layers)
    assert np.allclose(crop.tokens[6], output.tokens[0, -1, 1:], atol=5e-3)
    assert np.allclose(crop.attention, output.attention[0])


def test_a_picture_and_a_sheet_are_written(shared_cache, image_folder, tmp_path):
    """One row gives a picture, several a sheet; the same command gives the same bytes."""
    for name, rows in (("one.png", ["--row", "3"]), ("sheet.png", ["--row", "0:2", "--row", "7"])):
        out = tmp_path / name
        arguments = [shared_cache.path, *rows, "--view", 1, "--teacher", "fake", "--images", image_folder, "-o", out]
        assert run(*arguments) == (0, f"Wrote {out}\n")
        before = out.read_bytes()
        assert run(*arguments)[0] == 0 and out.read_bytes() == before
        with Image.open(out) as picture:
            assert min(picture.size) > 500 and len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 100


@pytest.mark.parametrize(("rows", "layers"), [(["3"], [2, 3, 4, 5, 6]), (["3", "7"], [2, 4, 6])], ids=["picture", "sheet"])
def test_only_layers_that_are_drawn_are_read(shared_cache, tmp_path, monkeypatch, rows, layers):
    """A picture has every stored layer; a sheet reads and draws the first, the last and one between."""
    asked, tokens = [], StoreReader.tokens
    monkeypatch.setattr(StoreReader, "tokens", lambda store, rows, layer: asked.append(layer) or tokens(store, rows, layer))
    chosen = [word for row in rows for word in ("--row", row)]
    assert run(shared_cache.path, *chosen, "--teacher", "fake", "-o", tmp_path / "a.png")[0] == 0
    assert asked == layers


def test_rows_that_are_not_there_yet(shared_cache, teacher, tmp_path):
    """Of an unfinished store the finished rows are drawn; for others it is said which there are and how to go on."""
    cache = Cache(shutil.copytree(shared_cache.path, tmp_path / "cache"))
    extract_view(cache.view(0), "part", teacher, ExtractPlan(shard_rows=5, batch_size=5), range(1, 3))
    assert finished_ranges(cache.view(0).targets("part")) == "rows 5 to 14"
    code, said = run(cache.path, "--teacher", "part", "--row", 4, "-o", tmp_path / "a.png")
    assert code == 1 and "there are rows 5 to 14" in said and "teacher-cache extract --teacher fake" in said
    assert run(cache.path, "--teacher", "part", "--row", 5, "-o", tmp_path / "a.png")[0] == 0


def test_a_teacher_without_attention(shared_cache, tmp_path):
    """Without CLS the picture is drawn without attention, and that is said."""
    cache = Cache(shutil.copytree(shared_cache.path, tmp_path / "cache"))
    extract_view(cache.view(0), "plain", FakeTeacher(has_cls=False), ExtractPlan(shard_rows=24, batch_size=5))
    store = cache.view(0).targets("plain")
    (crop,) = look(cache.view(0), store, [0])
    assert crop.attention is None and crop.tokens[6].shape == (16, 24) and not teacher_shape(store.teacher).has_attention
    code, said = run(cache.path, "--teacher", "plain", "-o", tmp_path / "a.png")
    assert code == 0 and "The store of fake has no attention" in said


def test_a_store_of_visible_tokens(shared_cache, teacher, tmp_path):
    """Tokens of visible patches stand at their places, the others are missing; a patch that is missing is not compared with."""
    cache = Cache(shutil.copytree(shared_cache.path, tmp_path / "cache"))
    extract_view(cache.view(0), "seen", teacher, ExtractPlan(shard_rows=8, batch_size=5, visible=6))
    view = cache.view(0)
    (seen,), (whole,) = (look(view, view.targets(name), [3]) for name in ("seen", "fake16"))
    assert seen.is_kept.sum() == 6 and whole.is_kept.all()
    assert np.allclose(seen.tokens[6][seen.is_kept], whole.tokens[6][seen.is_kept], atol=0.1)
    colours, _ = colours_of_tokens(seen.tokens[6][None])
    assert ((colours[0] == NOTHING).all(1) == ~seen.is_kept).all()
    arguments = [cache.path, "--teacher", "seen", "--row", 3, "-o", tmp_path / "a.png"]
    code, said = run(*arguments)
    assert code == 0 and "keeps 6 of 16 patches" in said
    missing, kept = (divmod(int(np.flatnonzero(of)[0]), 4) for of in (~seen.is_kept, seen.is_kept))
    code, said = run(*arguments, "--patch", "{},{}".format(*missing))
    assert code == 2 and "such as {},{}".format(*kept) in said
    assert run(*arguments, "--patch", "{},{}".format(*kept))[0] == 0


BAD = {
    "--row 24": (2, "rows 0 to 23"),
    "--row 3:3": (2, "0:8"),
    "--row 0:100": (2, "at most 64"),
    "--patch 4,0": (2, "0,0 to 3,3"),
    "--patch 4": (2, "row and column"),
    "--view 2": (1, r"it has \[0, 1\]"),
    "--teacher clip": (2, "fake, fake-zstd, fake16"),
    "-o picture.txt": (2, ".png, .pdf, .svg"),
    "-o no/picture.png": (2, "mkdir -p no"),
    "-o .": (2, "is a folder"),
    "--images .": (2, "has no class-"),
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_requests_say_what_would_be_right(arguments, shared_cache, tmp_path, monkeypatch):
    """A request that cannot be met ends with a sentence that says what could be, and no file."""
    monkeypatch.chdir(tmp_path)
    code, words = BAD[arguments]
    teacher = [] if "--teacher" in arguments else ["--teacher", "fake"]
    found, said = run(shared_cache.path, *teacher, *arguments.split())
    assert found == code and re.search(words, said), said
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_put_into_a_cache(shared_cache):
    """A picture inside the cache is refused: verify accounts for every file there."""
    code, said = run(shared_cache.path, "--teacher", "fake", "-o", shared_cache.path / "view-000" / "a.png")
    assert code == 2 and "outside of" in said
