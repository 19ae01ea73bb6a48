"""student-report: what a run logged, what its student makes of crops, as one page; also where the cache is gone."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipelines.feed.teacher_values import stored_shape
from pipelines.pages.maps import NOTHING
from pipelines.pages.of_run import curves, pictures
from pipelines.pages.of_run.run_facts import WARM_UP_STEPS, read_run
from pipelines.presets import recipe
from student.batch import Mask
from student.cli.report import report
from student.config import SwinConfig, ViTConfig
from student.files.checkpoint import save_checkpoint
from student.files.logs import StepReport
from student.files.run_directory import RunDirectory
from student.modules.attention import cls_attention
from student.modules.backbones import build_backbone
from student.modules.model import Student
from student.modules.pixels import normalise
from student.modules.targets import normalise_patches, patchify
from student.run.optim import build_optimizer
from teacher_cache.cache import Cache
from teacher_cache.extraction.extract import extract_view
from teacher_cache.extraction.planning import ExtractPlan

N_STEPS = 12


def make_run(folder, cache: Cache, preset: str, store: str = "fake"):
    """A run of a preset in miniature that was interrupted after N_STEPS of 24 steps; its weights are the initial ones."""
    chosen = recipe(preset)
    names = (store,) * len(chosen.teachers)
    shapes = tuple(stored_shape(cache, name) for name in names)
    config = replace(chosen.tiny(shapes, 32).config, teachers=names, epochs=8)
    student, weights = Student(config, shapes), cache.view(0).store(store).teacher.weights_sha256
    teachers = [{"store": name, "weights_sha256": weights, "dtype": "int8"} for name in names]
    identity = {"crops_id": cache.crops_id, "views": ["a", "b"], "order": {}, "teachers": teachers}
    directory = RunDirectory(folder, config, identity)
    directory.describe(str(cache.path))
    directory.open_logs(0)
    for step in range(1, N_STEPS + 1):
        rate, wait = (1.0, 0.9) if step <= WARM_UP_STEPS else (100.0, 0.25)
        directory.write(StepReport(step, step / 3, 2 / step, {"mimic": 1 / step, "mimic/detail": 0.5}, 1e-3 * step, rate, wait))
    directory.close()
    save_checkpoint(folder, N_STEPS, student, build_optimizer(student, config.optim), config, identity)
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(report, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory, shared_cache):
    """A run and its page. Read only."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "mr-mae", shared_cache, "mr-mae-b16")
    (folder / "loggers").mkdir()
    (folder / "loggers" / "any.json").write_text("{}")
    run(folder, "-o", folder.parent / "page.html")
    return folder


@pytest.fixture(scope="module")
def page(made):
    return made.parent / "page.html"


# --- what the run logged ---------------------------------------------------------------------------------------------


def test_numbers(made):
    """--json gives steps, speed and wait share by hand: the first steps, which compile, do not count for speed."""
    told = json.loads(run(made, "--json").stdout)
    assert (told["steps"], told["total_steps"], told["finished"]) == (12, 24, False)
    assert told["images_per_s"] == pytest.approx(100) and told["wait_share"] == pytest.approx(0.25)
    assert told["last"]["loss"] == pytest.approx(2 / 12) and told["parts"]["mimic"] == pytest.approx(1 / 12)
    assert told["checkpoints"] == ["checkpoint-00000012.safetensors"] and told["config"]["preset"] == "mr-mae-b16"


def test_torn_lines_are_told(made, tmp_path):
    """Lines that a dying machine tore are left out, and the page and --json say how many."""
    folder = shutil.copytree(made, tmp_path / "run")
    with open(folder / "metrics.jsonl", "ab") as lines:
        lines.write(b'{"step": 13, "epoch"')
    assert json.loads(run(folder, "--json").stdout)["unreadable_log_lines"] == 1
    assert "1 lines of metrics.jsonl could not be read" in run(folder, "-o", tmp_path / "a.html").stderr


def test_long_runs_are_thinned():
    """A curve of any length has at most MOST_POINTS points, which are means; what was never logged stays a gap."""
    values = np.arange(100_000, dtype="float64")
    values[:500] = np.nan
    thin = curves.thinned(values)
    assert len(thin) == curves.MOST_POINTS and np.isnan(thin[0]) and thin[-1] == pytest.approx(np.mean(values[-250:]))
    assert np.nanmean(thin) == pytest.approx(np.nanmean(values[500:]), rel=0.01)
    assert curves.thinned(values[:7]) is not None and len(curves.thinned(values[:7])) == 7


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("mae-s16", ["reconstruction"]),
        ("mr-mae-b16", ["teacher: mimic", "predicted: mimic", "reconstruction"]),
        ("mr-mcmae-s", ["teacher: mimic", "predicted: mimic", "reconstruction"]),
        ("maskalign-b16", ["teacher: align", "predicted: align"]),
        ("milan-b16", ["teacher: cosine", "predicted: cosine"]),
        ("cae-v2-s16", ["teacher: cosine", "predicted: cosine"]),
        ("mimco-s16", []),
    ],
)
def test_every_method_shows_what_it_predicts(tmp_path, shared_cache, preset, expected):
    """Each method's page has its reconstructions or predicted tokens, features, and attention where there is a CLS token."""
    folder = make_run(tmp_path / "run", shared_cache, preset)
    shown = pictures.look(read_run(folder), None, 3)
    titles = [title for title, _ in shown.about]
    assert [title for title in titles if title.startswith(("recon", "teacher", "predicted"))] == expected
    assert {"crop", "visible", "features"} <= set(titles) and ("attention: teacher" in titles) == (preset != "mae-s16")
    assert [crop.row for crop in shown.crops] == [0, 1, 2] and all(len(crop.panels) == len(titles) for crop in shown.crops)
    assert all(panel.pixels.dtype == np.uint8 and panel.pixels.shape[2] == 3 for crop in shown.crops for panel in crop.panels)


def test_visible_tokens(tmp_path, cache, teacher):
    """Of a store of visible tokens the teacher's other patches are grey, and the student predicts none of those."""
    extract_view(cache.view(0), "seen", teacher, ExtractPlan(dtype="int4", shard_rows=8, batch_size=5, visible=6))
    shown = pictures.look(read_run(make_run(tmp_path / "run", cache, "maskalign-b16", "seen")), None, 2)
    for crop in shown.crops:
        grey = {panel.title: (panel.pixels == NOTHING).all(-1) for panel in crop.panels}
        assert grey["teacher: align"].sum() == 16 - 6 and grey["predicted: align"].sum() >= 16 - 6
        assert not (grey["teacher: align"] & ~grey["predicted: align"]).any()


def test_a_perfect_reconstruction_is_the_crop():
    """The normalised pixels of the hidden patches themselves give the very crop back."""
    crops = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = normalise(crops)
    mask = Mask(torch.tensor([[0, 5, 6], [1, 2, 3]]), torch.tensor([[i for i in range(16) if i not in (0, 5, 6)],
                                                                    [i for i in range(16) if i not in (1, 2, 3)]]))  # fmt: skip
    true = normalise_patches(patchify(images, 4))
    predicted = true.gather(1, mask.drop[..., None].expand(-1, -1, true.shape[-1]))
    painted = np.stack(pictures._reconstructions(images, predicted, mask))
    assert (np.abs(painted.astype(int) - crops.numpy()) <= 1).all()
    assert (np.abs(np.stack(pictures._reconstructions(images, 0 * predicted, mask)).astype(int) - crops.numpy()) > 30).any()


def test_attention_is_that_of_the_block():
    """The student's CLS attention equals the map that its last block computes; a Swin has none."""
    backbone = build_backbone(ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2)).eval()
    images, maps = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), []
    last = backbone.blocks[-1].attn
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(inputs[0]))
    attention = cls_attention(backbone, images)
    torch.testing.assert_close(attention, maps[0].mean(1)[:, 0, 1:])
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, window=4, depths=(1, 1), heads=(2, 2))
    assert cls_attention(build_backbone(swin), torch.zeros(1, 3, 32, 32)) is None


@pytest.mark.parametrize(
    "spoil, said",
    [
        ("gone", "No pictures. The cache of the run is not to be had: "),
        ("other", "the run was trained on"),
        ("unknown", "The run does not say where its cache lies. Give --cache CACHE."),
        ("no targets", "has no targets of fake, which the run learned from"),
        ("no checkpoint", "The run has no checkpoint yet."),
    ],
)
def test_without_its_cache_a_run_still_gets_its_page(tmp_path, shared_cache, cache, made, spoil, said):
    """A run whose cache is gone, or is another, or has lost its targets, gets the page without pictures, and is told why."""
    folder = shutil.copytree(made, tmp_path / "run")
    description = json.loads((folder / "config.json").read_text())
    description["data_from"] = str(cache.path)
    if spoil == "gone":
        description["data_from"] = str(tmp_path / "nowhere")
    if spoil == "other":
        description["identity"]["crops_id"] = "0" * 64
    if spoil == "unknown":
        del description["data_from"]
    if spoil == "no targets":
        shutil.rmtree(cache.view(0).store_path("fake"))
    if spoil == "no checkpoint":
        next(folder.glob("checkpoint-*")).unlink()
    (folder / "config.json").write_text(json.dumps(description))
    assert said in run(folder, "-o", tmp_path / "a.html").stderr
    text = (tmp_path / "a.html").read_text()
    assert "There are no pictures: see the notice at the top." in text and "data:image" not in text
    assert "Missing." in text and text.count("<svg") >= 4
    if spoil in ("gone", "unknown"):
        run(folder, "-o", tmp_path / "b.html", "--cache", shared_cache.path)
        assert "data:image" in (tmp_path / "b.html").read_text()


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file(page):
    """The page loads nothing from anywhere, is small, and every id in it names one thing."""
    text = page.read_text()
    assert len(text) < 5e6 and not re.search(r"""(src|href)=["'](?!data:|#)""", text) and "url(http" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for words in ("mr-mae-b16", "12, 50% of 24", "optim.base_lr", "checkpoint-00000012.safetensors", "Waiting.", "25%"):
        assert words in text


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["{run}"], 2, "-o is missing: student-report"),
        (["{run}", "-o", "{tmp}"], 2, "is a folder"),
        (["{run}", "-o", "{tmp}/no/a.html"], 2, "mkdir -p"),
        (["{tmp}/nowhere", "--json"], 1, "is no run of student-train: there is no such folder"),
        (["{run}/loggers", "--json"], 1, "it has no config.json; it holds any.json."),
        (["{cache}", "--json"], 1, "is no run of student-train: it is a cache. Give the folder of its --out."),
        (["{run}/config.json", "--json"], 1, "is a file. Give the folder of a run"),
    ],
)
def test_what_is_wrong_is_said(made, shared_cache, tmp_path, arguments, code, message):
    """A wrong command is one sentence, and nothing is written."""
    said = run(*(argument.format(run=made, tmp=tmp_path, cache=shared_cache.path) for argument in arguments), code=code).stderr
    assert message in said and list(tmp_path.iterdir()) == []


@contextmanager
def opened(browser, page, width: int, theme: str):
    """A tab with the page: nothing is asked of the network, nothing sticks out, headings are in order."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    asked, complaints = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(page.as_uri())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] and complaints == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    yield tab
    tab.close()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(browser, page, width, theme):
    """On a phone and on a desk, light and dark: nothing is asked of the network, nothing sticks out, every picture has words."""
    with opened(browser, page, width, theme) as tab:
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth && i.alt)")
        assert tab.evaluate("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label'))")
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v < 64)")
        assert dark == (theme == "dark")
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "page"])
def test_a_page_replaces_no_other_file(made, name):
    """-o must end as a page does: nothing of a run is ever overwritten."""
    before = (made / "config.json").read_bytes()
    result = CliRunner().invoke(report, [str(made), "-o", str(made / name)])
    assert result.exit_code == 2 and "Give a name that ends in .html" in result.output
    assert (made / "config.json").read_bytes() == before
