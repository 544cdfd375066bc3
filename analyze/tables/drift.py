"""What a comparison of runs comes to: drift by layer, likelihoods, and each run as a whole."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from retrace.analyze.tables.saved import SavedTables, Table

TENSORS = ("query", "key", "value", "output")
Place = tuple[str, int, int]
"""A run, a layer and a sequence."""


@dataclass(frozen=True)
class Drift(SavedTables):
    """What runs with a method in the loop come to beside the exact run."""

    NONE = "holds no comparison"
    TABLES = (
        Table(
            "layers",
            "drift.parquet",
            ("run", "layer", "module", "head", "tensor", "metric", "mean", "std", "count"),
        ),
        Table(
            "likelihoods",
            "likelihoods.parquet",
            ("run", "sequence", "position", "exact", "approximate", "difference", "kl"),
        ),
        Table(
            "runs",
            "runs.parquet",
            (
                "run",
                "method",
                "topk",
                "code",
                "perplexity",
                "exact_perplexity",
                "difference",
                "low",
                "high",
                "kl",
            ),
        ),
    )
    FACTS = "facts", "drift.json"
    TEXT = "runs.csv"

    layers: pd.DataFrame
    """Tidy: one row per (run, layer, module, head, tensor, metric) with mean, std and count over
    positions, from where the method begins. `error` is ||x' - x|| / ||x||, `cosine` that of the
    angle between x' and x; heads of keys and values are kv heads, and `output` is what the layer
    gave before its projection."""
    likelihoods: pd.DataFrame
    """One row per (run, sequence, position), from where the method begins: `exact` and
    `approximate` negative log-likelihood of the next token, in nats, `difference`, and `kl`, the
    divergence of the next token's distribution from the exact model's."""
    runs: pd.DataFrame
    """One row per run: method, topk, `code` (whether that of the method is as it was captured:
    same, changed or unknown), perplexity, exact_perplexity, the mean `difference` of the
    likelihoods in nats with a 95 % interval over sequences (`low`, `high`; NaN with one
    sequence), and the mean `kl`."""
    facts: dict[str, Any] = field(default_factory=lambda: {"missing": []})
    """`missing`: run, layer and sequence of what `layers` lacks, with what ended the worker."""

    @property
    def missing(self) -> dict[Place, str]:
        """What ended the workers of those that `layers` lacks."""
        return {(run, layer, sequence): why for run, layer, sequence, why in self.facts["missing"]}

    def text(self) -> str:
        """The runs, as comma-separated values."""
        text: str = self.runs.to_csv(index=False)
        return text

    @classmethod
    def checked_facts(cls, facts: Any) -> dict[str, Any]:
        """The facts, if they name what is missing."""
        missing = super().checked_facts(facts).get("missing")
        if not isinstance(missing, list) or not all(_is_missing(entry) for entry in missing):
            raise ValueError(f"its {cls.FACTS[1]} has nothing missing as retrace writes it")
        return dict(facts)

    def table(self) -> pd.DataFrame:
        """Per run and layer: the mean over heads of each tensor's error."""
        rows = self.layers[self.layers["metric"] == "error"]
        keys = ["run", "layer", "module"]
        means = rows.groupby([*keys, "tensor"], sort=False)["mean"].mean().unstack("tensor")
        return means[list(TENSORS)].reset_index()


def _is_missing(entry: Any) -> bool:
    kinds = (str, int, int, str)
    return (
        isinstance(entry, list) and len(entry) == len(kinds) and all(map(isinstance, entry, kinds))
    )
