"""Logits and negative log-likelihoods, block by block, whatever the size of the vocabulary."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

BLOCK_ELEMENTS = 1 << 26
"""Logits that are held at once: 256 MiB of float32."""


def next_token_nll(model: Any, tokens: Tensor, prompt: int | None = None) -> Tensor:
    """Run the model; -log p(token[i + 1] | tokens[: i + 1]) as float32 (batch, positions) on the
    CPU, NaN at the last position.

    Args:
        model: a causal language model.
        tokens: (batch, positions), on the model's device.
        prompt: how many positions are read at once; those after are read one by one, with the
            keys and values before them in the model's cache. By default all are read at once.
    """
    return likelihoods(model, tokens, prompt)[0]


def likelihoods(
    model: Any,
    tokens: Tensor,
    prompt: int | None = None,
    exactly: Callable[[], AbstractContextManager[None]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `next_token_nll` gives, and the Kullback-Leibler divergence of each next token's
    distribution from that of the exact model, in nats, like it; None without `exactly`, a context
    in which the model runs exactly."""
    batch, length = tokens.shape
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 1 << 17))
    rows = max(1, BLOCK_ELEMENTS // (batch * vocabulary))
    nll = torch.full((batch, length), torch.nan)
    kl = None if exactly is None else nll.clone()
    exact = _logits(model, tokens, prompt or length, rows)
    for block, logits in _logits(model, tokens, prompt or length, rows):
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


def _logits(model: Any, tokens: Tensor, prompt: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (rows,) and the logits there (batch, rows, vocabulary), in order."""
    # On the CPU, from where they index a tensor on any device: logits may be on one, tokens on
    # another.
    positions = torch.arange(tokens.shape[1])
    blocks = list(torch.split(positions[:prompt], rows))
    cache = new_cache(model) if prompt < len(positions) else None
    yield from zip(blocks, logits_in_blocks(model, tokens[:, :prompt], blocks, cache), strict=True)
    for step in (positions[i : i + 1] for i in range(prompt, len(positions))):
        yield step, model(input_ids=tokens[:, step], **cache_arguments(model, cache)).logits


def new_cache(model: Any) -> DynamicCache:
    """An empty cache of the model's keys and values."""
    return DynamicCache(config=model.config)


def cache_arguments(model: Any, cache: DynamicCache | None) -> dict[str, Any]:
    """How a call of the model is told to read and fill a cache, or to do without."""
    if cache is None:
        return {"use_cache": False}
    # Later releases of transformers call it by the first name, and warn of the second.
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {"use_cache": True, named: cache}


def logits_in_blocks(
    model: Any, tokens: Tensor, blocks: list[Tensor], cache: DynamicCache | None = None
) -> Iterator[Tensor]:
    """Run the model once; its logits (batch, rows, vocabulary) for each block of positions (rows,).

    The body of the model runs once. Its head runs for each block, with everything that the model
    does to logits besides: a model is asked again for other positions (`logits_to_keep`) while its
    body hands out the hidden states that it gave before. A `cache`, if there is one, is filled.
    """
    caching = cache_arguments(model, cache)
    body = model.base_model
    if body is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        logits = model(input_ids=tokens, **caching).logits
        yield from (logits[:, block] for block in blocks)
        return
    given: list[Any] = []
    hook = body.register_forward_hook(lambda module, inputs, output: given.append(output))
    try:
        logits = model(input_ids=tokens, **caching, logits_to_keep=blocks[0]).logits
    finally:
        hook.remove()
    yield logits
    for block in blocks[1:]:
        with _answering(body, given[0]):
            logits = model(input_ids=tokens, **caching, logits_to_keep=block).logits
        yield logits


@contextlib.contextmanager
def _answering(body: torch.nn.Module, output: Any) -> Iterator[None]:
    """`body` answers every call with `output`, and computes nothing."""
    before = body.__dict__.get("forward")
    body.forward = lambda *inputs, **options: output
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before
