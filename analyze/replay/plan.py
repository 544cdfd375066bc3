"""What is replayed: methods at budgets, for the queries that count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from retrace.analyze.methods.base import EvictionMethod, ScoreMethod
from retrace.analyze.methods.specs import MethodSpec, PlanSpec
from retrace.analyze.replay.counting import Counting
from retrace.analyze.replay.spans import Spans, rows_within, spans_named
from retrace.analyze.selection.states import Calibration, of_layer
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Unit
from retrace.traces import Trace

EVERY_BUDGET_TO = 256
"""Curves have a point at every budget up to here, and further ones evenly on a log scale."""


@dataclass(frozen=True)
class Replayed:
    """One method at the budgets asked for."""

    spec: MethodSpec
    topk: tuple[int, ...]
    """Ascending."""
    calibration: Calibration = field(default_factory=dict, compare=False)
    protocol: Protocol = field(default_factory=Protocol, compare=False)
    learned: Mapping[str, Calibration] = field(default_factory=dict, compare=False)
    """What each method of a plan has learnt."""

    def each(self, length: int) -> tuple["Replayed", ...]:
        """The methods that answer queries, each at all its budgets: itself, or those of a plan
        over sequences of up to this length."""
        if not isinstance(self.spec, PlanSpec):
            return (self,)
        context = self.protocol.context(length)
        return tuple(
            self._alone(spec, self.spec.budgets_of(spec, context)) for spec in self.spec.each
        )

    def of_unit(self, unit: Unit) -> "Replayed":
        """What answers the queries of a kv head: itself, or its method and budget in a plan."""
        if not isinstance(self.spec, PlanSpec):
            return self
        context = self.protocol.context(len(unit.keys))
        spec, k = self.spec.of_head(unit.group.layer, unit.group.kv_head, context)
        return self._alone(spec, (k,))

    def _alone(self, spec: MethodSpec, topk: tuple[int, ...]) -> "Replayed":
        learned = self.learned.get(str(spec), {})
        return Replayed(spec, topk, learned, self.protocol)

    def having_learned(self, spec: MethodSpec, learnt: Calibration) -> "Replayed":
        """With what it, or one of a plan's methods, has learnt."""
        if spec is self.spec:
            return replace(self, calibration=learnt)
        return replace(self, learned={**self.learned, str(spec): learnt})

    def of_layer(self, layer: int) -> "Replayed":
        """Without what was learned of other layers."""
        return replace(
            self,
            calibration=of_layer(self.calibration, layer),
            learned={name: of_layer(own, layer) for name, own in self.learned.items()},
        )

    @property
    def ks(self) -> tuple[int, ...]:
        """The budgets at which recall and attention fraction are measured: all on the way where
        one ranked list holds them, otherwise those asked for."""
        method = self.spec.method
        if not isinstance(method, ScoreMethod) or not method.nested:
            return self.topk
        if self.protocol.evict is not None and isinstance(method, EvictionMethod):
            return self.topk  # what a small budget drops, a larger one may judge again
        if method.cache is not None and method.cache.step is not None:
            return self.topk  # each charged by itself for the newest keys that it attends
        return curve_budgets(self.topk)


def names_of(methods: Sequence[Replayed]) -> list[str]:
    """The names that what they take is noted by: each's own, and those of a plan's methods."""
    return [
        *dict.fromkeys(str(spec) for m in methods for spec in dict.fromkeys([m.spec, *m.spec.each]))
    ]


@dataclass(frozen=True)
class Plan:
    """What is replayed, and under which rules; the same for every unit, but for what its sequence
    has at which positions."""

    methods: tuple[Replayed, ...]
    counting: Counting
    block_elements: int | None = None
    """Scores held at once."""
    locality: bool = False
    """Whether it is followed how keys move from query to query."""
    projected: bool = False
    """Whether errors are told after the output projection too."""
    within: Spans | None = None
    """Positions of the sequence that count; None for all."""
    evidence: Spans = ()
    """Positions of the sequence whose keys are told apart."""

    def of_sequence(self, trace: Trace, sequence: int) -> "Plan":
        """With what a sequence has at which positions."""
        where, evidence = self.counting.where, self.counting.evidence
        return replace(
            self,
            within=None if where is None else spans_named(trace, where, sequence),
            evidence=() if evidence is None else spans_named(trace, evidence, sequence),
        )

    def counted(self, positions: Sequence[int], first: int) -> list[slice]:
        """The rows of ascending query positions that count, of those from `first` on."""
        everywhere = (range(first, positions[-1] + 1),)
        return rows_within(positions, everywhere if self.within is None else self.within, first)

    def of_unit(self, unit: Unit) -> "Plan":
        """What is replayed of a kv head."""
        return replace(self, methods=tuple(method.of_unit(unit) for method in self.methods))

    @property
    def ranks(self) -> int:
        """Exact ranks that the largest budget needs."""
        return max(method.topk[-1] for method in self.methods)


def curve_budgets(topk: Sequence[int]) -> tuple[int, ...]:
    """Every budget up to the largest asked for; thinned beyond `EVERY_BUDGET_TO`."""
    largest = max(topk)
    budgets = set(range(1, min(largest, EVERY_BUDGET_TO) + 1)) | set(topk)
    k = float(EVERY_BUDGET_TO)
    while k < largest:
        k *= 2 ** (1 / 16)
        budgets.add(min(int(k), largest))
    return tuple(sorted(budgets))
