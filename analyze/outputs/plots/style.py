"""What all pictures share: colours, panels, legends, and how long names are broken."""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from retrace.analyze.replay.counting import Counting, number_of
from retrace.analyze.tables.figures import Figures
from retrace.traces import RetraceError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7")
"""Of Okabe and Ito, which the colour-blind can tell apart; black is exact attention's. Dark and
light ones take turns: the first three differ in grey too."""
DASHES = ("-", "--", ":", "-.")
"""Another for each method, so lines can be told apart where colours cannot."""
SEQUENTIAL = "viridis"
"""The colours of shares: light ones are large, in grey too."""
DIVERGING = "cividis"
"""The colours of differences. Of two hues that are equally dark, grey would hide the sign."""
LEAST_SPAN = 1e-3
"""Least range of a vertical axis: tables show four decimals."""
MOST_TICKS = 6
"""Of a logarithmic axis."""
MARKERS = ("o", "s", "^", "D", "v", "P")


Onto = Sequence[Axes] | None
"""The caller's panels that a picture is drawn onto; a figure of its own if None."""
Picture = Callable[[Onto], Figure]
"""What draws one picture."""


class Style(NamedTuple):
    """How a method's line looks."""

    colour: str
    dashes: str
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """As arguments of `Axes.plot`."""
        return {"color": self.colour, "linestyle": self.dashes, "marker": self.marker}


EXACT_STYLE = Style("black", "-", "o")


def styles_of(methods: Iterable[str]) -> dict[str, Style]:
    """The same for a method in every figure of the same results."""
    approximate = [method for method in methods if method != "exact"]
    styles = {
        method: Style(
            COLOURS[i % len(COLOURS)],
            # One on after twelve methods, where colours and dashes would come again together.
            DASHES[(i + i // math.lcm(len(COLOURS), len(DASHES))) % len(DASHES)],
            # Another marker when all pairs of a colour and a dash are used up.
            MARKERS[(i + i // (len(COLOURS) * len(DASHES))) % len(MARKERS)],
        )
        for i, method in enumerate(approximate)
    }
    return {"exact": EXACT_STYLE, **styles}


@dataclass(frozen=True)
class Sheet:
    """What a picture is drawn on: a figure of its own, or panels of a figure of the caller's, which
    keeps its own title and legend."""

    figure: Figure
    panels: list[Axes]
    own: bool

    @classmethod
    def of(
        cls,
        size: tuple[float, float],
        rows: int,
        columns: int,
        onto: Onto,
        *,
        count: int | None = None,
        **share: Any,
    ) -> "Sheet":
        """Panels row by row: new ones, or the caller's.

        Args:
            size: width and height of a new figure, in inches.
            rows: of panels.
            columns: of panels.
            onto: the caller's panels; a new figure if None.
            count: how many panels are drawn on; all of the grid if None.
            share: which axes new panels share, as `Figure.subplots` has it.

        Raises:
            RetraceError: the caller's panels are too many or too few.
        """
        count = rows * columns if count is None else count
        if onto is not None:
            if len(onto) != count:
                raise RetraceError(
                    f"This plot has {count} panels, and axes are {len(onto)}: give an Axes for "
                    "each panel, or none for a figure of its own."
                )
            figure = onto[0].get_figure(root=True)
            assert figure is not None
            return cls(figure, list(onto), own=False)
        figure = Figure(figsize=size, layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
        for unused in panels[count:]:
            unused.set_axis_off()
        # Keep labels of neighbouring panels apart.
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)
        engine.set(w_pad=0.08, wspace=0.02)
        return cls(figure, panels[:count], own=True)

    def title(self, text: str) -> None:
        """A title over all panels."""
        if self.own:
            self.figure.suptitle(text, fontsize="medium")

    def label_outer(self, horizontal: str, vertical: str) -> None:
        """Label the left and the lowest panels of a grid, and all panels of a caller's; a figure's
        own labels would run into a legend below it."""
        for axes in self.panels:
            place = axes.get_subplotspec()
            if not self.own or (place is not None and place.is_first_col()):
                axes.set_ylabel(vertical)
            if not self.own or axes.xaxis.get_tick_params()["labelbottom"]:
                axes.set_xlabel(horizontal)

    def legend(self) -> None:
        """One legend for all panels, below them."""
        handles: dict[str, Any] = {}
        for axes in self.panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if not handles or not self.own:
            return
        width = self.figure.get_size_inches()[0]
        columns = max(1, min(len(handles), int(width // (0.7 + 0.085 * _longest_line(handles)))))
        rows = -(-len(handles) // columns)
        lines = max(label.count("\n") + 1 for label in handles)
        # Higher by what the legend takes, so that the panels keep their size.
        self.figure.set_figheight(self.figure.get_figheight() + 0.1 + 0.17 * rows * lines)
        self.figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            fontsize="small",
            frameon=False,
        )


def panel_grid(
    count: int,
    *,
    width: float,
    height: float,
    columns: int = 4,
    share_x: bool = True,
    onto: Onto = None,
) -> Sheet:
    """A figure of `count` panels that share their axes, or the vertical one only; or the caller's
    panels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(width * columns + 0.6, 5.0), height * rows + 1.0)
    sheet = Sheet.of(size, rows, columns, onto, count=count, sharex=share_x, sharey=True)
    if sheet.own:
        # The lowest panel of a column has the numbers, though the last row be short.
        for panel in sheet.panels[max(0, count - columns) :]:
            panel.tick_params(labelbottom=True)
    return sheet


def from_zero(panels: Iterable[Axes], top: float | None = None) -> None:
    """Vertical axes from 0, to where the data ends if no top is given."""
    for axes in panels:
        axes.set_ylim(bottom=0.0, top=top)


def plain_numbers(*panels: Axes) -> None:
    """Numbers on the vertical axes as they are, once all is drawn: with nothing to add or multiply
    by, and no range so narrow that rounding would be painted as if it were a difference."""
    for axes in panels:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        low, high = axes.get_ylim()
        if high - low < LEAST_SPAN:
            middle = (low + high) / 2
            bottom = max(0.0, middle - LEAST_SPAN / 2) if low >= 0 else middle - LEAST_SPAN / 2
            axes.set_ylim(bottom, bottom + LEAST_SPAN)


def logarithmic(axis: Axis) -> None:
    """Make an axis logarithmic, once all is drawn, with numbers on it however little it spans."""
    if axis is axis.axes.xaxis:
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    low, high = axis.get_view_interval()
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // MOST_TICKS)]))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.6g}"))
    axis.set_minor_locator(NullLocator())


def wrapped(method: str, width: int) -> str:
    """A method spec broken after its colons and commas."""
    parts = re.sub(r"([:,])", r"\1 ", method)
    lines = textwrap.wrap(parts, width, break_on_hyphens=False)
    return "\n".join(re.sub(r"([:,]) ", r"\1", line) for line in lines)


def counted_words(results: Figures) -> str:
    """How many queries the figures are over, and which."""
    counting, counts = Counting.recorded(results.run), results.queries()
    number = number_of(counts["least"].min(), counts["most"].max())
    each = "" if counting.alike else ", others for each k, so a curve may fall"
    return (
        f"over {number} queries of each head, {counting.words()}{each}; "
        f"protocol {counting.protocol}"
    )


def say_nothing_counts(axes: Axes) -> None:
    """In place of figures of no query."""
    axes.text(
        0.5, 0.5, "no query counts", transform=axes.transAxes, ha="center", va="center", color="0.4"
    )


def _longest_line(labels: Iterable[str]) -> int:
    return max(len(line) for label in labels for line in label.split("\n"))
