"""Plots as SVG that takes its colours from the page, so that they are dark where the page is. Drawn by matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from markupsafe import Markup

Numbers = np.ndarray[Any, Any]

HOW_TO_DRAW = "pip install 'vlm-batch[report]' has plots drawn."
_WIDTH_INCHES, _HEIGHT_INCHES = 4.6, 2.5
_MOST_BINS = 40
_MOST_DOTS, _CELLS = 300, 24
# Colours that stand in the SVG for those of the page, which change with its scheme.
_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--quiet)", "#030303": "var(--line)", "#040404": "var(--accent)"}
_INK, _QUIET, _LINE, _ACCENT = _COLOURS
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _QUIET,
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _QUIET,
    "ytick.labelcolor": _QUIET,
    "ytick.left": False,
    "axes.formatter.useoffset": False,
    "axes.xmargin": 0.01,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of numbers, and what it shows in words."""

    title: str
    svg: Markup
    caption: str


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def histogram(title: str, values: Numbers, unit: str, caption: str) -> Plot | None:
    """How often which number comes, whole numbers in bars of equal width; None where there is none."""
    if not len(values):
        return None
    with _Canvas(f"{title}: {caption}") as canvas:
        canvas.axes.hist(values, bins=bin_edges(values), color=_ACCENT, rwidth=0.9)
        canvas.label(unit, "records")
    return Plot(title, canvas.svg, caption)


def bin_edges(values: Numbers) -> Numbers:
    """Edges of at most 40 bars or so of equal width, between whole numbers; every value is in one."""
    least, most = int(values.min()), int(values.max())
    step = max(1, -(-(most - least + 1) // _MOST_BINS))
    return np.arange(least, most + step + 1, step) - 0.5


def scatter(title: str, across: Numbers, up: Numbers, units: tuple[str, str], caption: str) -> Plot | None:
    """Pairs of numbers as dots, as many at a place as the place is dark; None where there is none."""
    if not len(across):
        return None
    pairs = np.stack([across, up], axis=1)
    if len(np.unique(pairs, axis=0)) > _MOST_DOTS:  # each is an element of the page: near ones become one
        cell = np.maximum(1, pairs.max(axis=0) / _CELLS)
        pairs = (np.floor(pairs / cell) + 0.5) * cell
    pairs, numbers = np.unique(pairs, axis=0, return_counts=True)
    with _Canvas(f"{title}: {caption}") as canvas:
        sizes = 6 + 60 * numbers / numbers.max()
        canvas.axes.scatter(pairs[:, 0], pairs[:, 1], s=sizes, color=_ACCENT, alpha=0.45, linewidths=0)
        canvas.axes.set_xlim(left=0)
        canvas.axes.set_ylim(bottom=0)
        canvas.label(*units)
    return Plot(title, canvas.svg, caption)


def steps(
    title: str, edges: Numbers, values: Numbers, units: tuple[str, str], breaks: Sequence[float], caption: str
) -> Plot:
    """A number over time, constant between edges; breaks: where time was left out."""
    with _Canvas(f"{title}: {caption}") as canvas:
        canvas.axes.stairs(values, edges, fill=True, color=_ACCENT, alpha=0.25)
        canvas.axes.stairs(values, edges, color=_ACCENT)
        for place in breaks:
            canvas.axes.axvline(place, color=_QUIET, linestyle=":", linewidth=1)
        canvas.axes.set_ylim(bottom=0)
        canvas.label(*units)
    return Plot(title, canvas.svg, caption)


class _Canvas:
    """A figure while it is drawn; afterwards its SVG."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.svg = Markup("")

    def __enter__(self) -> _Canvas:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps every figure

        self._style = matplotlib.rc_context(_STYLE | {"svg.hashsalt": self._text})
        self._style.__enter__()
        self._figure = Figure((_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        self.axes: Any = self._figure.add_subplot()
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None:
                self.svg = self._drawn()
        finally:
            self._style.__exit__(*raised)

    def label(self, across: str, up: str) -> None:
        """Name the axes, and give them few marks, at round numbers."""
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        self.axes.set_xlabel(across)
        self.axes.set_title(up, loc="left", fontsize=9, color=_QUIET)  # above: no reading sideways
        for axis in (self.axes.xaxis, self.axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 9):,.6g}"))

    def _drawn(self) -> Markup:
        file = StringIO()
        self._figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' id="[a-z0-9]+_\d+"', "", text)  # figure_1: the same in every plot; what is referred to stays
        for stand_in, colour in _COLOURS.items():
            text = text.replace(stand_in, colour)
        label = Markup('<svg role="img" aria-label="{}"').format(self._text)
        return Markup(text.replace("<svg", label, 1))
