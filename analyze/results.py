"""Results: every figure of a run, and how it is kept in a folder and shown."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from retrace.analyze.outputs import markdown
from retrace.analyze.outputs.equal_bytes import equal_bytes_summary
from retrace.analyze.outputs.locality import locality_summary
from retrace.analyze.outputs.projected import projected_summary
from retrace.analyze.tables.columns import COLUMNS_OF
from retrace.analyze.tables.figures import Figures
from retrace.analyze.tables.saved import SavedTables, Table
from retrace.analyze.tables.validation import checked_facts, checked_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Results(Figures, SavedTables):
    """The figures of one trace under one protocol, for any number of methods and budgets."""

    NONE = "is not a results folder"
    TABLES = tuple(
        Table(name, f"{name}.parquet", columns, name in ("metrics", "curves"))
        for name, columns in COLUMNS_OF.items()
    )
    FACTS = "run", "run.json"
    TEXT = "table.md"

    def plot(self, name: str, axes: "Axes | Iterable[Axes] | None" = None) -> "Figure":
        """Draw one plot.

        Args:
            name: `attention-fraction-curves`, `recall-by-layer`, `error-by-bytes` or another of the
                names, less their format, that `draw` gives files.
            axes: one of Matplotlib's Axes for each panel, row by row, as `plt.subplots` returns
                them. Titles over all panels and legends are then left to you.

        Returns:
            The Matplotlib figure; that of `axes` if they are given.

        Raises:
            RetraceError: these results have no such plot, or it has another number of panels.
        """
        from matplotlib.axes import Axes

        from retrace.analyze.outputs.plots.results import draw_one

        panels: Any = [axes] if isinstance(axes, Axes) else axes
        if hasattr(panels, "flat"):  # the array of a grid
            panels = panels.flat
        return draw_one(self, name, None if panels is None else list(panels))

    def draw(self, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
        """Draw every plot into a folder, in each of the formats: png, svg, pdf.

        The same figures give the same bytes. Files that the folder holds of these plots in other
        formats are removed, since they may be of earlier figures.

        Returns:
            The files.

        Raises:
            RetraceError: another format.
        """
        from retrace.analyze.outputs.plots.results import draw_all

        return draw_all(self, Path(folder), formats)

    def to_xarray(self) -> Any:
        """An xarray Dataset with dimensions spec, layer, head, topk and k, and each layer's
        module as a coordinate.

        Variables are named after the metrics: `recall` (spec, layer, head, topk) is the mean,
        with `recall_std` and `recall_count`; `recall_curve` (spec, layer, head, k) and its like
        are at every budget on the way. NaN where nothing was measured. Attributes are the run's
        facts, as text.

        Raises:
            RetraceError: xarray is not installed.
        """
        from retrace.analyze.outputs.labelled import to_xarray

        return to_xarray(self)

    def summary(
        self, methods: Sequence[str] | None = None, topk: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """Means over layers and heads, a line for each method and budget (all if None), in words:
        figures, of which some have their 95 % interval over sequences in brackets."""
        return markdown.summary(self, methods, topk)

    def summary_title(self) -> str:
        """What a summary shows, and what its brackets are."""
        return markdown.summary_title(self)

    def locality_summary(
        self, methods: Sequence[str] | None = None, topk: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """How keys move from query to query, in words: means over layers and groups, a line for
        each method and budget (all if None) of which `locality` has figures."""
        return locality_summary(self.locality, methods, topk)

    def projected_summary(
        self, methods: Sequence[str] | None = None, topk: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """Errors after the output projection, in words: means over layers, a line for each method
        and budget (all if None) of which `projected` has figures."""
        return projected_summary(self.projected, methods, topk)

    def equal_bytes_summary(
        self, share: float, methods: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """`at_bytes` of one share in words: a line for each method (all if None) that reads this
        share at some budget, those that keep most attention mass first, each held against the
        first by its paired interval."""
        return equal_bytes_summary(self, share, methods)

    def markdown(self) -> str:
        """The summary and the table of every method and budget, as Markdown; layers with the 95 %
        intervals of their means over sequences, where there are several."""
        return markdown.markdown(self)

    def text(self) -> str:
        """The same."""
        return self.markdown()

    def __repr__(self) -> str:
        place, protocol = (self.run.get(name) for name in ("trace_path", "protocol"))
        topk = sorted({k for method in self.methods() for k in self.topk(method)})
        return f"Results({place!r}, methods={self.methods()}, topk={topk}, protocol={protocol!r})"

    def _repr_html_(self) -> str:
        """The summary, where a notebook shows it."""
        table: str = self.summary().to_html(index=False)
        return f"<p>{html.escape(self.summary_title())}</p>{table}"

    @classmethod
    def checked_table(cls, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """A table, if its columns hold figures that can be."""
        return checked_table(table, name)

    @classmethod
    def checked_facts(cls, facts: Any) -> dict[str, Any]:
        """A run's facts, if they have the form that others rely on."""
        return checked_facts(super().checked_facts(facts))
