"""Negative log-likelihoods and divergences, block by block, whatever the vocabulary's size."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from retrace.capture.model.logits import Decoding, logits_of_run

BLOCK_ELEMENTS = 1 << 26
"""Logits that are held at once: 256 MiB of float32."""


def next_token_nll(
    model: Any,
    tokens: Tensor,
    prompt: int | None = None,
    decoding: Decoding | None = None,
) -> Tensor:
    """Run the model; -log p(token[i + 1] | tokens[: i + 1]) as float32 (batch, positions) on the
    CPU, NaN at the last position.

    Args:
        model: a causal language model.
        tokens: (batch, positions), on the model's device.
        prompt: how many positions are read at once; those after are read one by one, with the
            keys and values before them in the model's cache. By default all are read at once.
        decoding: how the model reads one by one; as by transformers' `generate` by default.
    """
    return likelihoods(model, tokens, prompt, decoding=decoding)[0]


def likelihoods(
    model: Any,
    tokens: Tensor,
    prompt: int | None = None,
    exactly: Callable[[], AbstractContextManager[None]] | None = None,
    *,
    decoding: Decoding | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `next_token_nll` gives, and the Kullback-Leibler divergence of each next token's
    distribution from that of the exact model, in nats, like it; None without `exactly`, a context
    in which the model runs exactly."""
    batch, length = tokens.shape
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 1 << 17))
    rows = max(1, BLOCK_ELEMENTS // (batch * vocabulary))
    nll = torch.full((batch, length), torch.nan)
    kl = None if exactly is None else nll.clone()
    exact = logits_of_run(model, tokens, prompt or length, rows, decoding)
    for block, logits in logits_of_run(model, tokens, prompt or length, rows, decoding):
        predicting = block[block < length - 1]
        place = slice(int(block[0]), int(block[0]) + len(predicting))
        scores = logits[:, : len(predicting)].float()
        if exactly is not None and kl is not None:
            with exactly():
                expected = next(exact)[1][:, : len(predicting)].float()
            kl[:, place] = _divergence(expected, scores).cpu()
        if len(predicting):
            targets = tokens[:, predicting + 1].flatten().to(scores.device)
            loss = torch.nn.functional.cross_entropy(
                scores.flatten(0, 1), targets, reduction="none"
            )
            nll[:, place] = loss.view(batch, -1).cpu()
    return nll, kl


def _divergence(exact: Tensor, other: Tensor) -> Tensor:
    """sum p (log p - log q) over the vocabulary for logits (..., vocabulary) of p and of q."""
    log_p, log_q = exact.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
