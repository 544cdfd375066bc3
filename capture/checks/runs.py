"""Self-checks of how a model is run: decoding, batches and a method in the loop must give what one
pass over a sequence by itself gives.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.replay.approximation import Approximation
from retrace.capture.attention.interface import exact_attention, observed_attention
from retrace.capture.attention.recorder import AttentionLayer, dtype_of
from retrace.capture.checks.trace import (
    LOGIT_TOLERANCE,
    PROBE_POSITIONS,
    largest_window,
    rounding_type,
)
from retrace.capture.loop.approximate import Approximator
from retrace.capture.loop.exact_runs import ExactRuns
from retrace.capture.model.lengths import LengthDependence
from retrace.capture.model.likelihood import next_token_nll
from retrace.capture.model.loading import input_device
from retrace.capture.model.logits import Decoding, logits_in_blocks, logits_of_run
from retrace.traces import PHASES, RetraceError, prompts

log = logging.getLogger("retrace")

Tokens = npt.NDArray[np.int32]
STEPS = 8
"""Decoding steps that are compared. What is wrong with a run is wrong in most of them, while
rounding may send single tokens to other experts: medians are compared."""
SAMPLED_ROWS = 16
"""Positions of a sequence in a batch whose logits are compared."""
LOOP_POSITIONS = 256
"""Positions that are read with a method in the loop, to compare."""
NLL_TOLERANCE = {"float64": 1e-4, "float32": 1e-2, "float16": 1e-1, "bfloat16": 5e-1}
"""Largest median difference, over consecutive steps, of negative log-likelihoods, in nats."""


def check_decoding(
    model: Any,
    tokens: Sequence[Tokens],
    phases: Sequence[npt.NDArray[np.int8]],
    generate: int,
    dtype: str,
    most: int,
) -> Decoding:
    """How a model is to decode.

    Args:
        model: a causal language model.
        tokens: token ids (positions,) of each sequence.
        phases: what each position (positions,) of each sequence is.
        generate: by how many tokens sequences that end in a prompt are to be continued.
        dtype: that the model computes in.
        most: positions that it reads at most.

    Raises:
        RetraceError: it cannot decode these, or not as one pass over them would have it.
    """
    spans = []
    for ids, phase, prompt in zip(tokens, phases, prompts(phases), strict=True):
        more = generate if phase[-1] == PHASES["context"] else 0
        spans.append((len(ids) if prompt is None else prompt, len(ids) + more))
    if all(start == end for start, end in spans):
        return Decoding.ways(model)[0]
    check_lengths(model, spans)
    longest = max(tokens, key=len)
    return find_decoding(model, np.resize(longest, min(len(longest) + generate, most)), dtype)


def check_lengths(model: Any, spans: Sequence[tuple[int, int]]) -> None:
    """Refuse sequences that grow past a length at which the model's rotary frequencies change.

    Keys in the cache have other frequencies than the queries that meet them there, or transformers
    throws the cache away and computes all keys anew. A trace holds one key for each position.

    Args:
        model: a causal language model.
        spans: positions of each sequence that are read at once, and positions at its end.
    """
    dependence = LengthDependence.of(model.config.get_text_config())
    for prompt, end in spans:
        length = dependence.change(prompt, end)
        if length is not None:
            raise RetraceError(
                f"The rotary frequencies of {model.config.model_type} change past {length} "
                f"positions, and a sequence would grow from {prompt} to {end} by decoding: its "
                "keys would not stay as they were. Choose another max_length or generate, or "
                "capture without generate."
            )


def find_decoding(model: Any, tokens: Tokens, dtype: str) -> Decoding:
    """The first way of decoding that gives the logits of one pass over the tokens (positions,).

    Raises:
        RetraceError: there is none.
    """
    most = max(PROBE_POSITIONS, 2 * largest_window(model.config.get_text_config()))
    batch, prompt = _probe(model, tokens, most)
    allowed = LOGIT_TOLERANCE[rounding_type(model, dtype)]
    failures = []
    with torch.inference_mode(), observed_attention(model, lambda call: None):
        expected = _one_pass(model, batch, prompt)
        for decoding in Decoding.ways(model):
            try:
                run = logits_of_run(model, batch, prompt, prompt, decoding)
                found = torch.cat([logits[0] for _, logits in run])[prompt:]
            except (RetraceError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever a model raises that cannot use its cache so
                failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            apart = typical_difference(found, expected)
            if apart <= allowed:
                if failures:
                    log.info("%s decodes %s.", model.config.model_type, decoding)
                return decoding
            failures.append(f"relative difference {apart:.2g}, allowed {allowed:g}")
    raise RetraceError(
        f"{model.config.model_type} gives other logits when it decodes than in one pass over the "
        f"same tokens ({failures[0]}): it can only be captured without generate."
    )


def check_decoded(
    model: Any, tokens: Tokens, nll: npt.NDArray[np.float32], prompt: int, dtype: str
) -> None:
    """Compare the likelihoods of a sequence (positions,), of which all that follows the prompt was
    decoded, with those of one pass over it; within `observed_attention`.

    Raises:
        RetraceError: they differ beyond rounding.
    """
    with exact_attention():
        expected = next_token_nll(model, _batch(model, tokens))[0].numpy()
    apart = np.abs(nll - expected)[prompt - 1 : -1]
    starts = range(0, max(1, len(apart) - STEPS + 1), STEPS // 2)
    worst = float(np.max([np.median(apart[start : start + STEPS]) for start in starts]))
    allowed = NLL_TOLERANCE[rounding_type(model, dtype)]
    if not worst <= allowed:  # so written that NaN is refused as well
        raise RetraceError(
            f"{model.config.model_type} gives other likelihoods when it decodes its first sequence "
            f"than in one pass over it ({worst:.2g} nats apart, allowed {allowed:g}): "
            "it can only be captured without generate."
        )


def check_batch(model: Any, sequences: Sequence[Tokens], dtype: str) -> None:
    """Compare the shortest of some sequences that are to share a batch, read beside the longest,
    with itself read alone.

    Raises:
        RetraceError: its logits depend on what it shares the batch with.
    """
    short, long = min(sequences, key=len), max(sequences, key=len)
    rows = torch.linspace(0, len(short) - 1, min(SAMPLED_ROWS, len(short))).long()
    both = np.zeros((2, len(long)), np.int64)
    both[0, : len(short)], both[1] = short, long
    together = torch.from_numpy(both).to(input_device(model))
    with torch.inference_mode(), observed_attention(model, lambda call: None):
        alone = next(logits_in_blocks(model, _batch(model, short), [rows]))[0]
        shared = next(logits_in_blocks(model, together, [rows]))[0]
    apart = typical_difference(shared, alone)
    allowed = LOGIT_TOLERANCE[rounding_type(model, dtype)]
    if not apart <= allowed:
        raise RetraceError(
            f"{model.config.model_type} gives a sequence of {len(short)} tokens other logits when "
            f"it shares a batch with one of {len(long)} (relative difference {apart:.2g}, allowed "
            f"{allowed:g}): use --batch-size 1."
        )


def check_loop(
    model: Any,
    layers: Mapping[int, AttentionLayer],
    tokens: Tokens,
    *,
    decoding: Decoding | None,
) -> None:
    """Run a model with a method in the loop that attends everything: it must be the exact model.

    Args:
        model: a causal language model.
        layers: its attention layers.
        tokens: (positions,), the first of which are read.
        decoding: how the last of those are read one by one, if they are.

    Raises:
        RetraceError: its logits differ from the exact model's, or the exact model's from its own.
    """
    allowed = LOGIT_TOLERANCE[rounding_type(model, dtype_of(layers))]
    batch, prompt = _probe(model, tokens, LOOP_POSITIONS)
    length = batch.shape[1]
    # A natively sparse model attends to what it chooses.
    chooses = any(layer.rules.indexer is not None for layer in layers.values())
    everything = Approximation(parse_spec("native" if chooses else "exact"), length)
    approximator = Approximator(everything, layers)
    read = length if decoding is None else prompt
    runs: tuple[list[Tensor], list[Tensor]] = [], []
    with torch.inference_mode(), observed_attention(model, lambda call: None, approximator):
        with exact_attention():
            expected = _one_pass(model, batch, prompt)
        with ExactRuns(model).of(0, batch, read, decoding) as exactly:
            approximator.start([0], None if decoding is None else prompt)
            exact = logits_of_run(model, batch, read, read, decoding)
            for _, logits in logits_of_run(model, batch, read, read, decoding):
                runs[0].append(logits[0])
                with exactly():
                    runs[1].append(next(exact)[1][0])
    apart = [typical_difference(torch.cat(run)[prompt:], expected) for run in runs]
    worst = float(np.max(apart))
    if not worst <= allowed:
        raise RetraceError(
            f"{model.config.model_type} cannot run with a method in the loop"
            f"{'' if decoding is None else ' while it decodes'}: its logits change though all keys "
            f"are attended (relative difference {worst:.2g}, allowed {allowed:g}). "
            "A model may keep what it has read outside its cache, where runs mix."
        )


def typical_difference(found: Tensor, expected: Tensor) -> float:
    """Median difference of a position's logits (positions, vocabulary), relative to their typical
    norm; NaN where there is one in either."""
    if not len(expected):
        return 0.0
    found, expected = found.double(), expected.double()
    typical = expected.norm(dim=-1).square().mean().sqrt()
    difference = (found - expected).norm(dim=-1)
    if bool(difference.isnan().any()):
        return float("nan")
    return float(difference.median() / typical) if difference.any() else 0.0


def _probe(model: Any, tokens: Tokens, most: int) -> tuple[Tensor, int]:
    """The first `most` tokens (1, positions) or fewer, and how many precede the last steps: so few
    that the rotary frequencies do not change in between."""
    dependence = LengthDependence.of(model.config.get_text_config())
    length = min(len(tokens), most)
    while (change := dependence.change(max(1, length - STEPS), length)) is not None:
        length = change
    return _batch(model, tokens[:length]), max(1, length - STEPS)


def _one_pass(model: Any, batch: Tensor, start: int) -> Tensor:
    """Logits (positions, vocabulary) from position `start` on, of one pass over a sequence."""
    rows = torch.arange(start, batch.shape[1])
    return next(logits_in_blocks(model, batch, [rows]))[0]


def _batch(model: Any, tokens: Tokens) -> Tensor:
    """One sequence of tokens (1, positions) on the model's device."""
    return torch.from_numpy(tokens).long()[None].to(input_device(model))
