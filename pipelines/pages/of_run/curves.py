"""The curves of a run, thinned to what a page can show."""

from __future__ import annotations

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
    drawn.append(_lines(run, "rate", {"learning rate": run.steps["lr"]}, "Learning rate"))
    settled = {name: values[run.settled] for name, values in run.steps.items()}
    drawn.append(_lines(run, "speed", {"images/s": settled["images_per_s"]}, "Crops a second", settled["epoch"], floor=0.0))
    wait = {"waiting, %": 100 * settled["wait_share"]}
    drawn.append(_lines(run, "wait", wait, "Share of a step's time that it waited for data, %", settled["epoch"], floor=0.0))
    return drawn


def _lines(run: RunFacts, name: str, lines: dict[str, np.ndarray], caption: str, epochs=None, floor=None) -> tuple[Markup, str]:
    epochs = thinned(run.steps["epoch"] if epochs is None else epochs)
    thin = {label: thinned(values) for label, values in lines.items()}

    def paint(axes) -> None:
        for (label, values), (colour, style) in zip(thin.items(), STYLES * (1 + len(thin) // len(STYLES)), strict=False):
            axes.plot(epochs, values, linestyle=style, color=COLOURS[colour], linewidth=1.4, label=label)
        axes.set_xlabel("epoch")
        if floor is not None:
            axes.set_ylim(bottom=floor)
        if len(thin) > 1:
            axes.legend(ncols=2 if len(thin) > 4 else 1)

    ends = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, values in thin.items() if len(values))
    return chart(name, f"{caption} by epoch: {ends}", paint, height=2.8), caption
