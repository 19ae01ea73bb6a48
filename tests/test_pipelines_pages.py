"""Pages: one template, one palette, charts that follow the reader's theme."""

from __future__ import annotations

import re

import jinja2
import pytest

from pipelines.pages.inline_svg import COLOURS, chart
from pipelines.pages.page import percent, render, require_writable, write_page
from pipelines.pages.palette import CLASSES_DARK, CLASSES_LIGHT, DARK, LIGHT
from teacher_cache.errors import UsageError


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, 0..1 (WCAG 2)."""
    levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme, classes", [(LIGHT, CLASSES_LIGHT), (DARK, CLASSES_DARK)], ids=["light", "dark"])
def test_colours_can_be_read(theme, classes):
    """Text has a contrast of 4.5 on both backgrounds, points of a class one of 3."""
    for background in (theme["paper"], theme["raised"]):
        for name in ("ink", "muted", "accent", "second", "good", "warn", "bad"):
            assert contrast(theme[name], background) >= 4.5, name
    for colour in classes:
        assert contrast(colour, theme["paper"]) >= 3, colour


def test_a_chart_takes_its_colours_from_the_page():
    """A chart has no colour, font or size of its own, and says in words what it shows."""
    drawn = chart("bars", 'heights of "bars"', lambda axes: axes.bar([1, 2], [3, 4], color=COLOURS["accent"]))
    assert "var(--accent)" in drawn and "var(--muted)" in drawn
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", re.sub(r'(href="|url\()#\w+', "", drawn))
    assert "font-family" not in drawn and 'aria-label="heights of &#34;bars&#34;"' in drawn


def test_charts_of_one_page_share_no_id():
    """Every id of a page names one thing, however many charts it has; the same chart is the same text again."""
    paint = lambda axes: axes.plot([0, 1], [0, 1])  # noqa: E731
    first, second = chart("first", "a", paint), chart("second", "b", paint)
    ids = [re.findall(r' id="([^"]+)"', drawn) for drawn in (first, second)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    assert chart("first", "a", paint) == first


def test_a_missing_value_is_no_empty_page():
    """A template that is not given a value of its raises, where a blank would be read as nothing to tell."""
    with pytest.raises(jinja2.UndefinedError):
        render("base.html")


@pytest.mark.parametrize(
    "share, words", [(0, "0 %"), (0.00058, "0.058 %"), (0.25, "25 %"), (0.9999, "99.9 %"), (1, "100 %"), (0.992, "99.2 %")]
)
def test_a_share_never_rounds_to_all_or_nothing(share, words):
    """Only what is all is called 100 %, only what is none 0 %."""
    assert percent(share) == words


def test_where_a_page_cannot_be_is_said_before_the_work(tmp_path):
    """A folder, a place in a folder that is not there and a place in the cache are refused with what to do."""
    (tmp_path / "cache").mkdir()
    for path, words in [
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "a.html", "mkdir -p"),
        (tmp_path / "cache/a.html", "verify"),
    ]:
        with pytest.raises(UsageError, match=words):
            require_writable(path, outside_of=tmp_path / "cache")
    require_writable(tmp_path / "a.html", outside_of=tmp_path / "cache")
    assert write_page(tmp_path / "a.html", "é") == 2
