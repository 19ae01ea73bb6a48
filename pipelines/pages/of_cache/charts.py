"""The charts of a cache's page; each says in words what it shows."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator, PercentFormatter

from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.spec import LayerFidelity

from ..inline_svg import COLOURS, chart
from .boxes import BoxFigures
from .layers import AttentionFigures, LayerFigures

INK, MUTED, ACCENT, SECOND = (COLOURS[name] for name in ("ink", "muted", "accent", "second"))
SMALL = {"width": 4.6, "height": 2.7}
AXES_POINTS, LINE_POINTS = 140, 11  # height of such axes and of a line of text, points


def _lines(axes, layers: list[int], series: dict[str, list[float]]) -> None:
    """A line a series over the layers, named at its end, where no legend has to be looked up."""
    points = AXES_POINTS / max(max(values) for values in series.values())
    free_above = 0.0  # series are given from the lowest to the highest: names that would overlap move up
    for (name, values), colour, marker in zip(series.items(), (ACCENT, SECOND, MUTED), "os^", strict=False):
        axes.plot(layers, values, color=colour, marker=marker, markersize=4.5, linewidth=1.5)
        height = max(values[-1] * points, free_above)
        free_above = height + LINE_POINTS
        offset = 7, height - values[-1] * points
        axes.annotate(name, (layers[-1], values[-1]), offset, textcoords="offset points", va="center", color=colour, fontsize=9)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlim(layers[0] - 0.4, layers[-1] + 0.4)
    axes.set_ylim(bottom=0)


def fidelity_chart(fidelity: tuple[LayerFidelity, ...], measured: tuple[float, ...] | None) -> Markup:
    """measured: the median of each layer on a sample, if the teacher was run again."""
    layers = [layer.layer for layer in fidelity]
    series = {"median": [f.median for f in fidelity], "p99": [f.p99 for f in fidelity], "worst": [f.worst for f in fidelity]}

    def paint(axes):
        _lines(axes, layers, series)
        if measured is not None:
            axes.plot(layers, measured, "x", color=INK, markersize=6)
            axes.annotate("measured now", (layers[0], measured[0]), (0, -13), textcoords="offset points", ha="center", fontsize=9)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))

    words = "; ".join(f"layer {f.layer}: {f.median:.2%} median, {f.p99:.2%} p99, {f.worst:.2%} worst" for f in fidelity)
    return chart("fidelity", f"Recorded error of a token by layer. {words}.", paint, **SMALL)


def norm_chart(layers: tuple[LayerFigures, ...]) -> Markup:
    series = {
        "median": [f.norm_median for f in layers],
        "p99": [f.norm_p99 for f in layers],
        "worst": [f.norm_worst for f in layers],
    }
    words = "; ".join(f"layer {f.layer}: {f.norm_median:.2f} median, {f.norm_worst:.1f} worst" for f in layers)
    numbers = [f.layer for f in layers]
    return chart("norms", f"Norms of standardised tokens by layer. {words}.", lambda axes: _lines(axes, numbers, series), **SMALL)


def _bars(name: str, label: str, numbers: list[int], values: list[float], most: float | None = None) -> Markup:
    def paint(axes):
        bars = axes.bar([str(number) for number in numbers], values, color=ACCENT, width=0.6)
        axes.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=9, color=MUTED)
        axes.set_xlabel("layer")
        axes.set_ylim(0, most)
        axes.margins(y=0.15)

    return chart(name, label, paint, **SMALL)


def rank_chart(layers: tuple[LayerFigures, ...]) -> Markup:
    words = "; ".join(f"layer {f.layer}: {f.effective_rank:.3g}" for f in layers)
    numbers, ranks = [f.layer for f in layers], [f.effective_rank for f in layers]
    return _bars("rank", f"Effective rank of patch tokens by layer. {words}.", numbers, ranks)


def likeness_chart(layers: tuple[LayerFigures, ...]) -> Markup:
    words = "; ".join(f"layer {f.layer}: {f.likeness:.2f}" for f in layers)
    return _bars("likeness", f"Mean cosine of two patches of one crop by layer. {words}.", [f.layer for f in layers],
                 [f.likeness for f in layers])  # fmt: skip


def _histogram(name: str, label: str, values: np.ndarray, x: str, bins, marks: tuple[float, ...] = (), percent=False) -> Markup:
    """marks: vertical lines, such as the bounds of a plan."""

    def paint(axes):
        axes.hist(values, bins=bins, weights=np.full(len(values), 1 / len(values)), color=ACCENT)
        for mark in marks:
            axes.axvline(mark, color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel(x)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    low, middle, high = np.percentile(values, [5, 50, 95])
    return chart(name, f"{label}: median {middle:.2f}, nine of ten between {low:.2f} and {high:.2f}.", paint, **SMALL)


def _map(name: str, label: str, values: np.ndarray, low: float | None = None, high: float | None = None) -> Markup:
    def paint(axes):
        drawn = axes.imshow(values, cmap="viridis", vmin=low, vmax=high)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.9, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
        bar.ax.grid(False)

    return chart(name, f"{label}: from {values.min():.1%} to {values.max():.1%}.", paint, **SMALL)


def attention_charts(attention: AttentionFigures, grid: tuple[int, int]) -> list[tuple[Markup, str]]:
    """(chart, caption)."""
    entropies = _histogram(
        "entropy", "Entropy of attention over crops", attention.entropies, "entropy over log N", np.linspace(0, 1, 41)
    )
    where = _map("attention-map", "Mean share of attention by place", attention.mean_map.reshape(grid))
    return [(entropies, "Entropy of each crop's attention: at 0 one patch has all, at 1 all have the same."),
            (where, "Mean share of each patch: where the teacher looks, whatever it sees.")]  # fmt: skip


def box_charts(boxes: BoxFigures, plan: CropPlan) -> list[tuple[Markup, str]]:
    """(chart, caption)."""
    is_random = plan.kind == "random"
    areas = _histogram("areas", "Share of the original that a crop shows", boxes.areas, "share of the original's area",
                       np.linspace(0, 1, 41), plan.scale if is_random else (), percent=True)  # fmt: skip
    ratios = _histogram(
        "ratios", "Width over height of the box", boxes.ratios, "width / height", 40, plan.ratio if is_random else ()
    )
    magnified = _histogram("magnified", "Pixels of the crop to one of the original", boxes.magnification,
                           "pixels of the crop to one of the original, a side", 40, (1.0,))  # fmt: skip
    cover = _map("cover", "Share of crops that show a part of their original", boxes.cover, 0, 1)
    bounds = " Dashed: the bounds of the plan." * is_random
    return [(areas, f"How much of its original a crop shows.{bounds}"), (ratios, f"Shape of the box.{bounds}"),
            (magnified, "Right of the dashed line crops are enlarged: their originals have fewer pixels than the teacher sees."),
            (cover, "How often each part of the originals is seen.")]  # fmt: skip
