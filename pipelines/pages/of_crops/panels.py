"""A figure of matplotlib that is made of square panels in lines; and how it becomes a file."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from teacher_cache.errors import UsageError
from teacher_cache.files.durable import write_whole

from ..palette import LIGHT

SIDE = 1.6
"""Of a panel, inches."""
PITCH = SIDE + 0.1
MARGIN = 0.25
DPI = 160
STYLE = {"font.size": 8.5, "text.color": LIGHT["ink"], "axes.titlesize": 8.5, "axes.titlelocation": "left", "axes.titlepad": 4,
         "axes.titlecolor": LIGHT["muted"], "axes.edgecolor": LIGHT["rule"], "svg.hashsalt": "show"}  # fmt: skip
NO_DATE = {".png": None, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""What keeps the time out of a file, by its ending: equal input gives equal bytes."""


def require_format(path: Path) -> None:
    """Raise UsageError unless the ending of `path` says one of the formats a picture can have."""
    if path.suffix.lower() not in NO_DATE:
        raise UsageError(f"-o {path}: a picture is {', '.join(NO_DATE)}. Give a name that ends in one of these.")


class Panels:
    """Lines of square panels below a head, on white. All places are in inches, from the left and the top."""

    def __init__(self, tops: list[float], n_columns: int, height: float, left: float = MARGIN):
        """tops: of the panels of each line. left: of the first column."""
        self.tops, self.left = tops, left
        self.width, self.height = left + n_columns * PITCH - (PITCH - SIDE) + MARGIN, height
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=(self.width, height))

    def words(self, left: float, top: float, text: str, **options) -> float:
        """Write a line; returns where it ends."""
        with matplotlib.rc_context(STYLE):
            written = self.figure.text(left / self.width, 1 - top / self.height, text, va="top", parse_math=False, **options)
            return written.get_window_extent().x1 / self.figure.dpi

    def heading(self, line: int, text: str, about: str) -> None:
        """Above the titles of a line of panels."""
        top = self.tops[line] - 0.44
        end = self.words(MARGIN, top, text, weight="bold", size=10)
        self.words(end + 0.12, top + 0.015, about, color=LIGHT["muted"])

    def panel(self, line: int, column: int, image, title: str = "", below: str = "", **options):
        """One panel with an image; returns its axes. options: of matplotlib's imshow."""
        left, bottom = self.left + column * PITCH, self.height - self.tops[line] - SIDE
        with matplotlib.rc_context(STYLE):
            axes = self.figure.add_axes((left / self.width, bottom / self.height, SIDE / self.width, SIDE / self.height))
            axes.imshow(image, interpolation="nearest", **options)
            axes.set(xticks=[], yticks=[])
            axes.set_title(title)
            axes.text(0, -0.035, below, transform=axes.transAxes, va="top", size=7.5, color=LIGHT["muted"], parse_math=False)
        return axes

    def write(self, path: Path) -> None:
        """Write the figure aside and rename it; the ending of `path` says the format."""
        buffer, ending = io.BytesIO(), path.suffix.lower()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format=ending[1:], dpi=DPI, facecolor="white", metadata=NO_DATE[ending])
        write_whole(path, buffer.getvalue())


def frame(axes, left: float, top: float, width: float, height: float, colour: str) -> None:
    """A rectangle in the pixels of a panel's image, seen on light and on dark."""
    for edge, line in (("white", 3.0), (colour, 1.4)):
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=edge, linewidth=line))
