"""Observers of attention calls: one that learns every layer's rules, one that stores tensors."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.capture.attention.interface import AttentionCall, unrecordable
from retrace.capture.attention.rules import mask_fits, read_rules
from retrace.traces import LayerRules, RetraceError


class LayerSink(Protocol):
    """Where the tensors of a layer go: a `WriteQueue`, or what a test puts in its place."""

    def write_layer(self, sequence: int, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Take query (heads, queries, channels), key (kv_heads, positions, channels) and
        value (kv_heads, positions, value channels) of one sequence, by name, on the model's device,
        and of a natively sparse layer the keys selected (choices, queries, kept)."""


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module of a model, as it was seen at work."""

    index: int
    module: torch.nn.Module
    rules: LayerRules
    dtype: torch.dtype
    device: torch.device
    """Where it computes."""


def dtype_of(layers: Mapping[int, AttentionLayer]) -> str:
    """The type that attention computes in, and a trace stores."""
    return str(next(iter(layers.values())).dtype).removeprefix("torch.")


class RulesObserver:
    """Reads the rules of every call, and tells the layers apart."""

    def __init__(self) -> None:
        self._seen: list[tuple[AttentionCall, LayerRules]] = []

    def __call__(self, call: AttentionCall) -> None:
        """Take note of one call."""
        rules = read_rules(
            call.path,
            call.module,
            call.query,
            call.key,
            call.value,
            call.mask,
            call.arguments,
            call.selected,
        )
        dtypes = {tensor.dtype for tensor in (call.query, call.key, call.value)}
        if len(dtypes) != 1:
            raise RetraceError(
                f"{call.path} mixes {' and '.join(sorted(map(str, dtypes)))} in its queries, keys "
                "and values: a trace stores one type."
            )
        if any(rules.module == other.module for _, other in self._seen):
            raise RetraceError(
                f"{call.path} calls attention more than once for a token "
                f"({type(call.module).__name__}): a trace holds one call per layer."
            )
        self._seen.append((call, rules))

    def layers(self, model: Any) -> dict[int, AttentionLayer]:
        """The layers that were seen in one forward pass, by index, ascending."""
        if not self._seen:
            raise unrecordable(model)
        numbers = _layer_numbers([call for call, _ in self._seen])
        layers = []
        first_of: dict[Any, int] = {}
        chooses: int | None = None
        for number, (call, rules) in zip(numbers, self._seen, strict=True):
            if rules.indexer is not None:
                own = getattr(call.module, "indexer", None) is not None
                chooses = number if own else chooses
                indexer = dataclasses.replace(rules.indexer, source=None if own else chooses)
                rules = dataclasses.replace(rules, indexer=indexer)
            key = call.key
            # All calls are still held: what has the same place in memory is the same tensor.
            place = (key.device, key.data_ptr(), key.shape, key.stride())
            source = first_of.setdefault(place, number)
            if source != number:
                rules = dataclasses.replace(rules, kv_source=source)
            layers.append(
                AttentionLayer(number, call.module, rules, call.query.dtype, call.query.device)
            )
        return {layer.index: layer for layer in sorted(layers, key=lambda layer: layer.index)}


def _layer_numbers(calls: Sequence[AttentionCall]) -> list[int]:
    """A number of its own for the layer of each call: what the module says, else what its path
    says (Zamba2's modules all say -1), else the order of the calls."""
    said = [getattr(call.module, "layer_idx", None) for call in calls]
    paths = [re.search(r"(?<=\.)\d+(?=\.)", call.path) for call in calls]
    for numbers in (said, [int(found[0]) if found else None for found in paths]):
        usable = [n for n in numbers if isinstance(n, int) and n >= 0]
        if len(set(usable)) == len(calls):
            return usable
    return list(range(len(calls)))


@dataclass(frozen=True)
class RecordedSequence:
    """One row of a batch that is to be stored."""

    row: int
    """Its place in the batch."""
    sequence: int
    """Its number in the trace."""
    length: int
    """Positions, padding excluded."""
    query_positions: npt.NDArray[np.int32]
    """Positions (queries,) whose queries are kept."""
    sampled_positions: npt.NDArray[np.int32] | None = None
    """Positions (queries,) whose attention output is kept for checking."""


class ComparedMasks:
    """Which masks of a forward pass hide what their layers' rules hide.

    Layers on one device share a mask, which is looked at once for each kind of rules; each of
    another device has a copy of its own. Of each kind the last one is kept, so that no other takes
    its place in memory meanwhile.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor | None, bool]] = {}

    def fit(self, call: AttentionCall, rules: LayerRules, compare: Callable[[], bool]) -> bool:
        """Whether the mask of a call fits, by what `compare` says of one that is new."""
        key = (call.query.device, call.key.shape[-2], rules.window, rules.chunk)
        known = self._known.get(key)
        if known is None or not _same_tensor(known[0], call.mask):
            known = self._known[key] = (call.mask, compare())
        return known[1]


class TensorRecorder:
    """Stores queries, keys and values of each call at once, so that one layer is held at a time."""

    def __init__(self, sink: LayerSink, layers: Mapping[int, AttentionLayer]) -> None:
        self._sink = sink
        self._layers = {layer.module: layer for layer in layers.values()}
        self._batch: Sequence[RecordedSequence] = ()
        self._recorded: set[int] = set()
        self._masks = ComparedMasks()
        self._kept: dict[tuple[int, torch.device], Tensor] = {}
        self.samples: dict[int, npt.NDArray[np.float64]] = {}
        """Attention output (queries, heads, value channels) at the sampled positions, by layer."""

    def start(self, batch: Sequence[RecordedSequence]) -> None:
        """What the next forward pass holds."""
        self._batch = batch
        self._recorded = set()
        self._masks = ComparedMasks()
        self._kept = {}
        self.samples = {}

    def finish(self) -> None:
        """Make sure that every layer was recorded in the forward pass."""
        self._masks = ComparedMasks()
        for layer in self._layers.values():
            if layer.index not in self._recorded:
                raise RetraceError(
                    f"{layer.rules.module} was not called for sequence {self._batch[0].sequence}, "
                    "though it was for the first: this model cannot be captured."
                )

    def __call__(self, call: AttentionCall) -> None:
        """Store one layer's tensors of every sequence in the batch."""
        layer = self._layers.get(call.module)
        if layer is None:
            return
        if layer.index in self._recorded:
            raise RetraceError(f"{call.path} called attention twice for a sequence.")
        self._recorded.add(layer.index)
        self._check(call, layer.rules)
        self._store(call, layer)

    def _store(self, call: AttentionCall, layer: AttentionLayer) -> None:
        for part in self._batch:
            tensors = {"query": call.query, "key": call.key, "value": call.value}
            if call.selected is not None:
                tensors["selected"] = call.selected
            tensors = {name: t[part.row, :, : part.length] for name, t in tensors.items()}
            if len(part.query_positions) < part.length:
                kept = self._positions(part, call.query.device)
                for name in {"query", "selected"} & tensors.keys():
                    tensors[name] = tensors[name][:, kept]
            self._sink.write_layer(part.sequence, layer.index, tensors)
            if part.sampled_positions is not None:
                sampled = torch.from_numpy(part.sampled_positions).long()
                output = call.output[part.row, sampled.to(call.output.device)]
                self.samples[layer.index] = output.cpu().double().numpy()

    def _positions(self, part: RecordedSequence, device: torch.device) -> Tensor:
        """Positions (queries,) of the kept queries; moved once a batch: a GPU waits for it."""
        place = (part.row, device)
        if place not in self._kept:
            self._kept[place] = torch.from_numpy(part.query_positions).long().to(device)
        return self._kept[place]

    def _check(self, call: AttentionCall, rules: LayerRules) -> None:
        """Refuse a call that follows other rules than those that the trace states."""
        scale = call.arguments.get("scaling")
        moved = scale is not None and float(scale) != rules.scale
        length = call.query.shape[-2]
        if moved or not self._masks.fit(call, rules, lambda: mask_fits(call.mask, length, rules)):
            what = "scale" if moved else "mask"
            raise RetraceError(
                f"{call.path} has another {what} in sequence {self._batch[0].sequence} than in "
                "the sequence that the model was examined with: this model cannot be captured."
            )


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors, both of which are there, are the same memory, or both are none."""
    if one is None or other is None:
        return one is other
    places = [(t.device, t.data_ptr(), t.shape, t.stride()) for t in (one, other)]
    return places[0] == places[1]
