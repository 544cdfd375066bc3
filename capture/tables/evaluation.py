"""What methods in the loop cost a model in likelihood, as a table."""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd

from retrace.analyze.outputs.markdown import markdown_table
from retrace.analyze.storage.untrusted import read_whole
from retrace.traces import RetraceError
from retrace.traces.storage.durable import make_folder, written_whole

FILES = ("evaluation.parquet", "evaluation.md", "evaluation.json")


@dataclass(frozen=True)
class Evaluation:
    """What methods in the loop come to, point by point."""

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

    def save(self, folder: Path) -> None:
        """Write `evaluation.parquet`, `evaluation.md` and `evaluation.json`, each whole."""
        facts = json.dumps(self.facts, indent=2) + "\n"
        contents = self.points.to_parquet(index=False), self.markdown().encode(), facts.encode()
        make_folder(folder)
        for name, content in zip(FILES, contents, strict=True):
            with written_whole(folder / name) as file:
                file.write(content)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder back.

        Raises:
            RetraceError: it holds no evaluation.
        """
        try:
            facts, (points,) = read_whole(folder, FILES[2], FILES[:1])
            if not {"method", "topk"} <= set(points):
                raise ValueError(f"{FILES[0]} names no methods and budgets")
        except (OSError, ValueError, RecursionError) as error:
            cause = " ".join(str(error).split())
            raise RetraceError(f"{folder} holds no evaluation of retrace ({cause}).") from error
        return cls(points, facts)
