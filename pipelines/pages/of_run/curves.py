"""The curves of a run, thinned to what a page can show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ..inline_svg import COLOURS, chart
from .run_facts import RunFacts

MOST_POINTS = 400
"""Of a curve; more steps are averaged in bins of equal size."""
STYLES = [(colour, style) for style in ("-", "--", ":") for colour in ("accent", "second", "good", "bad", "warn", "muted")]
"""Colour and stroke of each line of a chart, so that they differ without colour, too."""


def thinned(values: np.ndarray) -> np.ndarray:
    """[n] -> [at most MOST_POINTS]: means of neighbouring values, NaN left out."""
    if len(values) <= MOST_POINTS:
        return values
    edges = np.linspace(0, len(values), MOST_POINTS + 1).astype(int)
    known = np.isfinite(values)
    sums, counts = (np.add.reduceat(array, edges[:-1]) for array in (np.where(known, values, 0.0), known.astype(float)))
    return np.divide(sums, counts, out=np.full(MOST_POINTS, np.nan), where=counts > 0)


def curves(run: RunFacts) -> list[tuple[Markup, str]]:
    """(chart, caption) of everything that the run logged."""
    losses = {name: values for name, values in run.parts.items() if "/" not in name}
    details = {name: values for name, values in run.parts.items() if "/" in name}
    drawn = [_lines(run, "loss", {"loss": run.steps["loss"]}, "The loss that is minimised")]
    if len(losses) > 1:
        drawn.append(_lines(run, "parts", losses, "Losses by objective, without their weights"))
    if details:
        drawn.append(_lines(run, "details", details, "What the objectives say beside their loss"))
    drawn += probe_charts(run)
    drawn.append(_lines(run, "rate", {"learning rate": run.steps["lr"]}, "Learning rate"))
    drawn.append(_lines(run, "speed", {"images/s": run.steps["images_per_s"]}, "Crops a second", run.settled, floor=0.0))
    wait = {"waiting, %": 100 * run.steps["wait_share"]}
    drawn.append(_lines(run, "wait", wait, "Share of a step's time that it waited for data, %", run.settled, floor=0.0))
    return drawn


def probe_charts(run: RunFacts) -> list[tuple[Markup, str]]:
    """(chart, caption) of what probes found: one chart for each protocol and set of images, a line for each token."""
    charts = []
    for number, reports in enumerate(by_protocol(run.probes).values()):
        first = reports[0]["probe"]
        of_main = first["main"].rpartition("/")[2]
        names = [name for name in first["values"] if name.rpartition("/")[2] == of_main]
        lines = [(name, *probe_line(reports, name)) for name in names]
        charts.append(line_chart(f"probe-{number}", lines, probe_caption(first), marker="o"))
    return charts


def by_protocol(probes: Sequence[dict]) -> dict[tuple, list[dict]]:
    """Reports of probes by what must be the same for them to be compared: protocol, size and images; each list in its order."""
    groups: dict[tuple, list[dict]] = {}
    for report in probes:
        probe = report["probe"]
        prints = (probe[side]["fingerprint"] for side in ("train", "val"))
        groups.setdefault((probe["protocol"], probe["main"], probe.get("image_size"), *prints), []).append(report)
    return groups


def probe_line(reports: Sequence[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, the value `name` in %) of reports of one protocol; NaN where one lacks it."""
    epochs = np.array([report["epoch"] for report in reports], "float64")
    return epochs, np.array([100 * report["probe"]["values"].get(name, np.nan) for report in reports], "float64")


def probe_caption(probe: dict) -> str:
    main = probe["main"].rpartition("/")[2]
    train, val = (f"{probe[side].get('images', 0):,}" for side in ("train", "val"))
    return f"Probe: {probe['name']} with {main} neighbours, % of {val} images right by the votes of {train}"


def curve(run: RunFacts, values: np.ndarray, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values), thinned, of what each step of `run` says, or of a part of the steps."""
    return thinned(run.steps["epoch"][part]), thinned(values[part])


def _lines(
    run: RunFacts, name: str, lines: dict[str, np.ndarray], caption: str, part: slice = slice(None), floor: float | None = None
) -> tuple[Markup, str]:
    return line_chart(name, [(label, *curve(run, values, part)) for label, values in lines.items()], caption, floor)


def line_chart(
    name: str, lines: Sequence[tuple[str, np.ndarray, np.ndarray]], caption: str, floor: float | None = None, marker: str = "",
    styles: Sequence[int] | None = None,
) -> tuple[Markup, str]:  # fmt: skip
    """A chart of lines by epoch, and its caption.

    lines: (label, epochs, values).  floor: lowest value that is drawn.  styles: of each line its number in STYLES; without
    them in order, and again behind the last.
    """

    def paint(axes) -> None:
        for number, (label, epochs, values) in enumerate(lines):
            colour, style = STYLES[(styles[number] if styles else number) % len(STYLES)]
            line = {"color": COLOURS[colour], "linestyle": style, "linewidth": 1.4, "marker": marker, "markersize": 3}
            axes.plot(epochs, values, label=label, **line)
        axes.set_xlabel("epoch")
        if floor is not None:
            axes.set_ylim(bottom=floor)
        if len(lines) > 1:
            axes.legend(ncols=2 if len(lines) > 4 else 1)

    ends = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, _, values in lines if len(values))
    return chart(name, f"{caption} by epoch: {ends}", paint, height=2.8), caption
