"""What methods in the loop cost a model in likelihood, as a table."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd

from retrace.analyze.outputs.markdown import markdown_table
from retrace.analyze.tables.saved import Table
from retrace.capture.tables.points import SavedPoints


@dataclass(frozen=True)
class Evaluation(SavedPoints):
    """What methods in the loop come to, point by point."""

    NONE = "holds no evaluation"
    TABLES = (Table("points", "evaluation.parquet", ()),)
    FACTS = "facts", "evaluation.json"
    TEXT = "evaluation.md"

    points: pd.DataFrame
    """One row per (method, topk), over the tokens that the method predicts: perplexity,
    exact_perplexity, the mean `difference` of the negative log-likelihoods in nats with a 95 %
    interval over sequences (`low`, `high`; NaN with one sequence), the mean `kl` of next tokens
    from the exact model, and replay's figures; `charged` is whether the bytes are all that the
    method reads."""
    facts: dict[str, Any]
    """What must be equal for points to stand in one table, and the version that made them."""

    def has(self, method: str, topk: int) -> bool:
        """Whether there is a point of this method and budget."""
        points = self.points
        return bool(((points["method"] == method) & (points["topk"] == topk)).any())

    def without(self, methods: Collection[str]) -> Self:
        """These points less those of some methods."""
        points = self.points[~self.points["method"].isin(list(methods))]
        return dataclasses.replace(self, points=points.reset_index(drop=True))

    def markdown(self) -> str:
        """The table, in Markdown."""
        return markdown_table(self.points) + "\n"
