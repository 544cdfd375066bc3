"""`record`: what one's own code runs a model on, as a trace."""

import contextlib
import dataclasses
import datetime
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrace.capture.attention.interface import NAME, observed_attention
from retrace.capture.attention.recorder import AttentionLayer, dtype_of
from retrace.capture.checks.trace import (
    check_stored,
    examine,
    examine_projections,
    largest_window,
)
from retrace.capture.model.lengths import longest_context
from retrace.capture.recording.identity import weights_digest
from retrace.capture.recording.live import LivePasses
from retrace.capture.recording.plan import CapturePlan, chosen_layers, model_attributes
from retrace.capture.recording.queue import WriteQueue
from retrace.capture.recording.spool import Spool
from retrace.traces import Location, OutputProjection, RetraceError, Trace, locate, open_trace
from retrace.traces.output import Output
from retrace.traces.queries import QuerySelection, parse_queries
from retrace.traces.storage.lock import locked

log = logging.getLogger("retrace")

EXAMINED_POSITIONS = 256
"""Positions of the pass by which a model's layers are learned; more where a window is larger."""


class Recording:
    """What `record` hands out: how far it has come, and in the end the trace."""

    def __init__(self, passes: LivePasses) -> None:
        self._passes = passes
        self._trace: Trace | None = None

    @property
    def sequences(self) -> int:
        """Sequences that were begun so far."""
        return sum(bool(one.tokens) for one in self._passes.sequences.values())

    @property
    def tokens(self) -> int:
        """Tokens that were read or generated so far, padding excluded."""
        return sum(len(one.tokens) for one in self._passes.sequences.values())

    @property
    def trace(self) -> Trace:
        """The finished trace.

        Raises:
            RetraceError: the recording is not over.
        """
        if self._trace is None:
            raise RetraceError("The trace is there when the recording is over: leave its context.")
        return self._trace


@contextlib.contextmanager
def record(
    model: Any,
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    queries: str = "all",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Iterator[Recording]:
    """Record every sequence that a model reads within this context, whoever runs it.

        with record(model, "chat.zarr", queries="last:256") as recording:
            model.generate(**inputs, max_new_tokens=100)
        recording.trace

    A forward pass without a cache, or with an empty one, begins a sequence for each row of its
    batch; one with a cache goes on with those whose cache it is. The attention mask tells padding,
    on either side. A single token that goes on with a cache is of the phase `generated`, all else
    is `context`. Likelihoods are kept where the model gave logits. What is recorded is held in
    memory, and from 1 GiB on in files beside `out`, until the context is left: then the trace is
    written. After an error of one's own code it is written too, if nothing was there before, and
    the error goes on. The model is as it was before, in any case.

    Keys and values are those that attention saw when their token was read: what a quantised cache
    makes of them afterwards is not in the trace, though later queries depend on it.

    Args:
        model: a causal language model of transformers, loaded in whatever way; of an adapter of
            PEFT either the adapter or what it is on.
        out: where the trace goes, a path or a URL.
        layers: which to record; all of them by default.
        queries: which to keep: `all`, `last:N` or `stride:N`, as for `capture`.
        tokenizer: the model's, to be named in the trace.
        overwrite: whether to replace an existing trace.

    Raises:
        RetraceError: the model, or what is done with it, cannot be recorded; nothing was.
    """
    model = _own_model(model)
    selection = parse_queries(queries)
    path = locate(out)
    with locked(path):
        output = Output(path, overwrite=overwrite, resume=False)
        there_before = path.exists()
        tokens = _some_tokens(model)
        found = examine(model, tokens)
        chosen = chosen_layers(found, layers, type(model).__name__)
        projections = examine_projections(model, chosen, tokens)
        spool = Spool(_spool_folder(path))
        passes = LivePasses(model, found, list(chosen), selection, spool)
        recording = Recording(passes)
        try:
            try:
                with _watched(model, passes):
                    yield recording
            except RetraceError:
                raise  # what is recorded wrongly is not kept
            except BaseException:
                if recording.sequences and not there_before:
                    _write(model, chosen, projections, passes, selection, tokenizer, output)
                    log.warning("What was recorded until then is in %s.", path)
                raise
            recording._trace = _write(
                model, chosen, projections, passes, selection, tokenizer, output
            )
        finally:
            spool.remove()


def _own_model(model: Any) -> Any:
    """The model whose forward passes are followed."""
    base = getattr(model, "get_base_model", None)
    if hasattr(model, "peft_config") and base is not None:
        model = base()  # which an adapter's `generate` calls as well
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or getattr(
        model, "_compiled_call_impl", None
    ):
        raise RetraceError(
            "The model is compiled (torch.compile), and its attention cannot be seen: record the "
            "model that was compiled."
        )
    if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
        raise RetraceError(f"{type(model).__name__} is no model of transformers.")
    if model.config._attn_implementation == NAME:
        raise RetraceError("The model is being recorded already.")
    if model.training:
        raise RetraceError("The model is in training mode: call model.eval() first.")
    return model


def _some_tokens(model: Any) -> Any:
    """Tokens (positions,) that show a model's windows; any will do."""
    config = model.config.get_text_config()
    window = largest_window(config)
    length = max(EXAMINED_POSITIONS, window + EXAMINED_POSITIONS if window else 0)
    length = min(length, longest_context(config) or length)
    known = int(model.get_input_embeddings().weight.shape[0])
    return np.random.default_rng(0).integers(0, known, length).astype(np.int32)


@contextlib.contextmanager
def _watched(model: Any, passes: LivePasses) -> Iterator[None]:
    with observed_attention(model, passes):
        hooks = passes.hooks()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            passes.give_up()


def _spool_folder(path: Location) -> Path:
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.recording-", dir=path.parent))
    return Path(tempfile.mkdtemp(prefix="retrace-recording-"))


def _write(
    model: Any,
    layers: dict[int, AttentionLayer],
    projections: dict[int, OutputProjection | str],
    passes: LivePasses,
    selection: QuerySelection,
    tokenizer: Any,
    output: Output,
) -> Trace:
    """The trace of what was recorded."""
    numbers = [number for number, one in passes.sequences.items() if one.tokens]
    if not numbers:
        raise RetraceError(
            "Nothing was recorded: the model was not called within the context of the recording."
        )
    known = [passes.sequences[number] for number in numbers]
    rules = {index: layer.rules for index, layer in layers.items()}
    if passes.shifted:  # by how much each key was turned is not its position
        rules = {index: dataclasses.replace(one, rotation=None) for index, one in rules.items()}
    kept = [selection.positions(len(one.tokens), one.prompt) for one in known]
    nll = [np.array([*one.nll, np.nan], np.float32) for one in known]
    plan = CapturePlan(
        rules=rules,
        projections=projections,
        tokens=[np.array(one.tokens, np.int32) for one in known],
        phases=[np.array(one.phases, np.int8) for one in known],
        query_positions=kept,
        marks=[{} for _ in known],
        dtype=dtype_of(layers),
        attributes=_attributes(model, layers, passes, known, tokenizer, selection),
        writing=None,
    )
    output.clear()
    output.check_space(plan.bytes())
    writer = plan.open(output)
    with WriteQueue(writer) as queue:
        for sequence, number in enumerate(numbers):
            rows = torch.from_numpy(np.searchsorted(known[sequence].queries, kept[sequence]))
            for index, layer in layers.items():
                names = ["query", "key", "value"]
                names += [] if layer.rules.indexer is None else ["selected"]
                tensors = {name: passes.tensor(number, index, name) for name in names}
                for name in {"query", "selected"} & tensors.keys():
                    tensors[name] = tensors[name][:, rows]
                queue.write_layer(sequence, index, tensors)
            queue.finish_sequence(sequence, nll[sequence])
    writer.close()
    _check(open_trace(output.writing), passes, kept[0])
    output.complete()
    return open_trace(output.path)


def _check(trace: Trace, passes: LivePasses, kept: Any) -> None:
    """Recompute some of the first sequence's attention from what the trace holds."""
    if 0 not in passes.sequences or not passes.sampled:
        return
    sampled = np.array(passes.sampled, np.int32)
    there = np.isin(sampled, kept)
    outputs = {index: np.concatenate(parts)[there] for index, parts in passes.outputs.items()}
    check_stored(trace, 0, sampled[there], outputs)


def _attributes(
    model: Any,
    layers: dict[int, AttentionLayer],
    passes: LivePasses,
    known: Sequence[Any],
    tokenizer: Any,
    selection: QuerySelection,
) -> dict[str, Any]:
    """The trace's attributes."""
    config = model.config
    bos = getattr(tokenizer, "bos_token_id", None)
    starts = bos is not None and all(one.tokens[0] == bos for one in known)
    partial = any(np.isnan(one.nll).any() for one in known)
    return (
        model_attributes(
            model,
            passes.layers,
            weights_digest(model),
            pretrained=str(getattr(config, "_name_or_path", "") or type(model).__name__),
            revision=getattr(config, "_commit_hash", None),
        )
        | {
            "tokenizer": {
                "class": None if tokenizer is None else type(tokenizer).__name__,
                "vocabulary": None if tokenizer is None else len(tokenizer),
                "starts_with_bos": starts,
            },
            "task": [{"task": "recorded", "source": "code", "sequences": len(known)}],
            "capture": {
                "limit": None,
                "max_length": max(len(one.tokens) for one in known),
                "layers": sorted(layers),
                "queries": str(selection),
                "recorded": True,
                "caches": sorted(passes.caches),
                "shifted_positions": passes.shifted,
            },
            "batch_size": 1,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        | ({"likelihoods": "partial"} if partial else {})
    )
