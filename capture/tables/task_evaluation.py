"""What methods in the loop cost a model in tasks, as tables."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from retrace.analyze.outputs.markdown import markdown_table
from retrace.analyze.tables.intervals import interval_of_mean
from retrace.analyze.tables.saved import Table
from retrace.capture.tables.points import SavedPoints

EXACT = "exact attention"
"""The model as it is, in the column of methods; its budget is 0."""
POINT = ["method", "topk"]
PLACE = ["task", "metric"]


@dataclass(frozen=True)
class TaskEvaluation(SavedPoints):
    """What a model scores in tasks, exactly and with methods in the loop."""

    NONE = "holds no scores"
    TABLES = (
        Table("scores", "scores.parquet", (*POINT, *PLACE, "value")),
        Table("documents", "documents.parquet", (*POINT, *PLACE, "document", "value")),
    )
    FACTS = "facts", "scores.json"
    TEXT = "scores.md"

    scores: pd.DataFrame
    """One row per (method, topk, task or group, metric): `value`, as lm-eval-harness states it."""
    documents: pd.DataFrame
    """The metrics that are a number for each document: one row per (method, topk, task, metric,
    document): `value`."""
    facts: dict[str, Any]
    """What must be equal for scores to stand in one table, and the versions that made them."""

    def has(self, method: str, topk: int) -> bool:
        """Whether there are scores of this method and budget."""
        return bool(((self.scores["method"] == method) & (self.scores["topk"] == topk)).any())

    def without(self, methods: Collection[str]) -> Self:
        """These scores less those of some methods."""
        scores, documents = (
            rows[~rows["method"].isin(list(methods))].reset_index(drop=True)
            for rows in (self.scores, self.documents)
        )
        return dataclasses.replace(self, scores=scores, documents=documents)

    def table(self) -> pd.DataFrame:
        """One row per (task, metric, method, topk): `exact` attention's score, `score`, their
        `difference`, its 95 % interval over `documents` (`low`, `high`) where the score is
        their mean, else NaN."""
        is_exact = self.scores["method"] == EXACT
        exact = self.scores[is_exact].drop(columns=POINT).rename(columns={"value": "exact"})
        table = self.scores[~is_exact].rename(columns={"value": "score"})
        table = table.merge(exact, on=PLACE, how="left")
        table["difference"] = table["score"] - table["exact"]
        by_point = self.documents.groupby([*POINT, *PLACE], sort=False)
        values = {point: rows.set_index("document")["value"] for point, rows in by_point}
        spans = [_span(values, row) for row in table.to_dict("records")]
        table[["low", "high", "documents"]] = pd.DataFrame(
            spans, columns=["low", "high", "documents"], index=table.index
        )
        columns = [*PLACE, *POINT, "exact", "score", "difference", "low", "high", "documents"]
        return table[columns].sort_values(PLACE, kind="stable", ignore_index=True)

    def markdown(self) -> str:
        """The table, in Markdown."""
        return markdown_table(self.table()) + "\n"

    def extended(self, method: str, topk: int, found: Mapping[str, Any]) -> Self:
        """With what lm-eval-harness found of a method."""
        point = {"method": method, "topk": topk}
        scores = [
            {**point, "task": task, "metric": metric, "value": float(value)}
            for task, metrics in found["results"].items()
            for metric, value in _scores(metrics)
        ]
        documents = [
            {**point, "task": task, "metric": metric, "document": document, "value": value}
            for task, samples in found["samples"].items()
            for document, metric, value in _document_scores(samples)
        ]
        # Of a run that ended while it saved there may be documents without scores.
        said = self.documents[
            (self.documents["method"] != method) | (self.documents["topk"] != topk)
        ]
        return dataclasses.replace(
            self, scores=_joined(self.scores, scores), documents=_joined(said, documents)
        )


def _joined(frame: pd.DataFrame, rows: list[dict[str, Any]]) -> pd.DataFrame:
    more = pd.DataFrame(rows, columns=frame.columns)
    return more if frame.empty else pd.concat([frame, more], ignore_index=True)


def _scores(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics in a task's results, which are named `metric,filter`."""
    for name, value in metrics.items():
        metric, _, chosen = name.partition(",")
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield _named(metric, chosen), float(value)


def _document_scores(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, float]]:
    """(document, metric, value) of those metrics that are a number for each document."""
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, bool | int | float | np.number):
                yield sample["doc_id"], _named(metric, sample["filter"]), float(value)


def _named(metric: str, chosen: str) -> str:
    """A metric, with the filter of answers that it was taken of unless that is none."""
    return metric if chosen == "none" else f"{metric} ({chosen})"


def _span(
    values: Mapping[Any, "pd.Series[float]"], row: Mapping[Any, Any]
) -> tuple[float, float, int]:
    """Interval of a row's difference, and over how many documents."""
    place = tuple(row[name] for name in PLACE)
    score = values.get((row["method"], row["topk"], *place))
    exact = values.get((EXACT, 0, *place))
    if score is None or exact is None:
        return float("nan"), float("nan"), 0
    if not np.isclose(score.mean(), row["score"], equal_nan=False):
        return float("nan"), float("nan"), len(score)  # a metric of all documents together
    differences = np.asarray(score - exact, np.float64)
    return *interval_of_mean(differences, np.ones(len(differences))), len(differences)
