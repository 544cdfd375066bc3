"""The closed loop: a running model whose attention is a method's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrace.analyze.methods.hooks import naming
from retrace.analyze.methods.specs import MethodSpec, PlanSpec
from retrace.analyze.replay.approximation import Approximation
from retrace.analyze.replay.trials import check_answers
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Neighbours, Unit, make_units
from retrace.capture.attention.interface import AttentionCall
from retrace.capture.attention.recorder import AttentionLayer
from retrace.capture.attention.selected import joined_choices
from retrace.capture.settings import DEFAULT_MAX_LENGTH, CaptureSettings
from retrace.traces import RetraceError, Trace


def prepare(
    spec: MethodSpec,
    settings: CaptureSettings,
    layers: Mapping[int, AttentionLayer],
    reference: Trace | None,
) -> Approximation:
    """The method that the settings name, calibrated on the reference if it must be.

    Raises:
        RetraceError: a dense layer that is none, nothing to calibrate on, or a method of another
            protocol.
    """
    unknown = [index for index in settings.dense_layers if index not in layers]
    if unknown:
        raise RetraceError(
            f"There is no attention in layer {', '.join(map(str, unknown))} to be dense."
        )
    dense = frozenset(settings.dense_layers)
    prefill = settings.prefill
    check_answers(spec, prefill or Protocol())
    if isinstance(spec, PlanSpec):
        rules = {i: layer.rules for i, layer in layers.items() if i not in dense}
        with naming(spec):
            spec.plan.check_fits(rules, settings.pretrained)
    (topk,) = spec.budgets((settings.topk or 0,), settings.max_length or DEFAULT_MAX_LENGTH)
    chosen = Approximation(spec, topk, settings.from_position, prefill, dense)
    # What a layer has learnt is where the layer computes.
    learnt = chosen
    for device in dict.fromkeys(layer.device for layer in layers.values()):
        there = tuple(index for index, layer in layers.items() if layer.device == device)
        part = chosen.calibrated(reference, there, device)
        learnt = learnt.joined(part)
    return learnt


@dataclass
class _Seen:
    """What a layer has seen of a batch so far."""

    query: Tensor
    """(batch, heads, positions, channels)"""
    key: Tensor
    """(batch, kv_heads, positions, channels)"""
    value: Tensor
    """(batch, kv_heads, positions, value channels)"""
    selected: Tensor | None = None
    """(batch, choices, positions, kept) of a natively sparse layer"""
    states: dict[tuple[int, int], tuple[Approximation, States] | None] = field(default_factory=dict)
    """By row of the batch and kv head: what answers there, and its states; None where attention is
    exact."""

    def add(self, call: AttentionCall) -> None:
        """Take what is new in a call: its cache may have dropped what it holds no longer."""
        count = call.query.shape[2]
        self.query = torch.cat([self.query, call.query], dim=2)
        self.key = torch.cat([self.key, call.key[:, :, -count:]], dim=2)
        self.value = torch.cat([self.value, call.value[:, :, -count:]], dim=2)
        self.selected = joined_choices([self.selected, call.selected])


class Approximator:
    """Answers a model's calls of attention by a method."""

    def __init__(self, approximation: Approximation, layers: Mapping[int, AttentionLayer]) -> None:
        self._approximation = approximation
        self._index = {layer.module: index for index, layer in layers.items()}
        self._rules = {index: layer.rules for index, layer in sorted(layers.items())}
        self._sparse = any(rules.indexer is not None for rules in self._rules.values())
        self._sequences: Sequence[int] = ()
        self._decodes = False
        self._first: int | None = None
        self._seen: dict[int, _Seen] = {}

    def start(self, sequences: Sequence[int], prompt: int | None = None) -> None:
        """What the next forward passes hold: these sequences, of which the first `prompt` positions
        are read at once and exactly, if not all are."""
        self._sequences = sequences
        self._decodes = prompt is not None
        self._first = self._approximation.first_position(prompt)
        self._seen = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        """The output (batch, positions, heads, value channels) of a call whose own is exact."""
        index = self._index[call.module]
        seen = self._take(call, index)
        output = call.output
        if index not in self._approximation.dense_layers:
            output = self._answer(call.output, seen, index)
        if not (self._decodes or self._approximation.spec.method.across_layers):
            del self._seen[index]
        return output

    def _answer(self, exact: Tensor, seen: _Seen, index: int) -> Tensor:
        """The method's output in place of the exact one of the last positions of a layer."""
        start = seen.query.shape[2] - exact.shape[1]
        first = max(start, self._first or 0)
        if first >= seen.query.shape[2] or (self._approximation.prefill is not None and start):
            return exact
        output = exact.clone()
        for row, sequence in enumerate(self._sequences):
            for unit in self._units(index, row, sequence):
                approximated = self._approximate(seen, row, unit, first)
                if approximated is not None:
                    own = output[row, first - start :, unit.group.heads]
                    own.copy_(approximated.transpose(0, 1))
        return output

    def _take(self, call: AttentionCall, index: int) -> _Seen:
        """What the layer has seen of these sequences, this call included."""
        count = call.query.shape[2]
        # More positions than one, and no keys before them: a prompt, or all of a sequence anew
        # where a model throws its cache away.
        begins = count > 1 and call.key.shape[2] == count
        if index in self._seen and not begins:
            self._seen[index].add(call)
        else:
            # Copies: a state may write into what it was built from as long as the model decodes.
            self._seen[index] = _Seen(
                call.query.clone(), call.key.clone(), call.value.clone(), call.selected
            )
        return self._seen[index]

    def _approximate(self, seen: _Seen, row: int, unit: Unit, first: int) -> Tensor | None:
        """The method's output (group, queries, value channels) for the queries from `first` on;
        None where a plan leaves the kv head exact."""
        place = row, unit.group.kv_head
        if place in seen.states:
            held = seen.states[place]
            if held is not None:
                held[1].grow(unit)
        else:
            own = self._approximation.of_head(unit.group, self._first or len(unit.keys))
            held = None if own is None else (own, own.states(unit, self._first))
            seen.states[place] = held
        return None if held is None else held[0].output(held[1], unit, first)

    def _units(self, index: int, row: int, sequence: int) -> Iterator[Unit]:
        """Every kv head of a layer in one row of the batch, as far as the model has come."""

        def read(layer: int) -> Iterator[Unit]:
            seen = self._seen.get(layer)
            if seen is None or seen.query.shape[2] < length:
                raise RetraceError(
                    f"layer {index} needs layer {layer}, which the model has not come to yet."
                )
            return make(layer, seen, None)

        def make(layer: int, seen: _Seen, neighbours: Neighbours | None) -> Iterator[Unit]:
            # A neighbour may be on another device than the layer that asks for it.
            query, key, value = (t[row].to(device) for t in (seen.query, seen.key, seen.value))
            tensors = query, key, value
            positions = torch.arange(length, device=device)
            chosen = None if seen.selected is None else seen.selected[row].to(device)
            rules = self._rules[layer]
            return make_units(layer, sequence, rules, tensors, positions, neighbours, chosen=chosen)

        seen = self._seen[index]
        length, device = seen.query.shape[2], seen.query.device
        return make(index, seen, Neighbours(tuple(self._rules), read, self._sparse))
