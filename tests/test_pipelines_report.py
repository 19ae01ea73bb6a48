"""`teacher-cache report`: figures that are right, on a page that anyone can read."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import crop_folder
from click.testing import CliRunner
from fakes import FakeTeacher, write_images
from oracles import quantise

from pipelines.pages.of_cache.boxes import box_figures
from pipelines.pages.of_cache.cache_report import Options, page_of, report
from pipelines.pages.of_cache.fidelity import measured_errors
from pipelines.pages.of_cache.layers import AttentionStatistics, LayerStatistics, effective_rank, expected_errors
from pipelines.pages.of_cache.neighbours import agreement, nearest, on_a_plane
from pipelines.pages.of_cache.sample import draw_blocks, gather
from teacher_cache.cache import Cache
from teacher_cache.cli.main import main
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.crop_record import CROP_DTYPE
from teacher_cache.format.quantize import GROUPS, ChannelStatistics, dequantise, token_errors
from teacher_cache.store.reader import StoreReader


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def page(shared_cache, tmp_path_factory) -> Path:
    """The page of `shared_cache`, of the int8 store."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    report(shared_cache.path, out, Options(teacher="fake", verify=True), say=lambda line: None)
    return out


# --- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, off", [("int8", 0.02), ("int4", 0.08)])
def test_the_expected_error_is_the_true_one(dtype, off):
    """What the scales lead one to expect is near the true error; in 4 bits an outlier channel can only make it too large."""
    tokens = np.random.default_rng(0).normal(size=(200, 300)).astype("float32")
    tokens[:50, 7] *= 30
    statistics = ChannelStatistics.fit(tokens)
    q, scale = quantise(tokens, statistics, dtype, GROUPS[dtype])
    stored = dequantise(q, scale, statistics, dtype, GROUPS[dtype])
    true = token_errors(tokens, stored, statistics)
    expected = expected_errors(statistics.standardise(stored), scale, GROUPS[dtype])
    near = slice(0 if dtype == "int8" else 50, None)
    assert np.abs(expected / true - 1)[near].max() < 0.25 and np.abs(expected[near].mean() / true[near].mean() - 1) < off
    assert (expected > 0.75 * true).all()


def test_effective_rank_counts_directions():
    """Equal directions count one each, one direction counts 1, none 0."""
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.diag([5.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros((3, 3))) == 0


def test_layer_figures_find_what_was_planted():
    """A channel ten times the others is an outlier, a token of high norm is large, likeness is the mean cosine."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(6, 12, 40)).astype("float32")
    tokens[:, :, 5] *= 10
    tokens[2, 3] *= 6
    statistics = LayerStatistics(40, seed=0)
    statistics.add(tokens[:4])
    statistics.add(tokens[4:])
    figures = statistics.figures(3)
    assert figures.channels[0][0] == 5 and figures.n_outliers == 1 and figures.n_large == pytest.approx(1 / 72)
    unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
    cosines = [unit[crop, i] @ unit[crop, j] for crop in range(6) for i in range(12) for j in range(12) if i != j]
    assert figures.likeness == pytest.approx(np.mean(cosines), abs=1e-5)


def test_attention_from_one_patch_to_all():
    """Entropy is 0 where one patch has all and 1 where all have the same; the top tenth and the sum are told apart."""
    statistics = AttentionStatistics(20)
    attention = np.full((2, 20), 0.04, "float32")
    attention[0] = 0
    attention[0, 3] = 0.6
    statistics.add(attention)
    figures = statistics.figures()
    assert figures.entropies == pytest.approx([0, 1], abs=1e-6) and figures.to_patches == pytest.approx(0.7)
    assert figures.top_tenth == pytest.approx((1 + 0.1) / 2) and figures.mean_map[3] == pytest.approx((1 + 0.05) / 2)


def test_a_sample_is_of_finished_rows_and_bounded(shared_cache, teacher, tmp_path):
    """Rows of unfinished shards are never drawn; no more are drawn than asked for, the same again from the same seed."""
    cache = Cache(shutil.copytree(shared_cache.path, tmp_path / "cache"))
    extract_view(cache.view(0), "part", teacher, ExtractPlan(shard_rows=4, batch_size=4), range(1, 4))
    assert draw_blocks(cache.view(0).targets("part"), 2000, 0).tolist() == list(range(4, 16))
    large = cache.view(0).targets("fake")
    large.spec = replace(large.spec, n_rows=10_000, shard_rows=1000)
    large.finished = np.arange(10) != 4
    rows = draw_blocks(large, 500, seed=1)
    assert len(rows) == len(set(rows.tolist())) == 500 and (np.diff(rows) > 0).all()
    assert not ((rows >= 4000) & (rows < 5000)).any()
    assert (rows == draw_blocks(large, 500, seed=1)).all() and (rows != draw_blocks(large, 500, seed=2)).any()


def test_no_crop_is_its_own_neighbour():
    """A row is left out of its neighbours, also where others are equal to it; agreement counts the nearest."""
    features = np.repeat(np.eye(4), 3, axis=0) + np.arange(12)[:, None] * 1e-9
    found = nearest(features, 2)
    assert (found.index != np.arange(12)[:, None]).all()
    assert (found.index // 3 == np.arange(12)[:, None] // 3).all() and found.cosine.min() > 0.99
    assert agreement(found, np.arange(12) // 3) == 1 and agreement(found, np.arange(12)) == 0


def test_a_map_keeps_groups_apart():
    """Two groups of crops are two groups on the plane; the same features give the same map."""
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(20, 60)), rng.normal(size=(20, 60)) + 8])
    places = on_a_plane(features, seed=0)
    assert places.min() == 0 and places.max() == 1 and (places == on_a_plane(features, seed=0)).all()
    first, second = places[:20], places[20:]
    between = np.linalg.norm(first.mean(0) - second.mean(0))
    assert between > 2 * max(np.linalg.norm(part - part.mean(0), axis=1).mean() for part in (first, second))


def test_boxes_in_figures():
    """Area, ratio, enlargement, flips and the map of what is seen are those of the boxes; a centre crop has its true box."""
    crops = np.zeros(2, CROP_DTYPE)
    crops["image_height"], crops["image_width"] = 100, 200
    crops["top"], crops["left"], crops["height"], crops["width"] = [0, 50], [0, 100], 50, 100
    crops["flip"] = [0, 1]
    figures = box_figures(crops, CropPlan(size=100))
    assert figures.areas.tolist() == [0.25, 0.25] and figures.ratios.tolist() == [2, 2] and figures.flipped == 0.5
    assert figures.magnification == pytest.approx([2**0.5] * 2)
    assert (figures.cover[:12, :12] == 0.5).all() and (figures.cover[12:, :12] == 0).all()
    figures = box_figures(crops, CropPlan.center(224))
    assert figures.ratios.tolist() == [1, 1] and figures.areas == pytest.approx([(0.875 * 100) ** 2 / 20000] * 2)


def test_measured_errors_are_those_on_record(shared_cache, teacher):
    """Errors that the teacher measures again are those that were recorded on the sample the quantiser was fitted on."""
    view = shared_cache.view(0)
    store = view.targets("fake")
    medians, worst = measured_errors(view, store, teacher, np.arange(24))
    for i, layer in enumerate(store.manifest.fidelity):
        assert np.median(medians[i]) == pytest.approx(layer.median, rel=0.1) and worst[i].max() <= layer.worst * 1.2
    assert "median, measured" in page_of(view, store, Options(), teacher, None, "now", lambda line: None)


# --- what verify said --------------------------------------------------------------------------------------------------


def test_the_output_of_verify_is_taken_for_its_own_cache(shared_cache, tmp_path):
    """`verify --json` of this cache is put on the page with its time; of another cache, or another file, it is refused."""
    verdict = tmp_path / "verify.json"
    verdict.write_text(CliRunner().invoke(main, ["verify", "--json", "--sample", "3", str(shared_cache.path)]).stdout)
    arguments = [shared_cache.path, "--teacher", "fake", "-o", tmp_path / "a.html", "--verified", verdict]
    assert run(*arguments)[0] == 0
    value, html = json.loads(verdict.read_text()), (tmp_path / "a.html").read_text()
    assert "Sound and complete." in html and value["when"][:10] in html and "3 rows of each store and view" in html
    for change, words in [
        ({"crops_id": "0" * 64}, "about other crops"), ({"findings": 3}, "is not the output of verify"),
        ({"not_made": {"view-000/crops.beton": "pip install <i>x</i>"}}, None), ({"not_made": 3}, "is not the output of verify"),
        ({"findings": [{"kind": "damaged", "path": "x", "message": "<b>broken"}]}, None),
    ]:  # fmt: skip
        verdict.write_text(json.dumps(value | change))
        code, said = run(*arguments)
        assert (code, said.count("Error")) == (0, 0) if words is None else code and words in said
        if "not_made" in change and words is None:
            html = (tmp_path / "a.html").read_text()
            assert "Nothing wrong was found." in html and "Not checked: view-000/crops.beton." in html and "&lt;i&gt;x" in html
            assert "Sound and complete." not in html
    assert "&lt;b&gt;broken" in (tmp_path / "a.html").read_text()
    verdict.write_text("[]")
    assert "is not the output of verify" in run(*arguments)[1]


def test_damage_is_on_the_page(cache, tmp_path):
    """--verify puts every finding on the page, by its path in the cache."""
    stray = cache.path / "view-000" / "stray.txt"
    stray.write_text("x")
    assert run(cache.path, "--teacher", "fake", "-o", tmp_path / "a.html", "--verify", "--sample", 2)[0] == 0
    html = (tmp_path / "a.html").read_text()
    assert "1 finding." in html and "view-000/stray.txt" in html and str(tmp_path) not in html


def test_a_page_that_was_not_verified_says_so(shared_cache, tmp_path):
    """Without --verify and --verified the page says that it is no verdict."""
    assert run(shared_cache.path, "--teacher", "fake", "-o", tmp_path / "a.html")[0] == 0
    assert "Not verified." in (tmp_path / "a.html").read_text()


# --- the page ----------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """What a screen reader is told."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_is_one_file_that_loads_nothing(page):
    """No address on the page leads out of it, and it has less than 5 MB."""
    html = page.read_text()
    found = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]{1,20})""", html)
    assert found and all(address.startswith(("#", "data:")) for address in found)
    assert "default-src 'none'" in html and page.stat().st_size < 5 << 20


def test_a_page_can_be_heard(page):
    """One h1, headings in order, landmarks, captions, and words for every picture, chart and point of the map."""
    outline = Outline(page.read_text())
    headings = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1 and max(np.diff(headings)) <= 1
    assert len(outline.all("main")) == len(outline.all("nav")) == 1
    assert len(outline.all("table")) == len(outline.all("caption")) >= 4
    assert all(picture["alt"] for picture in outline.all("img")) and len(outline.all("img")) > 40
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in outline.all("svg"))
    points = [attributes for _, attributes in outline.tags if "data-label" in attributes]
    assert len(points) == 24 and all(point["aria-label"].startswith("row ") for point in points)
    assert [point["tabindex"] for point in points].count("0") == 1
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"] for link in outline.all("a")}
    assert targets <= {f"#{name}" for name in ids}


def test_names_cannot_write_on_the_page(tmp_path, teacher):
    """Names of classes and images are text on the page, whatever is in them."""
    images = write_images(tmp_path / "images", n_classes=1)
    (images / "class-0").rename(images / "<img src=x onerror=alert(1)>")
    cache = crop_folder(tmp_path / "cache", images)
    extract_view(cache.view(0), "fake", teacher, ExtractPlan(shard_rows=8, batch_size=8))
    assert run(cache.path, "-o", tmp_path / "a.html")[0] == 0
    html = (tmp_path / "a.html").read_text()
    assert "&lt;img src=x" in html and "<img src=x" not in html


def test_a_store_without_attention_and_without_scales(shared_cache, tmp_path):
    """Of a float16 store of a teacher without CLS the page leaves out attention and says why there are no worst rows."""
    cache = Cache(shutil.copytree(shared_cache.path, tmp_path / "cache"))
    extract_view(cache.view(0), "plain", FakeTeacher(has_cls=False), ExtractPlan(shard_rows=24, dtype="float16", batch_size=5))
    assert run(cache.path, "--teacher", "plain", "-o", tmp_path / "a.html")[0] == 0
    html = (tmp_path / "a.html").read_text()
    assert 'id="attention"' not in html and "float16 keeps every value" in html and "mean patch tokens" in html
    gathered = gather(StoreReader(cache.view(0).store_path("plain")), np.arange(24))
    assert gathered.attention is None and gathered.expected_errors is None and gathered.features.shape == (24, 24)


def test_a_store_of_visible_int4_tokens(shared_cache, tmp_path):
    """Of a store that keeps some patches in 4 bits the page is made of those, also with errors measured by the teacher.

    Here one with a pooling head and without final norm, which the page says.
    """
    cache, teacher = Cache(shutil.copytree(shared_cache.path, tmp_path / "cache")), FakeTeacher(0, False, True, False)
    extract_view(cache.view(0), "seen", teacher, ExtractPlan(shard_rows=8, batch_size=5, visible=6, dtype="int4"))
    view = cache.view(0)
    html = page_of(view, view.targets("seen"), Options(), teacher, None, "now", lambda line: None)
    assert "6 of 16 patches of each crop" in html and "median, measured" in html and "int4" in html
    assert "Attention of the pooling head. On average " in html and "CLS attention" not in html


def test_an_unfinished_store_is_looked_at_as_far_as_it_is(shared_cache, teacher, tmp_path):
    """The page of a store that is being made has its finished rows and says how many there are; without any it is refused."""
    cache = Cache(shutil.copytree(shared_cache.path, tmp_path / "cache"))
    extract_view(cache.view(0), "part", teacher, ExtractPlan(shard_rows=5, batch_size=5), range(1, 3))
    assert run(cache.path, "--teacher", "part", "-o", tmp_path / "a.html")[0] == 0
    html = (tmp_path / "a.html").read_text()
    assert "CLS attention of the last block. On average" in html
    assert 'aria-label="2 of 5 shards"' in html and "10 of 24" in html and "Figures are of 10 crops" in html
    for commit in (cache.view(0).store_path("part") / "commits").iterdir():
        commit.unlink()
    code, said = run(cache.path, "--teacher", "part", "-o", tmp_path / "b.html")
    assert code == 1 and "no finished shard yet" in said


def test_the_same_cache_gives_the_same_page(shared_cache):
    """But for the time, the page is a function of the cache and the options."""
    view = shared_cache.view(0)
    pages = {page_of(view, view.targets("fake"), Options(seed=seed), None, None, "now", lambda line: None) for seed in (0, 0, 1)}
    assert len(pages) == 2


BAD = {
    "--verify --verified x.json": "give one of them",
    "--sample 3": "give both",
    "--verified x.json": "there is no such file",
    "-o page.pdf": "ends in .html",
    "-o no/page.html": "mkdir -p no",
    "--view 5": r"it has \[0, 1\]",
    "--teacher clip": "fake, fake-zstd, fake16",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_requests_say_what_would_be_right(arguments, shared_cache, tmp_path, monkeypatch):
    """A request that cannot be met ends with a sentence that says what could be, and no file."""
    monkeypatch.chdir(tmp_path)
    teacher = [] if "--teacher" in arguments else ["--teacher", "fake"]
    code, said = run(shared_cache.path, *teacher, *arguments.split())
    assert code in (1, 2) and re.search(BAD[arguments], said), said
    assert list(tmp_path.iterdir()) == []


# --- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, page):
    """A function that opens the page in a window; afterwards nothing may have complained on the console."""
    complaints = []

    def open_(width: int = 1280, scheme: str = "light"):
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.as_uri())
        return tab

    yield open_
    assert complaints == []


@pytest.mark.slow
def test_a_point_shows_its_crop(opened):
    """Pointing at a point shows its crop and name, at its own place of the sprite; leaving the map hides it."""
    tab = opened()
    places = set()
    for index in (0, 7, 23):
        point = tab.locator("[data-label]").nth(index)
        point.hover(force=True)
        assert tab.locator(".detail").is_visible()
        assert tab.locator(".map .shown").get_attribute("aria-label") == tab.locator(".detail p").inner_text()
        places.add(tab.locator(".thumb").evaluate("thumb => thumb.style.backgroundPosition"))
    assert len(places) == 3
    tab.locator("h1").hover()
    assert not tab.locator(".detail").is_visible()


@pytest.mark.slow
def test_the_map_works_by_keyboard(opened):
    """One tab stop, arrows to the next point on that side, Escape to put the picture away; a picked class dims the others."""
    tab = opened()
    tab.locator(".map [tabindex='0']").focus()
    labels = set()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp") * 3:
        tab.keyboard.press(key)
        labels.add(tab.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert tab.locator(".map [tabindex='0']").count() == 1 and tab.locator(".detail").is_visible()
    assert len(labels) > 2
    tab.keyboard.press("Escape")
    assert not tab.locator(".detail").is_visible()
    tab.locator("#class").select_option("1")
    assert tab.locator(".map .faint").count() == 16 and tab.locator(".map [data-label='1'].faint").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_both_themes(opened, scheme):
    """At 360 pixels nothing scrolls sideways but tables in their frames, and the colours are the theme's."""
    tab = opened(width=360, scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    background, ink = tab.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    levels = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, ink)]
    assert levels[0] > 600 > levels[1] if scheme == "light" else levels[0] < 150 < levels[1]
    bar = tab.locator("svg.chart path[style*='--accent']").first
    assert bar.evaluate("bar => getComputedStyle(bar).fill + getComputedStyle(bar).stroke").count("rgb") >= 1


@pytest.mark.parametrize("n_rows", [1, 4, 10, 23])
def test_small_caches_give_small_samples(cache, n_rows):
    """Of a cache with fewer rows than a block, any number of rows can be asked for."""
    rows = draw_blocks(cache.view(0).targets("fake"), n_rows, 0)
    assert len(rows) == n_rows == len(set(rows.tolist())) and rows.max() < 24


@pytest.mark.parametrize("value", [3.3333, 11.111])
def test_a_constant_channel_is_no_outlier(value):
    """A channel that never moves changes no norm: what is left of it by rounding is not divided by nothing."""
    statistics = LayerStatistics(64, seed=0)
    tokens = np.random.default_rng(0).standard_normal((8, 50, 64)).astype("float32")
    tokens[..., 5] = value
    statistics.add(tokens)
    assert statistics.figures(1).norm_median == pytest.approx(1, abs=0.05)


def test_nothing_but_a_file_is_replaced(cache, tmp_path):
    """-o that names a device or a pipe is refused: as root it would be replaced for the whole machine."""
    os.mkfifo(tmp_path / "pipe.html")
    result = CliRunner().invoke(main, ["report", str(cache.path), "-o", str(tmp_path / "pipe.html")])
    assert result.exit_code == 2 and "is no plain file" in result.output
    assert stat.S_ISFIFO((tmp_path / "pipe.html").stat().st_mode)
