"""The rotary position encoding of each layer, learned by watching the layer at work.

Given one and the same hidden state at every position, a layer's queries (and keys) differ by
nothing but their position. They are compared with the one at position 0, turned by the frequencies
that the model holds: what fits is known, wherever the model computes it. No table of models is
needed.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrace.capture.attention.interface import AttentionCall, observed_attention
from retrace.capture.attention.recorder import AttentionLayer
from retrace.capture.attention.selected import has_indexer
from retrace.capture.model.lengths import CHANGES_WITH_LENGTH
from retrace.traces import Rotation

TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Largest difference of a turned query, relative to the typical norm. Models compute angles in
float32 whatever they compute else in."""
LEAST_POSITIONS = 8
"""In fewer, another encoding might fit by chance."""
COMPARED_POSITIONS = 64


class LayerInputs:
    """Arguments of each attention layer in one forward pass, with a single hidden state."""

    def __init__(self) -> None:
        self.bound: dict[torch.nn.Module, inspect.BoundArguments] = {}
        self.hidden: dict[torch.nn.Module, Tensor] = {}
        """The hidden state (channels,) of the last position."""
        self.length = 0

    @contextlib.contextmanager
    def noted(self, layers: Iterable[AttentionLayer]) -> Iterator[None]:
        """Within this context the arguments of these layers are put down."""
        hooks = [
            layer.module.register_forward_pre_hook(self._note, with_kwargs=True) for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*inputs, **options)
        name = next(iter(bound.arguments))
        hidden = bound.arguments[name]
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            return
        # One position alone, so that no layer's hidden states are kept.
        self.hidden[module], self.length = hidden[0, -1].clone(), hidden.shape[1]
        bound.arguments[name] = None
        for arguments in (bound.arguments, bound.arguments.get("kwargs", {})):
            mask = arguments.get("attention_mask")
            if mask is None:
                continue
            # No query or key depends on it, but an indexer asks for it, as the recorder has it.
            arguments["attention_mask"] = None
            if has_indexer(module) and isinstance(mask, Tensor):  # else one of each kind, by name
                arguments["attention_mask"] = mask if mask.dtype == torch.bool else mask == 0
        self.bound[module] = bound


def learn_rotations(
    model: Any, layers: Mapping[int, AttentionLayer], inputs: LayerInputs
) -> dict[int, AttentionLayer]:
    """The same layers with the rotation of each in its rules; None where none could be verified."""
    candidates = _candidates(model)
    learned: dict[int, AttentionLayer] = {}
    for index, layer in layers.items():
        rotation = None
        if layer.module in inputs.bound and inputs.length >= LEAST_POSITIONS:
            rotation = _learn(model, layer, inputs, candidates)
        source = layer.rules.kv_source
        if source is not None and learned[source].rules.rotation != rotation:
            rotation = None  # one of the two must be wrong about the keys that they share
        rules = dataclasses.replace(layer.rules, rotation=rotation)
        learned[index] = dataclasses.replace(layer, rules=rules)
    return learned


def _learn(
    model: Any, layer: AttentionLayer, inputs: LayerInputs, candidates: list[Rotation]
) -> Rotation | None:
    seen = _constant_call(model, layer, inputs)
    if not seen:
        return None
    positions = np.unique(np.linspace(0, inputs.length - 1, COMPARED_POSITIONS).astype(int))
    tensors = [seen[0].query]
    if layer.rules.kv_source is None:  # else they are those of another layer's hidden states
        tensors.append(seen[0].key)
    arrays = [tensor[0, :, positions].double().cpu().numpy() for tensor in tensors]
    best, least = None, np.inf
    for candidate in [Rotation(), *_placed(candidates, layer.rules.key_dim)]:
        error = max(_misfit(candidate, array, positions) for array in arrays)
        if error < least and _starts_at_zero(inputs.bound[layer.module], candidate):
            best, least = candidate, error
    return best if least <= TOLERANCE[str(layer.dtype).removeprefix("torch.")] else None


def _constant_call(model: Any, layer: AttentionLayer, inputs: LayerInputs) -> list[AttentionCall]:
    """The layer's attention call for one hidden state at every position; none if it fails."""
    bound = inputs.bound[layer.module]
    name = next(iter(bound.arguments))
    bound.arguments[name] = inputs.hidden[layer.module].expand(1, inputs.length, -1).contiguous()
    seen: list[AttentionCall] = []
    try:
        with observed_attention(model, seen.append):
            layer.module(*bound.args, **bound.kwargs)
    except Exception:
        # Whatever a module needs besides its arguments: a trace is complete without its rotation.
        return []
    finally:
        bound.arguments[name] = None
    return seen


def _candidates(model: Any) -> list[Rotation]:
    """The rotations that the model's modules hold frequencies for, in no particular place."""
    found: dict[Rotation, None] = {}
    for module in model.modules():
        kinds = getattr(module, "rope_type", "default")
        for name, buffer in module.named_buffers(recurse=False):
            # One for each kind of layer in some models: sliding_attention_inv_freq.
            if not name.endswith("inv_freq") or "original" in name or buffer.is_meta:
                continue
            kind = name.removesuffix("inv_freq")
            rope_type = kinds.get(kind.rstrip("_")) if isinstance(kinds, dict) else kinds
            if rope_type not in CHANGES_WITH_LENGTH and buffer.dim() == 1:
                scaling = float(getattr(module, f"{kind}attention_scaling", None) or 1.0)
                found[Rotation(tuple(buffer.double().tolist()), scaling=scaling)] = None
    width = getattr(model.config.get_text_config(), "rotary_dim", None)
    if isinstance(width, int):
        # GPT-J and CodeGen hold a table of sines in place of frequencies, always to this base.
        powers = torch.arange(0, width, 2, dtype=torch.float64) / width
        found[Rotation(tuple((10000.0**-powers).tolist()))] = None
    return list(found)


def _placed(candidates: list[Rotation], channels: int) -> Iterator[Rotation]:
    """Candidates on the first or the last channels, in either pairing."""
    for candidate in candidates:
        spare = channels - 2 * len(candidate.frequencies)
        if spare < 0:
            continue
        for first in sorted({0, spare}):
            for pairing in ("half", "interleaved"):
                yield dataclasses.replace(candidate, first=first, pairing=pairing)


def _misfit(rotation: Rotation, vectors: Any, positions: Any) -> float:
    """Largest difference of `vectors` (heads, positions, channels) from those at position 0,
    turned; relative to their typical norm, infinite where that is none."""
    unscaled = dataclasses.replace(rotation, scaling=1.0)  # position 0 is scaled as well
    turned = unscaled.apply(np.broadcast_to(vectors[:, :1], vectors.shape), positions)
    typical = np.sqrt(np.square(np.linalg.norm(vectors, axis=-1)).mean())
    error = float(np.linalg.norm(vectors - turned, axis=-1).max() / typical) if typical else np.inf
    return error if np.isfinite(error) else np.inf


def _starts_at_zero(bound: inspect.BoundArguments, rotation: Rotation) -> bool:
    """Whether the first position has the angle 0 and the scaling stated, where cosines and sines
    are passed; where they are not, nothing but a scaling of 1 is believed."""
    known = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    pair = known.get("position_embeddings")
    if not rotation.frequencies:
        return True
    if not isinstance(pair, tuple) or len(pair) != 2:
        return rotation.scaling == 1.0
    first = [part[..., 0, :].double() for part in pair]
    # GPT-J has its sines first.
    return any(
        bool((cos - rotation.scaling).abs().max() < 1e-2) and bool(sin.abs().max() < 1e-2)
        for cos, sin in (first, first[::-1])
    )
