"""A method that is to be in the loop is tried first, on what the model's own layers see."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze.methods.base import BlockMethod
from retrace.analyze.methods.hooks import naming
from retrace.analyze.replay.approximation import Approximation
from retrace.analyze.replay.trials import kind_of
from retrace.analyze.selection.block_causality import check_blocks
from retrace.analyze.selection.causality import check_causality
from retrace.analyze.units.unit import Neighbours, Unit, make_units
from retrace.capture.attention.interface import AttentionCall, observed_attention
from retrace.capture.attention.recorder import AttentionLayer
from retrace.capture.model.loading import input_device
from retrace.capture.model.logits import logits_in_blocks

POSITIONS = 256
"""Positions that are read, or twice the budget: of fewer keys a method leaves none out."""


def check_method(
    model: Any,
    layers: Mapping[int, AttentionLayer],
    approximation: Approximation,
    tokens: npt.NDArray[np.int32],
    *,
    decodes: bool,
) -> None:
    """Refuse a method that sees what it must not, as `analyze` does, on a layer of each kind that
    it is to answer in.

    Args:
        model: a causal language model.
        layers: its attention layers.
        approximation: the method, calibrated.
        tokens: (positions,), the first of which are read.
        decodes: whether its state is built from a prompt, and grows.

    Raises:
        RetraceError: its answer to a query depends on later keys, on other queries or on what was
            asked before, or it writes into what it is handed.
    """
    units = _units(model, layers, tokens[: max(POSITIONS, 2 * approximation.topk)])
    for one in approximation.each(len(tokens)):
        own = approximation.spec.layers_of(one.spec, tuple(layers))
        with naming(approximation.spec) if one is not approximation else nullcontext():
            _check(one, {i: layers[i] for i in own}, units, decodes)


def _check(
    approximation: Approximation,
    layers: Mapping[int, AttentionLayer],
    units: Callable[[int], Iterator[Unit]],
    decodes: bool,
) -> None:
    """The same of one method, in the layers that it is used in."""
    first = approximation.from_position
    known = set()
    for index, layer in layers.items():
        if index in approximation.dense_layers or kind_of(layer.rules) in known:
            continue
        known.add(kind_of(layer.rules))
        unit = next(iter(units(index)))
        half = len(unit.keys) // 2
        prefix = None if first is None and not decodes else max(1, min(first or half, half))
        method, prefill = approximation.spec.method, approximation.prefill
        with torch.inference_mode(), naming(approximation.spec):
            if isinstance(method, BlockMethod) and prefill is not None:
                learnt, ks = approximation.calibration, [approximation.topk]
                check_blocks(method, unit, prefill, ks, learnt, approximation.spec.anew)
                continue
            check_causality(
                method,
                unit,
                approximation.protocol(prefix),
                [approximation.topk],
                prefix or 0,
                approximation.calibration,
                approximation.spec.anew,
            )


def _units(
    model: Any, layers: Mapping[int, AttentionLayer], tokens: npt.NDArray[np.int32]
) -> Callable[[int], Iterator[Unit]]:
    """The units of any layer as the exact model reads these tokens (positions,)."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    chosen: dict[int, Tensor] = {}
    index_of = {layer.module: index for index, layer in layers.items()}

    def keep(call: AttentionCall) -> None:
        # In one layout, whatever the model's: sums of two layouts differ in their last bits.
        query, key, value = (
            tensor[0].clone(memory_format=torch.contiguous_format)
            for tensor in (call.query, call.key, call.value)
        )
        seen[index_of[call.module]] = query, key, value
        if call.selected is not None:
            chosen[index_of[call.module]] = call.selected[0].clone()

    batch = torch.from_numpy(tokens).long()[None].to(input_device(model))
    last = torch.tensor([len(tokens) - 1])
    with torch.inference_mode(), observed_attention(model, keep):
        list(logits_in_blocks(model, batch, [last]))

    def read(
        index: int, device: torch.device, neighbours: Neighbours | None = None
    ) -> Iterator[Unit]:
        query, key, value = (tensor.to(device) for tensor in seen[index])
        positions = torch.arange(len(tokens), device=device)
        tensors = query, key, value
        own = chosen[index].to(device) if index in chosen else None
        rules = layers[index].rules
        return make_units(index, 0, rules, tensors, positions, neighbours, chosen=own)

    def units(index: int) -> Iterator[Unit]:
        # A neighbour may be on another device than the layer that asks for it.
        device = seen[index][0].device
        return read(index, device, Neighbours(everywhere, lambda i: read(i, device), sparse))

    everywhere = tuple(sorted(layers))
    sparse = any(layer.rules.indexer is not None for layer in layers.values())
    return units
