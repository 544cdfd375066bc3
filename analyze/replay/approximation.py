"""A method in place of exact attention: what a layer gives when it attends by it."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.arguments import choose_calibration
from retrace.analyze.methods.hooks import naming
from retrace.analyze.methods.specs import MethodSpec, PlanSpec, recorded_spec
from retrace.analyze.metrics.attention_output import attention_output
from retrace.analyze.plans.plan import FULL, Plan
from retrace.analyze.replay.calibration import calibration
from retrace.analyze.selection.block_causality import check_every_query
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import Calibration, States, of_layer
from retrace.analyze.storage.provenance import code_digest
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import HeadGroup, Unit, intact
from retrace.traces import RetraceError, Trace, noted


@dataclass(frozen=True)
class Approximation:
    """A method with a budget, and where it takes the place of exact attention."""

    spec: MethodSpec
    topk: int
    """Keys per query and head; of a plan the most that a kv head has."""
    from_position: int | None = None
    """Queries before it attend exactly, and a fitted state is built from what precedes it; None:
    all are approximate, and fitted states are rebuilt as the protocol `all` says."""
    prefill: Protocol | None = None
    """Which queries of a prompt are answered together; queries that are decoded after it attend
    exactly. None where each is answered alone."""
    dense_layers: frozenset[int] = frozenset()
    """Layers whose attention stays exact."""
    calibration_sequences: tuple[int, ...] = ()
    """Sequences of the exact run that the method has learnt from."""
    calibration: Calibration = field(default_factory=dict, compare=False)
    learned: Mapping[str, Calibration] = field(default_factory=dict, compare=False)
    """What each method of a plan has learnt."""

    @classmethod
    def of_run(cls, run: Trace, named: Sequence[str]) -> "Approximation":
        """The one that a trace was captured with, not calibrated; `named` are the loose files of
        methods that may be run.

        Raises:
            RetraceError: it was captured with exact attention, or by another loose file.
        """
        if not is_approximate(run):
            raise RetraceError(
                f"{run.path} has no method in the loop: capture one with --approximate."
            )
        told = {
            name: noted(run, f"capture.approximation.{name}", kind)
            for name, kind in (
                ("method", str),
                ("topk", int),
                ("from_position", int | None),
                ("dense_layers", list[int]),
                ("calibration", list[int]),
            )
        }
        prefill = run.attributes["capture"]["approximation"].get("protocol")
        for name in ("topk", "from_position"):
            if told[name] is not None and told[name] < 1:
                raise RetraceError(
                    f"{run.path}: its method's {name} is {told[name]}, not 1 or more."
                )
        plan = run.attributes["capture"]["approximation"].get("plan")
        return cls(
            recorded_spec(told["method"], named)
            if plan is None
            else PlanSpec(Plan.from_json(plan), label=told["method"]),
            told["topk"],
            told["from_position"],
            None if prefill is None else Protocol.parse(str(prefill)),
            frozenset(told["dense_layers"]),
            tuple(told["calibration"]),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """As the trace's attributes have them."""
        return {
            "method": str(self.spec),
            "parameters": self.spec.parameters,
            **(
                {"plan": self.spec.plan.to_json() | {"model": None}}
                if isinstance(self.spec, PlanSpec)
                else {}
            ),
            "topk": self.topk,
            "from_position": self.from_position,
            **({} if self.prefill is None else {"protocol": str(self.prefill)}),
            "dense_layers": sorted(self.dense_layers),
            "calibration": list(self.calibration_sequences),
            **self._code,
        }

    @property
    def _code(self) -> dict[str, str | None]:
        """Names the code that the output comes from: the method's, and retrace's."""
        return {"code": self.spec.code.digest, "engine": code_digest(__name__)}

    def code_of_run(self, run: Trace) -> str:
        """What is known of the code that a run was captured with: `same` as there is now,
        `changed`, or `unknown`, where the run does not say or nobody can look at it."""
        told = run.attributes["capture"]["approximation"]
        known = [told.get(name) for name in self._code]
        if None in known or None in self._code.values():
            return "unknown"
        return "same" if known == list(self._code.values()) else "changed"

    def calibrated(
        self,
        exact: Trace | None,
        layers: tuple[int, ...],
        device: torch.device,
        pool: Executor | None = None,
    ) -> "Approximation":
        """With what the method learns of these layers from the exact run, by the workers of the
        pool or threads.

        Raises:
            RetraceError: it must learn, and there is no exact run.
        """
        if not self.spec.method.calibrated:
            return self
        if exact is None:
            raise RetraceError(
                f"{self.spec} learns from a trace before it can take part: name one of the same "
                "model with --reference."
            )
        sequences = self.calibration_sequences or choose_calibration(exact, None)
        approximate = tuple(i for i in layers if i not in self.dense_layers)
        learned = {
            str(spec): calibration(
                exact, spec, sequences, self.spec.layers_of(spec, approximate), device, True, pool
            )
            for spec in self.spec.each
            if spec.method.calibrated
        }
        own = learned.get(str(self.spec), {})
        return replace(self, calibration_sequences=sequences, calibration=own, learned=learned)

    def joined(self, other: "Approximation") -> "Approximation":
        """With what the same has learnt of other layers."""
        learned = {
            name: {**self.learned.get(name, {}), **own} for name, own in other.learned.items()
        }
        calibration = {**self.calibration, **other.calibration}
        return replace(other, calibration=calibration, learned=learned)

    def of_layer(self, layer: int) -> "Approximation":
        """Without what was learned of other layers."""
        return replace(
            self,
            calibration=of_layer(self.calibration, layer),
            learned={name: of_layer(own, layer) for name, own in self.learned.items()},
        )

    def each(self, context: int) -> tuple["Approximation", ...]:
        """The methods that answer queries: itself, or those of a plan, each at its largest budget
        in a context of so many positions; full attention is none of them."""
        if not isinstance(self.spec, PlanSpec):
            return (self,)
        return tuple(
            self._alone(spec, self.spec.budgets_of(spec, context)[-1])
            for spec in self.spec.each
            if str(spec) != FULL
        )

    def of_head(self, group: HeadGroup, context: int) -> "Approximation | None":
        """What answers the queries of a kv head, where so many positions are the context; None
        where that is exact attention."""
        if group.layer in self.dense_layers:
            return None
        if not isinstance(self.spec, PlanSpec):
            return self
        if self.spec.plan.of(group.layer, group.kv_head).full:
            return None
        return self._alone(*self.spec.of_head(group.layer, group.kv_head, context))

    def _alone(self, spec: MethodSpec, topk: int) -> "Approximation":
        learned = self.learned.get(str(spec), {})
        return replace(self, spec=spec, topk=topk, calibration=learned, learned={})

    def first_position(self, prompt: int | None) -> int | None:
        """The first approximate position of a sequence whose first `prompt` positions are read at
        once, if not all are; None where all are approximate and there is no prefix."""
        if self.prefill is not None:
            return None
        return prompt if self.from_position is None else self.from_position

    def protocol(self, first: int | None) -> Protocol:
        """Which keys a state is built from, where queries from `first` on are approximate."""
        if self.prefill is not None:
            return self.prefill
        return Protocol() if first is None else Protocol(prefix=first)

    def states(self, unit: Unit, first: int | None) -> States:
        """The method's states for a unit whose queries from `first` on are approximate."""
        return States(self.spec.method, unit, self.protocol(first), self.calibration)

    def output(self, states: States, unit: Unit, first: int) -> Tensor:
        """Attention output (group, queries, value channels) float32 of a unit's queries from
        position `first` on, each over the keys that the method selects for it."""
        with naming(self.spec), intact(unit):
            output = torch.cat([*self._outputs(states, unit, first)], dim=1)
            states.check_calibration()
        return output

    def _outputs(self, states: States, unit: Unit, first: int) -> Iterator[Tensor]:
        """The same, block by block."""
        method, together = self.spec.method, 1
        if self.prefill is not None:
            check_every_query(unit)
            together = self.prefill.block or 1
        for whole in unit.blocks(first, together=together):
            begin = int(torch.searchsorted(whole.positions, first))
            block = whole.part(slice(begin, len(whole.positions)))
            for served in states.serve(block):
                [selection] = select(method, served, served.block, (self.topk,))
                own = selection.output
                if own is None:
                    own = attention_output(served.block, selection, [0])
                yield own[0]


def model_weights(trace: Trace) -> str | None:
    """The digest of the weights of the model that a trace was captured with; None where the trace
    does not say, as older ones do not."""
    model = trace.attributes.get("model")
    weights = model.get("weights") if isinstance(model, Mapping) else None
    return weights if isinstance(weights, str) else None


def transformers_release(trace: Trace) -> str | None:
    """The release of transformers that a trace was captured with, where the trace says: another one
    may lay the same weights out otherwise, which have another digest then."""
    versions = trace.attributes.get("versions")
    release = versions.get("transformers") if isinstance(versions, Mapping) else None
    return release if isinstance(release, str) else None


def check_exact(trace: Trace) -> None:
    """Refuse a trace that is to be the exact run and is not."""
    if is_approximate(trace):
        raise RetraceError(f"{trace.path} is not the exact run: it has a method in the loop.")


def is_approximate(trace: Trace) -> bool:
    """Whether a trace was captured with a method in the loop; others' need not say how it was."""
    captured = trace.attributes.get("capture")
    return isinstance(captured, Mapping) and "approximation" in captured
