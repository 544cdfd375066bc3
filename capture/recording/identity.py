"""Which model it is: a digest of its weights, and whether a trace was captured with it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.replay.approximation import is_approximate, model_weights, transformers_release
from retrace.capture.attention.interface import observed_attention
from retrace.capture.model.likelihood import next_token_nll
from retrace.capture.model.loading import input_device
from retrace.capture.model.placement import weights_at_hand
from retrace.traces import PHASES, RetraceError, Trace

CHUNK_WORDS = 1 << 15
"""64-bit words that are summed at once: what fits into a processor's cache, and what PyTorch does
in one thread, since threads that wait for each other take longer on a busy machine."""

LIKELIHOOD_TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest mean distance of a sequence's negative log-likelihoods, in nats, that another device or
library may make."""


def check_same_model(trace: Trace, model: Any, weights: str, name: str) -> None:
    """Refuse a model that a trace was not captured with: one of other weights, or one that gives
    the trace's longest sequence another likelihood, as another configuration does.

    Traces of earlier versions do not name their weights, and another release of transformers may
    lay the same weights out otherwise: there the likelihood alone tells.

    Args:
        trace: captured with the model, it is said.
        model: as it was loaded.
        weights: its digest.
        name: what the user calls it.

    Raises:
        RetraceError: it is another one.
    """
    known = model_weights(trace)
    dtype, before = str(model.dtype).removeprefix("torch."), trace.attributes["dtype"]
    if known not in (None, weights) and dtype != before:
        cause = f"it computes in {dtype}, and there it did so in {before} (--dtype)"
    elif known not in (None, weights) and transformers_release(trace) == version("transformers"):
        cause = f"its weights are others (digest {weights[:8]}, and {str(known)[:8]} there)"
    else:
        distance = _likelihood_distance(trace, model)
        if distance is None or distance <= LIKELIHOOD_TOLERANCE[before]:
            return
        cause = f"its likelihoods are others, by {distance:.2g} nats per token"
    raise RetraceError(
        f"The model at {name} is not the one that {trace.path} was captured with: {cause}. Put "
        "that one back, or capture the text anew."
    )


def _likelihood_distance(trace: Trace, model: Any) -> float | None:
    """Mean distance of the model's negative log-likelihoods from the trace's, in nats, over what is
    read at once of the sequence with most of it; None where there is nothing to compare."""
    if is_approximate(trace):
        return None  # the likelihoods are those of a method
    lengths = {s: int((trace.phase(s) != PHASES["generated"]).sum()) for s in trace.sequences}
    sequence = max(lengths, key=lambda s: lengths[s], default=None)
    if sequence is None or lengths[sequence] < 2:
        return None
    tokens = torch.from_numpy(trace.tokens(sequence)[: lengths[sequence]]).long()[None]
    # As it was captured: the stock implementation may leave softcaps and sinks out.
    with torch.inference_mode(), observed_attention(model, lambda call: None):
        found = next_token_nll(model, tokens.to(input_device(model)))[0, :-1].double().numpy()
    expected = trace.nll(sequence)[: len(found)].astype(np.float64)
    if trace.attributes.get("likelihoods") == "partial":
        known = ~np.isnan(expected)
        if not known.any():
            return None
        found, expected = found[known], expected[known]
    distance = float(np.abs(found - expected).mean())
    return float("inf") if np.isnan(distance) else distance


def weights_digest(model: torch.nn.Module) -> str:
    """Names a model's weights: 32 hex digits that change with any name, dtype, shape or bit of its
    parameters and persistent buffers, quantised or not, on a device or kept elsewhere meanwhile.

    What is computed from the configuration (rotary frequencies, say) is none of them. The digest is
    the same on every device and for any number of threads: sums of integers modulo 2^64, each chunk
    of a tensor times fixed odd numbers, so that no word may change alone and none may trade places.
    """
    described: dict[str, list[Any]] = {}
    factors: dict[torch.device, Tensor] = {}

    def describe(state: Mapping[str, Any]) -> None:
        """Describe what of a state is at hand."""
        known: dict[Any, list[int]] = {}
        for name, value in state.items():
            parts = list(_plain_tensors(name, value))
            if name in described or any(tensor.is_meta for _, tensor in parts):
                continue
            described[name] = []
            for part, tensor in parts:
                # Tied weights are one tensor of two names.
                place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
                if place not in known:
                    if tensor.device not in factors:
                        factors[tensor.device] = _odd_numbers(tensor.device)
                    known[place] = _checksums(tensor, factors[tensor.device])
                described[name].append([part, str(tensor.dtype), list(tensor.shape), known[place]])

    everything = model.state_dict(keep_vars=True)
    describe(everything)
    for path, module in model.named_modules():
        with weights_at_hand(module) as brought:
            if brought:
                describe(module.state_dict(prefix=f"{path}." if path else "", keep_vars=True))
    nowhere = everything.keys() - described.keys()
    if nowhere:
        raise RetraceError(f"The model's weights are not loaded: {min(nowhere)} is on no device.")
    listed = [part for name in sorted(described) for part in described[name]]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


def _plain_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a weight is made of: itself, or the parts of a quantised one."""
    if not isinstance(value, Tensor):
        return  # what a module says of itself beside its weights
    if hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{part}", getattr(value, part))
    else:
        yield name, value.detach()


def _odd_numbers(device: torch.device) -> Tensor:
    """Fixed odd numbers (`CHUNK_WORDS`,) without order, int64: a mixed count, as in splitmix64."""
    mixed = torch.arange(1, CHUNK_WORDS + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed | 1


def _checksums(tensor: Tensor, factors: Tensor) -> list[int]:
    """A checksum of each chunk of a tensor's bytes, and one of those that fill no word."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # words are read from where one can begin
    whole = len(data) // 8 * 8
    rest = torch.zeros(8, dtype=torch.uint8, device=data.device)
    rest[: len(data) - whole] = data[whole:]
    words = data[:whole].view(torch.int64)
    chunks = [words[start : start + CHUNK_WORDS] for start in range(0, len(words), CHUNK_WORDS)]
    chunks.append(rest.view(torch.int64))
    sums: list[int] = torch.stack([(c * factors[: len(c)]).sum() for c in chunks]).tolist()
    return sums
