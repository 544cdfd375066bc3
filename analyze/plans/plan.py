"""A plan: which method and budget each kv head of a model has, and the file of it."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd

from retrace.analyze.plans.schema import mistake
from retrace.analyze.storage.untrusted import read_facts
from retrace.traces import LayerRules, RetraceError
from retrace.traces.storage.durable import written_whole

FORMAT = 1
"""Of the file that `Plan.save` writes; it goes up when a reader of the earlier one would misread
it."""
PLAN = "plan:"
"""Begins what stands for a plan in place of a method's spec: its file follows."""
FULL = "dense"
"""The method of kv heads that keep full attention."""
At = tuple[int, int]
"""A layer and a kv head of it."""


@dataclass(frozen=True)
class Setting:
    """The method and budget of one kv head: so many keys, or a fraction of the context."""

    method: str
    """Its spec; `dense` is full attention, which has no budget."""
    topk: int = 0
    fraction: float | None = None

    @property
    def full(self) -> bool:
        """Whether it is full attention."""
        return self.method == FULL

    def budget(self, context: int) -> int:
        """Keys per query and head, where so many positions are the context: those before the first
        query that is answered, or the whole sequence where all are."""
        if self.fraction is None:
            return self.topk
        # Rounded first: 0.29 of 100 keys are 29, though the product is a little more.
        return max(1, math.ceil(round(self.fraction * context, 6)))

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        budget = {"topk": self.topk} if self.fraction is None else {"fraction": self.fraction}
        return {"method": self.method, **budget}

    def __str__(self) -> str:
        if self.full:
            return self.method
        return f"{self.method}, {self.topk if self.fraction is None else f'{self.fraction:g}'}"


@dataclass(frozen=True)
class PlannedLayer:
    """What a plan knows of a layer."""

    module: str
    kv_heads: tuple[Setting, ...]
    """In their order."""
    group: int | None = None
    """Query heads of each kv head; None where the file does not say."""


@dataclass(frozen=True)
class Plan:
    """A method and a budget for every kv head of some layers.

    Methods take one: `analyze(trace, ["exact", Plan.load("plan.json")], [64])`. On the command line
    it is `--plan FILE`, and in the place of a method's spec `plan:FILE`.
    """

    layers: Mapping[int, PlannedLayer]
    """By index."""
    model: Any = field(default=None, compare=False)
    """What the trace says of the model that it was chosen for."""

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read what `retrace recommend --out` or `save` wrote.

        Raises:
            RetraceError: there is no such file, or it is no plan; one line says what is wrong.
        """
        try:
            content = read_facts(Path(file))
        except FileNotFoundError as error:
            raise RetraceError(
                f"There is no plan {file}: `retrace recommend --out FILE` writes one."
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise RetraceError(f"{file} is no plan: {error}.") from error
        try:
            return cls.from_json(content)
        except RetraceError as error:
            raise RetraceError(f"{file} is no plan: {error}") from error

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Read what `to_json` or a recommendation's gave.

        Raises:
            RetraceError: it does not keep to the schema, or names a kv head twice or not at all.
        """
        if (wrong := mistake(content)) is not None:
            raise RetraceError(f"{wrong} (the schema is retrace/analyze/plans/plan.schema.json).")
        layers: dict[int, PlannedLayer] = {}
        for layer in content["layers"]:
            index, entries = layer["layer"], layer["kv_heads"]
            if index in layers:
                raise RetraceError(f"layer {index} stands there twice.")
            if sorted(entry["kv_head"] for entry in entries) != [*range(len(entries))]:
                raise RetraceError(
                    f"layer {index} names {len(entries)} kv heads: expected each of 0 to "
                    f"{len(entries) - 1} once."
                )
            entries = sorted(entries, key=lambda entry: int(entry["kv_head"]))
            groups = {len(entry["heads"]) for entry in entries if "heads" in entry}
            groups |= {layer["group"]} if "group" in layer else set()
            if len(groups) > 1:
                raise RetraceError(f"layer {index} has kv heads of {groups} query heads.")
            settings = tuple(_setting(entry, f"layer {index}") for entry in entries)
            layers[index] = PlannedLayer(layer["module"], settings, next(iter(groups), None))
        return cls(dict(sorted(layers.items())), content.get("model"))

    def to_json(self) -> dict[str, Any]:
        """All of it, as the file has it."""
        return {
            "retrace_plan": FORMAT,
            "model": self.model,
            "layers": [
                {
                    "layer": index,
                    "module": layer.module,
                    **({} if layer.group is None else {"group": layer.group}),
                    "kv_heads": [
                        {"kv_head": i, **setting.to_json()}
                        for i, setting in enumerate(layer.kv_heads)
                    ],
                }
                for index, layer in self.layers.items()
            ],
        }

    def save(self, file: str | Path) -> None:
        """Write the JSON file, whole."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as opened:
            opened.write((json.dumps(self.to_json(), indent=2) + "\n").encode())

    @cached_property
    def digest(self) -> str:
        """Names what each kv head has, 12 hex digits: whatever else its file says."""
        told = [
            [index, layer.module, [setting.to_json() for setting in layer.kv_heads]]
            for index, layer in self.layers.items()
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def settings(self) -> dict[At, Setting]:
        """By layer and kv head."""
        return {
            (index, kv_head): setting
            for index, layer in self.layers.items()
            for kv_head, setting in enumerate(layer.kv_heads)
        }

    def of(self, layer: int, kv_head: int) -> Setting:
        """That of one kv head."""
        return self.layers[layer].kv_heads[kv_head]

    def check_fits(self, rules: Mapping[int, LayerRules], what: str) -> None:
        """Refuse a model of another shape.

        Args:
            rules: those of the layers that the plan is to run in, by index.
            what: names where they are from.

        Raises:
            RetraceError: a layer that the plan does not name, or another module or number of heads.
        """
        for index, own in rules.items():
            layer = self.layers.get(index)
            if layer is None:
                raise RetraceError(
                    f"says nothing of layer {index} of {what}, only of "
                    f"{', '.join(map(str, self.layers))}: recommend one for all layers, or leave "
                    "the layer out."
                )
            heads = (layer.module, len(layer.kv_heads), layer.group or own.group)
            if heads != (own.module, own.kv_heads, own.group):
                raise RetraceError(
                    f"is for another model than {what}: layer {index} is {heads[0]} with "
                    f"{heads[1]} kv heads of {heads[2]} query heads there, and here {own.module} "
                    f"with {own.kv_heads} of {own.group}."
                )

    def merge(self, other: "Plan", *, override: bool = False) -> "Plan":
        """The layers of both.

        Args:
            other: a plan for the same model, perhaps for other layers of it.
            override: where both say something else of a kv head, what the other says holds.

        Raises:
            RetraceError: they are for models of other shapes, or differ and none overrides.
        """
        merged = dict(self.layers)
        for index, layer in other.layers.items():
            ours = merged.setdefault(index, layer)
            shapes = [(one.module, len(one.kv_heads)) for one in (ours, layer)]
            if shapes[0] != shapes[1] or len({ours.group, layer.group} - {None}) > 1:
                raise RetraceError(
                    f"The plans are for two models: layer {index} is {shapes[0][0]} with "
                    f"{shapes[0][1]} kv heads in one, and {shapes[1][0]} with {shapes[1][1]}."
                )
            for kv_head, (one, another) in enumerate(
                zip(ours.kv_heads, layer.kv_heads, strict=True)
            ):
                if one != another and not override:
                    raise RetraceError(
                        f"Layer {index}, kv head {kv_head} has {one} in one plan and {another} in "
                        "the other: say which holds (override)."
                    )
            merged[index] = layer
        return Plan(dict(sorted(merged.items())), self.model or other.model)

    def compare(self, other: "Plan") -> pd.DataFrame:
        """The kv heads that two plans differ in: layer, kv_head, and what each has there; empty
        text where one says nothing."""
        ours, theirs = self.settings, other.settings
        return pd.DataFrame(
            [
                (*at, str(ours.get(at, "")), str(theirs.get(at, "")))
                for at in sorted({*ours, *theirs})
                if ours.get(at) != theirs.get(at)
            ],
            columns=["layer", "kv_head", "this", "other"],
        )

    def counts(self) -> dict[str, int]:
        """How many kv heads have each method and budget, the most frequent first."""
        return dict(Counter(map(str, self.settings.values())).most_common())


def _setting(entry: Mapping[str, Any], place: str) -> Setting:
    """What an entry of the file says of a kv head."""
    own = Setting(entry["method"], entry.get("topk", 0), entry.get("fraction"))
    if own.full:
        return Setting(FULL)
    if own.fraction is not None:  # beside it may stand what that comes to
        own = Setting(own.method, 0, own.fraction)
    if own.budget(1) < 1:
        raise RetraceError(
            f"{place}, kv head {entry['kv_head']} has {own.method}, and needs a budget: a topk of "
            "1 or more, or a fraction."
        )
    return own
