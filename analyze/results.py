"""Results: every figure of a run, and how it is kept in a folder and shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pandas as pd

from retrace.analyze.outputs import markdown
from retrace.analyze.tables.columns import TABLES
from retrace.analyze.tables.figures import Figures
from retrace.analyze.tables.folder import load, save


class Results(Figures):
    """The figures of one trace under one protocol, for any number of methods and budgets."""

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw every plot into a folder; returns the files."""
        from retrace.analyze.outputs.plots.results import draw_all

        return draw_all(self, Path(folder))

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

    def markdown(self) -> str:
        """The summary and the table of every method and budget, as Markdown; layers with the 95 %
        intervals of their means over sequences, where there are several."""
        return markdown.markdown(self)

    def save(self, folder: str | Path) -> None:
        """Write a parquet file of each table, `run.json` and `table.md`, all of them or none: a
        process that is killed meanwhile leaves the results that were there before, or these."""
        tables = {name: getattr(self, name) for name in TABLES}
        save(Path(folder), tables, self.run, self.markdown())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a results folder back.

        Raises:
            RetraceError: it is none, its files do not belong together, or one was changed.
        """
        tables, run = load(Path(folder), TABLES, optional={"sequences", "positions"})
        return cls(run=run, **tables)
