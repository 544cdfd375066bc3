"""Self-checks: a trace is refused unless it explains what the model computed."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze.units.attention import attend
from retrace.capture.attention.interface import implementations, observed_attention
from retrace.capture.attention.projection import Projected, find_projections
from retrace.capture.attention.recorder import AttentionLayer, RulesObserver, dtype_of
from retrace.capture.attention.rotation import LayerInputs, learn_rotations
from retrace.capture.model.loading import input_device
from retrace.capture.model.logits import logits_in_blocks
from retrace.traces import LayerRules, OutputProjection, RetraceError, Trace, to_torch

OUTPUT_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Largest difference of a head's attention output, relative to the heads' typical norm."""
LOGIT_TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest difference of a position's logits, relative to their typical norm."""
PROBE_POSITIONS = 1024
PROBED_ROWS = 16


def rounding_type(model: Any, dtype: str) -> str:
    """The type whose rounding a model's logits show that computes in `dtype`: products of 8 bits
    (bitsandbytes) round what they multiply, whatever the type."""
    coarse = bool(getattr(model, "is_loaded_in_8bit", False))
    return "float16" if coarse and dtype in ("float32", "float64") else dtype


def examine(model: Any, tokens: npt.NDArray[np.int32]) -> dict[int, AttentionLayer]:
    """The model's attention layers, by index, as seen while it read `tokens` (positions,).

    Raises:
        RetraceError: a layer that no rules describe, or a model that gives other logits while it
            is observed than with its stock implementation.
    """
    tokens = tokens[: max(PROBE_POSITIONS, 2 * largest_window(model.config.get_text_config()))]
    batch = torch.from_numpy(tokens).long()[None].to(input_device(model))
    # On the CPU, from where they index a tensor on any device: logits may be on another.
    rows = torch.linspace(0, len(tokens) - 1, min(PROBED_ROWS, len(tokens))).long()
    observer = RulesObserver()
    with torch.inference_mode():
        with observed_attention(model, observer), _explained(model):
            observed = next(logits_in_blocks(model, batch, [rows]))
        layers = observer.layers(model)
        del observer  # with every tensor of the pass
        inputs = LayerInputs()
        with inputs.noted(layers.values()):
            stock = _stock_logits(model, batch, rows, layers)
    worst = _relative_difference(observed[0].cpu().double(), stock[0].cpu().double())
    if not worst <= LOGIT_TOLERANCE[dtype_of(layers)]:  # so written that NaN is refused as well
        raise RetraceError(
            f"{model.config.model_type} computes other logits while it is recorded (relative "
            f"difference {worst:.2g}): its attention depends on the implementation, so that this "
            "model cannot be captured."
        )
    with torch.inference_mode():
        return learn_rotations(model, layers, inputs)


@contextlib.contextmanager
def _explained(model: Any) -> Iterator[None]:
    """Whatever a model raises that does not run on token ids alone, as one line."""
    try:
        yield
    except (RetraceError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RetraceError(
            f"{model.config.model_type} does not read token ids alone, and so cannot be captured "
            f"({told})."
        ) from error


def examine_projections(
    model: Any, layers: Mapping[int, AttentionLayer], tokens: npt.NDArray[np.int32]
) -> dict[int, OutputProjection | str]:
    """Each layer's output projection, or why a trace leaves it out: because more is done to the
    attention output than a multiplication, or because its weights do not give what the attention
    module returned while it read `tokens` (positions,)."""
    dtype = dtype_of(layers)
    projections: dict[int, OutputProjection | str] = {}
    for index, found in find_projections(model, layers, tokens[:PROBED_ROWS]).items():
        projection = found if isinstance(found, str) else found.stored(dtype)
        if isinstance(found, Projected) and isinstance(projection, OutputProjection):
            projection = _unexplained(found, layers[index].dtype) or projection
        projections[index] = projection
    return projections


def _unexplained(found: Projected, dtype: torch.dtype) -> str | None:
    """Why a projection is left out of a trace of a type: what its weights and bias make of what it
    was given is not what it gave. None where it is."""
    dtype = torch.promote_types(dtype, torch.float32)
    try:
        weights = found.weights().to(dtype)
    except Exception as error:
        # Whatever a module needs to be called: a trace is complete without its weights.
        return f"its weights cannot be read ({type(error).__name__})"
    output = torch.einsum("ohc,phc->po", weights, found.attended.cpu().to(dtype))
    if found.bias is not None:
        output += found.bias.detach().cpu().to(dtype)
    worst = _relative_difference(output.double(), found.output.cpu().double())
    if worst <= OUTPUT_TOLERANCE[str(found.attended.dtype).removeprefix("torch.")]:
        return None
    return f"its weights do not give what it gave (relatively {worst:.2g} off)"


def sampled_positions(
    kept: npt.NDArray[np.int32], layers: Mapping[int, AttentionLayer]
) -> npt.NDArray[np.int32]:
    """Positions (queries,) to check, out of those kept (queries,): the first two, the middle, the
    last, and those where a window or chunk begins to hide keys."""
    wanted = {int(kept[i]) for i in (0, min(1, len(kept) - 1), len(kept) // 2, -1)}
    for layer in layers.values():
        for extent in (layer.rules.window, layer.rules.chunk):
            if extent is not None:
                wanted |= {extent - 1, extent, extent + 1}
    return np.array(sorted(wanted & set(kept.tolist())), np.int32)


def check_stored(
    trace: Trace,
    sequence: int,
    positions: npt.NDArray[np.int32],
    outputs: Mapping[int, npt.NDArray[np.float64]],
) -> None:
    """Recompute attention from what the trace holds, in float64, and compare it with the model's.

    Args:
        trace: to read from.
        sequence: to check.
        positions: of the queries to check (queries,).
        outputs: the model's own attention output (queries, heads, value channels), by layer.

    Raises:
        RetraceError: a layer whose stored tensors and rules give another output.
    """
    tolerance = OUTPUT_TOLERANCE[trace.attributes["dtype"]]
    rows = np.searchsorted(trace.query_positions(sequence), positions)
    for index, expected in outputs.items():
        rules = trace.layer(index).rules
        found = _recompute(trace, sequence, index, rows, torch.from_numpy(positions).long())
        # Of each query by itself, since the norms of outputs differ widely along a sequence.
        pairs = zip(found, torch.from_numpy(expected), strict=True)
        worst = float(np.max([_relative_difference(f, e) for f, e in pairs]))
        if not worst <= tolerance:  # so written that NaN is refused as well
            raise RetraceError(
                f"Layer {index} ({rules.module}): its stored queries, keys and values do not give "
                f"the model's attention output (relative difference {worst:.2g}, allowed "
                f"{tolerance:g}): this model cannot be captured."
            )


def _recompute(
    trace: Trace, sequence: int, index: int, rows: npt.NDArray[np.intp], positions: Tensor
) -> Tensor:
    """Attention output (queries, heads, value channels) of the stored queries in `rows`."""
    layer = trace.layer(index)
    rules: LayerRules = layer.rules
    outputs = []
    for kv_head in range(rules.kv_heads):
        one = slice(kv_head, kv_head + 1)
        heads = slice(kv_head * rules.group, (kv_head + 1) * rules.group)
        sinks = None
        if rules.sinks is not None:
            sinks = torch.tensor(rules.sinks[heads], dtype=torch.float64)
        chosen = None
        if rules.indexer is not None:
            own = slice(kv_head, kv_head + 1) if rules.indexer.groups > 1 else slice(0, 1)
            chosen = torch.from_numpy(layer.selected(sequence, own)[0, rows]).long()
        output = attend(
            to_torch(layer.query(sequence, heads)[:, rows]).double(),
            to_torch(layer.key(sequence, one)[0]).double(),
            to_torch(layer.value(sequence, one)[0]).double(),
            positions,
            rules,
            sinks,
            chosen,
        )
        outputs.append(output)
    return torch.cat(outputs).transpose(0, 1)


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a vector (vectors, channels), relative to the vectors' typical norm.

    NaN where there is one in either; relative to the typical norm, since one vector may be zero.
    """
    typical = expected.norm(dim=-1).square().mean().sqrt()
    difference = (found - expected).norm(dim=-1).max()
    return float(difference / typical) if difference != 0 else 0.0


def _stock_logits(
    model: Any, tokens: Tensor, rows: Tensor, layers: Mapping[int, AttentionLayer]
) -> Tensor:
    """Logits (1, rows, vocabulary) at these positions (rows,), by the plain public call."""
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = rows
    before = implementations(model.config)
    if any(one.rules.softcap or one.rules.sinks for one in layers.values()):
        # Some versions of transformers run such models on a kernel that leaves both out.
        model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=tokens, use_cache=False, **options).logits
    finally:
        model.set_attn_implementation(before)
    return logits if options else logits[:, rows]


def largest_window(config: Any) -> int:
    """The largest window or chunk that the configuration names; 0 if none."""
    names = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
    extents = [getattr(config, name, None) for name in names]
    return max((extent for extent in extents if isinstance(extent, int)), default=0)
