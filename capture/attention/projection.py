"""The output projection of each layer, found by watching which module takes its attention output.

What that module gives must be what the attention module returns: a gate or norm in between, or
anything done afterwards, is more than a multiplication with weights. No table of models is needed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from retrace.capture.attention.interface import AttentionCall, observed_attention
from retrace.capture.attention.recorder import AttentionLayer
from retrace.capture.model.loading import input_device
from retrace.capture.model.logits import logits_in_blocks
from retrace.traces import OutputProjection, to_numpy
from retrace.traces.schema import DTYPES

BLOCK_ROWS = 256
"""Rows of the identity that a module is given at once, to tell its weights."""


@dataclass(frozen=True)
class Projected:
    """What a layer's output projection was given and gave, of some tokens."""

    path: str
    """Of the module, inside the model."""
    module: torch.nn.Module
    attended: Tensor
    """(positions, heads, value channels)"""
    output: Tensor
    """(positions, hidden)"""

    @property
    def bias(self) -> Tensor | None:
        """What it adds (hidden,)."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def stored(self, dtype: str) -> OutputProjection | str:
        """Its weights as a trace of a dtype stores them, or why it does not."""
        kind = type(self.module).__name__
        if not self._plain and self.bias is not None:
            return f"the weights of {kind} cannot be told from its bias"
        if self._plain and str(self.module.weight.dtype) != f"torch.{dtype}":
            return f"its weights are {self.module.weight.dtype}, the trace is {dtype}"

        def read() -> npt.NDArray[Any]:
            return to_numpy(self.weights()).astype(DTYPES[dtype], copy=False)

        return OutputProjection(self.path, self.output.shape[-1], read)

    def weights(self) -> Tensor:
        """W_o (hidden, heads, value channels), in the type that the module has it or gives."""
        _, heads, channels = self.attended.shape
        weight = self._weight() if self._plain else self._told()
        return weight.detach().cpu().reshape(len(weight), heads, channels).contiguous()

    @property
    def _plain(self) -> bool:
        """Whether the weights are there as they are multiplied with."""
        weight = getattr(self.module, "weight", None)
        # A type of its own is a quantised weight, which may know nothing but products with it.
        known = type(self.module) in (torch.nn.Linear, Conv1D) and type(weight) in (
            Tensor,
            torch.nn.Parameter,
        )
        return known and isinstance(weight, Tensor) and not weight.is_meta

    def _weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if type(self.module) is Conv1D else weight

    def _told(self) -> Tensor:
        """What the module makes of each channel alone: its weights, be they quantised, adapted, or
        loaded when they are called for."""
        size = self.attended[0].numel()
        like = self.attended
        parts = []
        with torch.inference_mode():
            for start in range(0, size, BLOCK_ROWS):
                rows = torch.arange(start, min(start + BLOCK_ROWS, size), device=like.device)
                basis = torch.zeros(len(rows), size, dtype=like.dtype, device=like.device)
                basis[torch.arange(len(rows), device=like.device), rows] = 1
                parts.append(self.module(basis[None])[0].cpu())
        return torch.cat(parts).T


def find_projections(
    model: Any, layers: Mapping[int, AttentionLayer], tokens: npt.NDArray[np.int32]
) -> dict[int, Projected | str]:
    """What each layer's output projection made of some tokens (positions,), or why the layer has
    none."""
    calls: dict[torch.nn.Module, AttentionCall] = {}
    modules = {layer.module for layer in layers.values()}

    def note(call: AttentionCall) -> None:
        if call.module in modules:
            calls[call.module] = call

    watch = _Watch(calls)
    with (
        torch.inference_mode(),
        observed_attention(model, note),
        watch.hooked(layers.values()),
    ):
        batch = torch.from_numpy(tokens).long()[None].to(input_device(model))
        next(logits_in_blocks(model, batch, [torch.zeros(1, dtype=torch.long)]))
    paths = {module: path for path, module in model.named_modules()}
    return {
        index: watch.found(layer, calls[layer.module], paths) for index, layer in layers.items()
    }


class _Watch:
    """What modules within attention modules took and gave in one pass, if it was the attention
    output, and what the attention modules returned."""

    def __init__(self, calls: Mapping[torch.nn.Module, AttentionCall]) -> None:
        self._calls = calls
        self._gave: dict[torch.nn.Module, list[tuple[torch.nn.Module, Tensor]]] = {}
        self._returned: dict[torch.nn.Module, Tensor] = {}

    @contextlib.contextmanager
    def hooked(self, layers: Any) -> Iterator[None]:
        """Within this context every call is looked at."""
        hooks = []
        for layer in layers:
            for module in layer.module.modules():
                if module is layer.module:
                    hooks.append(module.register_forward_hook(self._note_returned))
                else:
                    hooks.append(module.register_forward_hook(self._noting(layer.module)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_returned(self, module: Any, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            self._returned[module] = output

    def _noting(self, attention: torch.nn.Module) -> Any:
        def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            call = self._calls.get(attention)
            if call is None or not inputs:
                return
            attended = call.output.flatten(-2)
            taken = inputs[0]
            if not isinstance(taken, Tensor) or not isinstance(output, Tensor):
                return
            if taken.dim() == 2:  # some modules take all positions as rows
                attended = attended.flatten(0, 1)
            if taken.shape == attended.shape and torch.equal(taken.to(attended.device), attended):
                self._gave.setdefault(attention, []).append((module, output))

        return note

    def found(
        self, layer: AttentionLayer, call: AttentionCall, paths: Mapping[torch.nn.Module, str]
    ) -> Projected | str:
        """The module that took the attention output as it was, and gave what was returned."""
        taken = self._gave.get(layer.module)
        if not taken:
            return "nothing in the attention module is given its output as it is, before it changes"
        returned = self._returned.get(layer.module)
        for module, output in taken:
            if returned is None or returned.numel() != output.numel():
                continue
            if torch.equal(returned.reshape(output.shape).to(output.device), output):
                rows = output.reshape(-1, output.shape[-1])
                return Projected(paths[module], module, call.output[0], rows)
        return f"what {type(taken[-1][0]).__name__} makes of it is not what is returned"
