"""matplotlib figures as inline SVG that takes its colours from the page, so that they change with the reader's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from .palette import LIGHT

COLOURS = {name: f"#0000{number:02x}" for number, name in enumerate(LIGHT, start=1)}
"""What is drawn with in the place of each colour of the palette: `chart` turns these codes into the page's variables."""

STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": COLOURS["ink"],
    "axes.facecolor": "none", "figure.facecolor": "none", "axes.edgecolor": COLOURS["rule"], "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"], "axes.titlesize": 10, "axes.titlelocation": "left", "axes.labelsize": 9,
    "xtick.color": COLOURS["rule"], "ytick.color": COLOURS["rule"], "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"], "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


def chart(name: str, label: str, paint: Callable[..., None], width=6.4, height=3.2, columns=1, **options) -> Markup:
    """What `paint(*axes)` draws with COLOURS on one row of axes, as an `<svg>` element of the page.

    name: unlike that of any other chart of the page, because ids are made from it. label: what the chart shows, in words, for
    those who do not see it. width, height: inches; the page scales them. options: of matplotlib's `Figure.subplots`.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(*figure.subplots(1, columns, squeeze=False, **options)[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_the_page(buffer.getvalue(), label)


def _for_the_page(text: str, label: str) -> Markup:
    """matplotlib's SVG file as a part of a page: its colours, font and size are the page's, its ids unlike others'."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    # ids that nothing uses (axes_1 ...) would be there again in the next chart
    used = {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for name in pair}
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] * (found[1] in used), text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r" ?font-family: [^;]*;", "", text)
    for colour, code in COLOURS.items():
        text = text.replace(code, f"var(--{colour})")
    return Markup(text.replace("<svg", f'<svg class="chart" role="img" aria-label="{escape(label)}"', 1))
