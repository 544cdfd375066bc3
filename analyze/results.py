"""Results: tidy tables of every figure, the run's facts, and how they are kept in a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd

from retrace.analyze.profile import profile_table
from retrace.traces import RetraceError

KEYS = ["method", "layer", "module", "head", "topk", "metric"]
COLUMNS = [*KEYS, "mean", "std", "count", "protocol", "min_context"]

PLOTS = (
    "attention-fraction-*.png",
    "recall-by-layer.png",
    "error-norm-by-layer.png",
    "error-by-bytes.png",
)
"""Names of the pictures that are drawn of results."""

METRICS: dict[str, str] = {
    "recall": "share of the exact top k keys that the method returned among its k best",
    "candidate_recall": "the same, over the keys that did not have to be kept anyway",
    "error_norm": "||o - o'|| / ||o||: relative error of the attention output",
    "attention_fraction": "attention mass on the keys attended",
    "exact_attention_fraction": "attention mass on the exact top k keys",
    "density": "keys attended over keys visible",
    "bytes_ratio": "bytes read over those of full attention",
}
"""What is measured, by name."""


@dataclass
class Results:
    """The figures of one trace under one protocol, for any number of methods and budgets."""

    metrics: pd.DataFrame
    """One row per (method, layer, module, head, topk, metric): mean, std (over queries, ddof 0),
    count (queries), protocol and min_context."""
    curves: pd.DataFrame
    """The same columns at every budget on the way to the largest asked for."""
    run: dict[str, Any]
    """Trace, every method with all its parameters, settings, versions, timings."""

    def table(self, method: str | None = None, topk: int | None = None) -> pd.DataFrame:
        """Per layer: mean and standard deviation (ddof 0) across heads of recall and error norm.

        Columns: Method, Top-k, Layer, Mean Recall, Std Recall, Mean Error Norm, Std Error Norm;
        one row per layer, named by its module path, for each method and budget or those given.
        """
        rows = self.metrics
        if method is not None:
            rows = rows[rows["method"] == method]
        if topk is not None:
            rows = rows[rows["topk"] == topk]
        columns: dict[str, pd.Series[Any]] = {}
        keys = ["method", "topk", "layer", "module"]
        for metric, title in (("recall", "Recall"), ("error_norm", "Error Norm")):
            heads = rows[rows["metric"] == metric].groupby(keys, sort=False)["mean"]
            columns[f"Mean {title}"] = heads.mean()
            columns[f"Std {title}"] = heads.std(ddof=0)
        table = pd.DataFrame(columns).reset_index()
        table = table.rename(columns={"method": "Method", "topk": "Top-k", "module": "Layer"})
        return table[["Method", "Top-k", "Layer", *columns]]

    def profile(self) -> pd.DataFrame:
        """Where the time of the newest run of these results went: see `profile_table`.

        Raises:
            RetraceError: it ran on a GPU without `profile`, so that nobody knows.
        """
        run = self.run["history"][-1]
        if not run.get("profile", {}).get("synchronised"):
            raise RetraceError(
                f"Where the time of the run of {run['when']} went is not known: it takes --profile."
            )
        return profile_table(run["profile"])

    def methods(self) -> list[str]:
        """The methods measured, in the order in which they were first asked for."""
        return list(self.metrics["method"].unique())

    def topk(self, method: str) -> list[int]:
        """The budgets at which a method was measured, ascending."""
        budgets = self.metrics.loc[self.metrics["method"] == method, "topk"].unique()
        return sorted(int(k) for k in budgets)

    def incomplete(self, method: str) -> set[int]:
        """The budgets of a method whose figures lack some layers of sequences."""
        lacks = (entry["methods"].get(method, ()) for entry in self.run.get("missing", ()))
        return {k for budgets in lacks for k in budgets}

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw every plot into a folder; returns the files."""
        from retrace.analyze.plots import draw_all

        return draw_all(self, Path(folder))

    def markdown(self) -> str:
        """The table of every method and budget, as Markdown."""
        parts = []
        for method in self.methods():
            for k in self.topk(method):
                table = self.table(method, k).drop(columns=["Method", "Top-k"])
                parts.append(f"### {method}, top-k {k}\n\n{markdown_table(table)}\n")
        return "\n".join(parts)

    def save(self, folder: str | Path) -> None:
        """Write `metrics.parquet`, `curves.parquet`, `run.json` and `table.md`, each whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in (("metrics", self.metrics), ("curves", self.curves)):
            aside = folder / f".{name}.partial"
            frame.to_parquet(aside, index=False)
            aside.replace(folder / f"{name}.parquet")
        # run.json says what the tables hold, so that it comes last.
        for name, text in (
            ("table.md", self.markdown()),
            ("run.json", json.dumps(self.run, indent=2) + "\n"),
        ):
            aside = folder / f".{name}.partial"
            aside.write_text(text, encoding="utf-8")
            aside.replace(folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a results folder back.

        Raises:
            RetraceError: it is none, or its files do not belong together.
        """
        folder = Path(folder)
        try:
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            metrics = pd.read_parquet(folder / "metrics.parquet")
            curves = pd.read_parquet(folder / "curves.parquet")
        except (OSError, ValueError) as error:
            raise RetraceError(
                f"{folder} is not a results folder of retrace ({error}). Choose another with "
                "--out, or replace it with --overwrite."
            ) from error
        return cls(metrics, curves, run)

    def merged(self, newer: "Results") -> "Results":
        """These results with newer ones added; where both have a figure, the newer one counts."""

        def join(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
            both = pd.concat([old, new], ignore_index=True)
            return both.drop_duplicates(KEYS, keep="last", ignore_index=True)

        methods = {**self.run["methods"], **newer.run["methods"]}
        run = {**self.run, **newer.run, "methods": methods}
        run["missing"] = [*self._still_missing(newer), *newer.run["missing"]]
        run["history"] = [*self.run["history"], *newer.run["history"]]
        return Results(join(self.metrics, newer.metrics), join(self.curves, newer.curves), run)

    def _still_missing(self, newer: "Results") -> list[dict[str, Any]]:
        """What is missing of these results after newer ones were added."""
        entries = []
        for entry in self.run.get("missing", ()):
            methods = {
                method: left
                for method, budgets in entry["methods"].items()
                if (left := [k for k in budgets if k not in newer.topk(method)])
            }
            if methods:
                entries.append({**entry, "methods": methods})
        return entries

    def without(self, methods: set[str]) -> "Results":
        """These results less some methods."""
        run = dict(self.run)
        run["methods"] = {m: v for m, v in self.run["methods"].items() if m not in methods}
        return Results(
            self.metrics[~self.metrics["method"].isin(methods)],
            self.curves[~self.curves["method"].isin(methods)],
            run,
        )


def markdown_table(table: pd.DataFrame) -> str:
    """A pipe table; figures with four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
