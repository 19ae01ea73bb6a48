"""The plot of a study: accuracy against bytes an image, a line for each code, a point for each number of views."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from teacher_cache.files.durable import write_whole

from .cells import CODES, CURVE, Cell
from .tables import Found, bytes_an_image, curve

COLOURS = ("#1b1f24", "#0b6e4f", "#2f6fb0", "#c1440e", "#8a5fb5", "#b08a00", "#8a99a8")
LINES = {
    "new crops, live": (Cell(CURVE, source="fresh"), "-"),
    "teacher": (Cell("teacher"), "--"),
    "random": (Cell("random"), ":"),
}


def draw(records: dict[str, dict], path: Path) -> bool:
    """Write the plot to `path`, a PNG or SVG; False, and nothing is written, where no point of the curve is on record."""
    found = Found(records)
    cells = curve(found)
    if not cells:
        return False
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (title, measure) in zip(figure.subplots(1, 2), {"kNN": "knn", "linear": "linear"}.items(), strict=True):
        for code, colour in zip(CODES, COLOURS, strict=True):
            points = [(bytes_an_image(found, cell), values, views) for (of, views), cell in cells.items()
                      if of == code and (values := found.values(cell, measure))]  # fmt: skip
            if points:
                sizes, values, views = zip(*points, strict=True)
                means, spread = [100 * v.mean for v in values], [100 * (v.deviation or 0) for v in values]
                axes.errorbar(sizes, means, yerr=spread, color=colour, marker="o", ms=4, lw=1.2, capsize=2, label=code)
                for size, mean, n in zip(sizes, means, views, strict=True):
                    axes.annotate(str(n), (size, mean), xytext=(3, 4), textcoords="offset points", fontsize=7, color=colour)
        for name, (cell, style) in LINES.items():
            if values := found.values(cell, measure):
                axes.axhline(100 * values.mean, color="#777777", ls=style, lw=0.9, label=name)
        axes.set(xscale="log", xlabel="bytes an image, crops and targets of all views", title=f"{title} accuracy, %")
        axes.grid(axis="y", lw=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=130)
    write_whole(path, drawn.getvalue())
    return True
