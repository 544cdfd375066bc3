"""A recommendation: a target, a method and a budget for every kv head, and the file of both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pandas as pd

from retrace.analyze.metrics.registry import BY_NAME, TARGETS
from retrace.analyze.storage.untrusted import read_facts
from retrace.analyze.units.costs import with_charge
from retrace.traces import RetraceError
from retrace.traces.errors import did_you_mean
from retrace.traces.storage.durable import written_whole

FORMAT = 1
"""Of the JSON file; it goes up when a reader of the earlier one would misread it."""
AT_MOST = {name: BY_NAME[name].better < 0 for name in TARGETS}
"""What can be asked for, and whether the target is the most or the least that will do."""
GROUP = ["layer", "kv_head"]
SETTING = ["method", "topk"]


@dataclass(frozen=True)
class Target:
    """A bound on a metric. `bytes_ratio` asks for the least error norm within it, the others for
    the fewest bytes."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `attention_fraction=0.95`.

        Raises:
            RetraceError: an unknown metric, or a value out of range.
        """
        metric, _, number = (part.strip() for part in text.partition("="))
        if metric not in AT_MOST:
            raise RetraceError(
                f"There is no target {metric!r}.{did_you_mean(metric, AT_MOST)} Targets: "
                f"{', '.join(AT_MOST)}, as in attention_fraction=0.95."
            )
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not (0 < value if metric == "error_norm" else 0 < value <= 1):
            kind = "above 0" if metric == "error_norm" else "above 0 and at most 1"
            raise RetraceError(f"The target {text!r} needs a number {kind}, as in {metric}=0.1.")
        return cls(metric, value)

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return AT_MOST[self.metric]

    def met(self, figures: Any) -> Any:
        """Whether figures meet it, one by one."""
        return figures <= self.value if self.at_most else figures >= self.value

    def loss(self, figures: Any) -> Any:
        """Figures as losses, of which 0 is the best, one by one; and losses as figures."""
        return figures if self.at_most else 1 - figures

    def __str__(self) -> str:
        return f"{self.metric} at {'most' if self.at_most else 'least'} {self.value:g}"


@dataclass(frozen=True)
class Recommendation:
    """A method and a budget for every kv head, and what they come to on sequences that did not
    choose them."""

    facts: dict[str, Any]
    """Of the whole: see `docs/recommend.md`."""
    kv_heads: pd.DataFrame
    """One row per (layer, module, kv_head): method, topk (0 for full attention), chosen (whether
    it meets the target), and bytes_ratio; where budgets are fractions of the context, `fraction`
    (NaN for full attention)."""
    heads: pd.DataFrame
    """One row per (layer, kv_head, head): class, the mass on each class's keys (sink, local,
    retrieval), and `<half>_<figure>` for the halves choose and verify; `bound` is what had to meet
    the target."""

    @property
    def target(self) -> Target:
        """What was asked for."""
        return Target(**self.facts["target"])

    def in_fractions(self, context: int) -> Self:
        """The same, with budgets as fractions of a context of so many positions."""
        known = self.kv_heads["topk"].where(self.kv_heads["topk"] > 0)
        kv_heads = self.kv_heads.assign(fraction=known / context)
        return replace(self, facts={**self.facts, "context": context}, kv_heads=kv_heads)

    def to_json(self) -> dict[str, Any]:
        """All of it, as the file has it."""
        layers: list[dict[str, Any]] = []
        heads = {at: rows for at, rows in self.heads.groupby(GROUP)}
        for (_, module), rows in self.kv_heads.groupby(["layer", "module"], sort=False):
            groups = [
                {
                    **{name: row[name] for name in ("kv_head", *SETTING)},
                    **(
                        {}
                        if pd.isna(row.get("fraction", float("nan")))
                        else {"fraction": row["fraction"]}
                    ),
                    **{name: row[name] for name in ("chosen", "bytes_ratio")},
                    "heads": heads[row["layer"], row["kv_head"]]
                    .drop(columns=GROUP)
                    .to_dict("records"),
                }
                for row in rows.to_dict("records")
            ]
            layers.append(
                {"layer": int(rows["layer"].iloc[0]), "module": module, "kv_heads": groups}
            )
        return {**self.facts, "layers": layers}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Raises:
            RetraceError: it is of another format.
        """
        if content.get("retrace_recommendation") != FORMAT:
            raise RetraceError(
                f"This is no recommendation of format {FORMAT} "
                f"(but {content.get('retrace_recommendation')}): `retrace recommend` makes them."
            )
        facts = {name: value for name, value in content.items() if name != "layers"}
        groups, heads = [], []
        for layer in content["layers"]:
            for group in layer["kv_heads"]:
                own = {"layer": layer["layer"], "kv_head": group["kv_head"]}
                groups.append(
                    {"layer": layer["layer"], "module": layer["module"]}
                    | {name: value for name, value in group.items() if name != "heads"}
                )
                heads += [own | head for head in group["heads"]]
        return cls(facts, pd.DataFrame(groups), pd.DataFrame(heads))

    def save(self, file: str | Path) -> None:
        """Write the JSON file, whole."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as opened:
            opened.write((json.dumps(self.to_json(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a file back.

        Raises:
            RetraceError: it is none, or of another format.
        """
        try:
            content = read_facts(Path(file))
        except (OSError, ValueError, RecursionError) as error:
            raise RetraceError(f"{file} is not a recommendation ({error}).") from error
        try:
            return cls.from_json(content)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, RetraceError):
                raise
            raise RetraceError(f"{file} is not a recommendation ({error!r}).") from error

    def table(self) -> pd.DataFrame:
        """One row per kv head: layer, kv head, the classes of its heads, method and budget, bytes
        ratio, and of its worst head the target's metric on both halves, with whether the verify
        half meets the target."""
        target = self.target
        metric, worst = target.metric, "max" if target.at_most else "min"
        heads = self.heads.groupby(GROUP)
        found = self.kv_heads.set_index(GROUP)
        verify = heads[f"verify_{metric}"].agg(worst)
        table = pd.DataFrame(
            {
                "Classes": heads["class"].agg(", ".join),
                "Method": [
                    with_charge(self.facts, m, f"{m}, {k}" if k else m)
                    for m, k in found[SETTING].itertuples(index=False)
                ],
                "Bytes Ratio": found["bytes_ratio"],
                "Bound": heads["bound"].agg(worst),
                "Choose": heads[f"choose_{metric}"].agg(worst),
                "Verify": verify,
                "Met": ["yes" if met else "no" for met in target.met(verify)],
            },
            index=found.index,
        )
        table.insert(0, "Layer", found["module"])
        table.insert(1, "KV Head", [str(kv_head) for _, kv_head in found.index])
        return table.reset_index(drop=True)
