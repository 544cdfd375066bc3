"""The tables of every figure with the run's facts, and what can be read off them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pandas as pd

from retrace.analyze.metrics.registry import AT_BLOCKS, AT_MARKED, COMPARED, MEDIAN, METRICS
from retrace.analyze.replay.clock import profile_table
from retrace.analyze.replay.counting import Counting, number_of
from retrace.analyze.tables.columns import (
    BUCKET,
    CACHE,
    KEYS,
    LOCALITY_COLUMNS,
    PATTERN_COLUMNS,
    POSITION_COLUMNS,
    PROJECTED_COLUMNS,
    SEQUENCE_COLUMNS,
    TAIL_COLUMNS,
)
from retrace.analyze.tables.equal_bytes import BYTES, figures_at
from retrace.analyze.tables.intervals import OVER, check_same_queries, differences, intervals
from retrace.analyze.units.costs import is_charged
from retrace.traces import RetraceError


def _no_sequences() -> pd.DataFrame:
    return pd.DataFrame(columns=list(SEQUENCE_COLUMNS)).astype(SEQUENCE_COLUMNS)


def _no_positions() -> pd.DataFrame:
    return pd.DataFrame(columns=list(POSITION_COLUMNS)).astype(POSITION_COLUMNS)


def _no_patterns() -> pd.DataFrame:
    return pd.DataFrame(columns=list(PATTERN_COLUMNS)).astype(PATTERN_COLUMNS)


def _no_locality() -> pd.DataFrame:
    return pd.DataFrame(columns=list(LOCALITY_COLUMNS)).astype(LOCALITY_COLUMNS)


def _no_tails() -> pd.DataFrame:
    return pd.DataFrame(columns=list(TAIL_COLUMNS)).astype(TAIL_COLUMNS)


def _no_projected() -> pd.DataFrame:
    return pd.DataFrame(columns=list(PROJECTED_COLUMNS)).astype(PROJECTED_COLUMNS)


@dataclass
class Figures:
    """The figures of one trace under one protocol, for any number of methods and budgets."""

    metrics: pd.DataFrame
    """One row per (method, layer, module, head, topk, metric): mean, std (over queries, ddof 0),
    count (queries), protocol and min_context."""
    curves: pd.DataFrame
    """The same columns at every budget on the way to the largest asked for."""
    run: dict[str, Any]
    """Trace, every method with all its parameters, settings, versions, timings."""
    sequences: pd.DataFrame = field(default_factory=_no_sequences)
    """One row per (method, layer, module, sequence, head, topk, metric) that some query counts
    for, at the budgets asked for: mean and count over queries."""
    positions: pd.DataFrame = field(default_factory=_no_positions)
    """One row per (method, layer, module, head, topk, metric of `BUCKETED`, axis, first) that some
    query counts for, at the budgets asked for: mean, std and count over the queries whose number on
    the axis (position or distance, as `AXES` says) is `first` or more and below twice that."""
    head_patterns: pd.DataFrame = field(default_factory=_no_patterns)
    """One row per (layer, module, head, pattern of `PATTERNS`) under `prefill:B`: mean and std of
    the share of attention mass that it holds, over `count` sequences, and whether it is the `best`
    of its head, as docs/prefill.md defines it."""
    locality: pd.DataFrame = field(default_factory=_no_locality)
    """One row per (method, layer, module, cache, head, topk, metric, at), where it was asked for:
    the mean over `count` queries of a figure of `retrace.analyze.metrics.locality.FIGURES`. The
    cache is of a `head`, or of the `group` of a kv head, which `head` then counts; `at` is the keys
    that it holds (hit_rate, misses, link_bytes), the queries of a working set, or 0."""

    tails: pd.DataFrame = field(default_factory=_no_tails)
    """One row per (method, layer, module, head, topk, metric of `TAILED`) that some query counts
    for, at the budgets asked for: 5th, 50th and 95th percentile over queries (`p5`, `p50`, `p95`,
    to the resolution that `retrace.analyze.metrics.tails` states), the figure of the worst query
    (`worst`), where that is (`worst_sequence`, `worst_position`), and count."""
    projected: pd.DataFrame = field(default_factory=_no_projected)
    """One row per (method, layer, module, topk), where it was asked for and the trace holds the
    layer's output projection W_o: mean, std and count over queries of
    ||W_o (o - o')|| / ||W_o o||, o being the outputs of all heads side by side."""

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

    def layers(self, method: str, topk: int) -> pd.DataFrame:
        """`table` of one method and budget, a row per layer, with a further column Median Error
        Norm: the mean over heads of their medians over queries. Earlier results have none."""
        table = self.table(method, topk).drop(columns=["Method", "Top-k"])
        medians = self.layer_medians().get((method, topk))
        return (
            table
            if medians is None
            else table.assign(**{"Median Error Norm": table["Layer"].map(medians)})
        )

    def layer_medians(self) -> dict[tuple[str, int], dict[str, float]]:
        """Mean over heads of median error norms, by method and budget, and by module."""
        rows = self.metrics[self.metrics["metric"] == MEDIAN]
        means = rows.groupby(["method", "topk", "module"])["mean"].mean().reset_index()
        found: dict[tuple[str, int], dict[str, float]] = {}
        for row in means.to_dict("records"):
            found.setdefault((row["method"], row["topk"]), {})[row["module"]] = row["mean"]
        return found

    def intervals(
        self,
        over: str = "layer",
        *,
        methods: Sequence[str] | None = None,
        topk: Sequence[int] | None = None,
        metrics: Sequence[str] = tuple(METRICS),
    ) -> pd.DataFrame:
        """Means with 95 % intervals over sequences; see `retrace.analyze.tables.intervals`.

        Args:
            over: `model`, `layer` or `head`: whether the mean is over all layers and heads, over
                each layer's heads, or of each head by itself.
            methods: those of these results; all if None.
            topk: budgets; all if None.
            metrics: names of metrics.

        Returns:
            Columns: method, topk, metric, what the mean is of (layer and module; head), mean, low,
            high, sequences (how many). With one sequence low and high are NaN.

        Raises:
            RetraceError: `over` is none of the three.
        """
        rows = self.sequences
        rows = rows[rows["metric"].isin(list(metrics))]
        rows = rows if methods is None else rows[rows["method"].isin(list(methods))]
        rows = rows if topk is None else rows[rows["topk"].isin(list(topk))]
        return intervals(rows, ["method", "topk", "metric"], _known_level(over))

    def difference(
        self,
        method: str,
        other: str,
        over: str = "model",
        *,
        metrics: Sequence[str] = COMPARED,
    ) -> pd.DataFrame:
        """Figures of one method less those of another at the same budgets, with 95 % intervals of
        the differences: both answered the same queries, and sequences are drawn in pairs.

        Returns:
            Columns: topk, metric, what the difference is of, mean (of `method` less `other`), low,
            high, sequences.

        Raises:
            RetraceError: a method or level that is not there, no budget that both have, or figures
                over other queries, as those of `candidate_recall` are where the methods do not keep
                the same keys anyway: choose other `metrics`.
        """
        sides = [self.sequences[self.sequences["method"] == name] for name in (method, other)]
        for name, rows in zip((method, other), sides, strict=True):
            if rows.empty:
                there = ", ".join(self.sequences["method"].unique()) or "none"
                raise RetraceError(f"{name} has no figures per sequence here; there are: {there}.")
        ours, theirs = (side[side["metric"].isin(list(metrics))] for side in sides)
        check_same_queries(ours, theirs, f"{method} and {other}")
        found = differences(ours, theirs, ["topk", "metric"], _known_level(over))
        if found.empty:
            raise RetraceError(f"{method} and {other} have no budget in common.")
        return found

    def at_bytes(
        self,
        shares: Sequence[float],
        *,
        methods: Sequence[str] | None = None,
        against: str | None = None,
        metrics: Sequence[str] = COMPARED,
    ) -> pd.DataFrame:
        """Figures where methods read the same share of full attention's bytes, with 95 % intervals
        over sequences: read off between a method's budgets as `retrace.analyze.tables.equal_bytes`
        says, never beyond them.

        Args:
            shares: of full attention's bytes, such as 0.125.
            methods: those of these results; all if None.
            against: a method whose figures at the same share are taken off those of the others.
                Both answered the same queries, and sequences are drawn in pairs.
            metrics: names of metrics.

        Returns:
            Columns: share, method, topk (the budget in between), metric, mean over layers and
            heads, low, high, sequences, least and most (the shares that the method reads at its
            budgets), charged (whether it says what its index costs). Where a share is outside of
            those of a method, or of the one it is held against, the figures are NaN.

        Raises:
            RetraceError: a method that is not there, or budgets that were judged on different
                queries; results of blocks of queries, which are compared by pairs.
        """
        if self.cost != BYTES:
            raise RetraceError(
                "Methods of blocks of queries are compared by the pairs that they compute, as "
                "error-by-pairs draws them: of a decoding protocol bytes can be read off."
            )
        names = list(self.sequences["method"].unique()) if methods is None else list(methods)
        table = figures_at(self.sequences, names, shares, against, metrics)
        charged = {name: is_charged(self.run, name) for name in names}
        return table.assign(charged=table["method"].map(charged))

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

    def names(self) -> list[str]:
        """The names of the methods measured, each once, whatever their parameters."""
        facts = self.run.get("methods", {})
        return list(dict.fromkeys(facts[m]["name"] for m in self.methods() if m in facts))

    def parameters(self, name: str) -> pd.DataFrame:
        """The parameters of the methods of a name, a row per method and a column per parameter.

        `results.metrics.merge(results.parameters("quest"), left_on="method", right_index=True)`
        has them beside the figures.

        Raises:
            RetraceError: no method of that name was measured.
        """
        if name not in self.names():
            there = ", ".join(self.names()) or "none"
            raise RetraceError(f"No method {name} was measured here; there are: {there}.")
        facts = self.run["methods"]
        rows = {
            method: facts[method]["parameters"]
            for method in self.methods()
            if method in facts and facts[method]["name"] == name
        }
        # Of objects, so that no number turns into another kind.
        table = pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)
        return table.rename_axis("method")

    def topk(self, method: str) -> list[int]:
        """The budgets at which a method was measured, ascending."""
        budgets = self.metrics.loc[self.metrics["method"] == method, "topk"].unique()
        return sorted(int(k) for k in budgets)

    @property
    def cost(self) -> str:
        """The metric of what a method takes, which its other figures are drawn over: bytes read,
        or the pairs computed where blocks of queries share their keys."""
        shared = Counting.recorded(self.run).protocol.block is not None
        known = bool((self.metrics["metric"] == "compute_ratio").any())
        return "compute_ratio" if shared and known else "bytes_ratio"

    def followed(self, method: str) -> set[int]:
        """The budgets of a method of which `locality` has figures."""
        rows = self.locality[self.locality["method"] == method]
        return {int(k) for k in rows["topk"].unique()}

    def with_projected(self, method: str) -> set[int]:
        """The budgets of a method of which `projected` has figures."""
        rows = self.projected[self.projected["method"] == method]
        return {int(k) for k in rows["topk"].unique()}

    def when(self, method: str, topk: int) -> str:
        """When a method was measured at a budget, as `2026-11-30T08:00:00Z`; empty if no run says
        so."""
        runs = [run for run in self.run["history"] if topk in run["methods"].get(method, ())]
        return str(runs[-1]["when"]) if runs else ""

    def incomplete(self, method: str) -> set[int]:
        """The budgets of a method whose figures lack some layers of sequences."""
        lacks = (entry["methods"].get(method, ()) for entry in self.run.get("missing", ()))
        return {k for budgets in lacks for k in budgets}

    def queries(self) -> pd.DataFrame:
        """How many queries the figures of a head are over: one row per (method, topk), `least` and
        `most` over layers and heads, which differ where layers of some sequences are missing.

        Of `candidate_recall` they are those for which something had to be found, of marked keys
        those that see some, and ratios of sums over pairs of queries and keys count these.
        """
        others = ["candidate_recall", *AT_BLOCKS, *AT_MARKED]
        rows = self.metrics[~self.metrics["metric"].isin(others)]
        counts = rows.groupby(["method", "topk"], sort=False)["count"]
        return pd.DataFrame({"least": counts.min(), "most": counts.max()})

    def numbers(self) -> dict[tuple[str, int], str]:
        """Those numbers as they are shown."""
        rows = self.queries().reset_index().to_dict("records")
        return {(r["method"], r["topk"]): number_of(r["least"], r["most"]) for r in rows}

    def queries_words(self) -> dict[tuple[str, int], str]:
        """How many queries the figures are over, which, and what share of the keys they attend
        under the budget, by method and budget."""
        counted = Counting.recorded(self.run).words()
        rows = self.metrics[self.metrics["metric"] == "density"]
        density = rows.groupby(["method", "topk"])["mean"].mean().to_dict()
        return {
            at: f"over {number} queries of each head, {counted}"
            + (f", which attend {density[at]:.1%} of the keys they see" if at in density else "")
            for at, number in self.numbers().items()
        }

    def merged(self, newer: "Figures") -> Self:
        """These figures with newer ones added; where both have one, the newer counts."""

        def join(old: pd.DataFrame, new: pd.DataFrame, *more: str) -> pd.DataFrame:
            both = pd.concat([old, new], ignore_index=True)
            return both.drop_duplicates([*KEYS, *more], keep="last", ignore_index=True)

        methods = {**self.run["methods"], **newer.run["methods"]}
        run = {**self.run, **newer.run, "methods": methods}
        run["outdated"] = [m for m in self.run.get("outdated", ()) if m not in newer.run["methods"]]
        run["missing"] = [*self._still_missing(newer), *newer.run["missing"]]
        run["history"] = [*self.run["history"], *newer.run["history"]]
        return type(self)(
            join(self.metrics, newer.metrics),
            join(self.curves, newer.curves),
            run,
            join(self.sequences, newer.sequences, "sequence"),
            join(self.positions, newer.positions, *BUCKET).astype(POSITION_COLUMNS),
            newer.head_patterns if len(newer.head_patterns) else self.head_patterns,
            join(self._not_measured_again(self.locality, newer), newer.locality, *CACHE).astype(
                LOCALITY_COLUMNS
            ),
            join(self.tails, newer.tails).astype(TAIL_COLUMNS),
            pd.concat(
                [self._not_measured_again(self.projected, newer), newer.projected],
                ignore_index=True,
            ).astype(PROJECTED_COLUMNS),
        )

    @staticmethod
    def _not_measured_again(table: pd.DataFrame, newer: "Figures") -> pd.DataFrame:
        """What newer figures, which may lack such a table, do not replace of it."""
        replaced = set(zip(newer.metrics["method"], newer.metrics["topk"], strict=True))
        ours = zip(table["method"], table["topk"], strict=True)
        return table[[at not in replaced for at in ours]]

    def _still_missing(self, newer: "Figures") -> list[dict[str, Any]]:
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

    def without(self, methods: Collection[str]) -> Self:
        """These results less some methods."""
        run = dict(self.run)
        run["methods"] = {m: v for m, v in self.run["methods"].items() if m not in methods}
        return type(self)(
            self.metrics[~self.metrics["method"].isin(methods)],
            self.curves[~self.curves["method"].isin(methods)],
            run,
            self.sequences[~self.sequences["method"].isin(methods)],
            self.positions[~self.positions["method"].isin(methods)],
            self.head_patterns,
            self.locality[~self.locality["method"].isin(methods)],
            self.tails[~self.tails["method"].isin(methods)],
            self.projected[~self.projected["method"].isin(methods)],
        )


def _known_level(over: str) -> str:
    if over not in OVER:
        raise RetraceError(f"There are no means over {over!r}: choose {', '.join(OVER)}.")
    return over
