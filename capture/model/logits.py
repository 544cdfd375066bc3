"""Logits of a model, block by block, over sequences that it reads at once or goes on with."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from retrace.capture.model.lengths import forget_lengths

CACHES = ("cache", "past_key_values", "cache_params")
"""What releases of transformers and models call the cache that is handed in and out."""


@dataclass(frozen=True)
class Decoding:
    """How a model is asked to go on with what it has read."""

    positions: bool
    """Whether it is told at which positions tokens are: some models count from 0 in every call."""
    own_cache: bool = False
    """Whether it makes its cache itself, and hands it out: some take no other."""

    @classmethod
    def ways(cls, model: Any) -> list["Decoding"]:
        """Those that there are for a model, that of transformers' `generate` first."""
        told = [True, False] if "position_ids" in _parameters(model) else [False]
        return [cls(positions, own) for positions in told for own in (False, True)]

    def __str__(self) -> str:
        cache = "a cache of its own" if self.own_cache else "transformers' cache"
        return f"with {cache}, {'told' if self.positions else 'counting'} positions"


class CachedRun:
    """A model that reads sequences, and goes on with them: what it has read is in its cache."""

    def __init__(self, model: Any, decoding: Decoding) -> None:
        self._model = model
        self._positions = decoding.positions
        self._length = 0
        self._options: dict[str, Any] = {"use_cache": True}
        if not decoding.own_cache:
            # Releases of transformers, and models, differ in what they call it.
            name = next((n for n in CACHES if n in _parameters(model)), CACHES[0])
            self._options[name] = DynamicCache(config=model.config.get_text_config(decoder=True))

    def read(self, tokens: Tensor, blocks: list[Tensor]) -> Iterator[Tensor]:
        """Begin with tokens (batch, positions); the logits (batch, rows, vocabulary) of each block
        of positions (rows,)."""
        options = self._options | self._places(tokens)
        yield from logits_in_blocks(self._model, tokens, blocks, options, self)

    def go_on(self, tokens: Tensor) -> Tensor:
        """Go on with tokens (batch, positions); their logits (batch, positions, vocabulary)."""
        output = self._model(input_ids=tokens, **self._options, **self._places(tokens))
        self.keep(output)
        logits: Tensor = output.logits
        return logits

    def keep(self, output: Any) -> None:
        """Take the cache from an output of the model, if it hands out one."""
        for name in CACHES:
            cache = getattr(output, name, None)
            if cache is not None:
                self._options[name] = cache
                return

    def _places(self, tokens: Tensor) -> dict[str, Tensor]:
        """The positions of what is read next, if the model is told."""
        start, self._length = self._length, self._length + tokens.shape[1]
        if not self._positions:
            return {}
        return {"position_ids": torch.arange(start, self._length, device=tokens.device)[None]}


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """What a call of a model takes, by name."""
    return inspect.signature(model.forward).parameters


def logits_of_run(
    model: Any, tokens: Tensor, prompt: int, rows: int, decoding: Decoding | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (rows,) and the logits there (batch, rows, vocabulary), in order.

    Args:
        model: a causal language model.
        tokens: (batch, positions), on the model's device.
        prompt: how many positions are read at once; those after are read one by one.
        rows: most positions of a block.
        decoding: how the model goes on one by one; as by transformers' `generate` by default.
    """
    # On the CPU, from where they index a tensor on any device: logits may be on one, tokens on
    # another.
    places = torch.arange(tokens.shape[1])
    blocks = list(torch.split(places[:prompt], rows))
    if prompt == len(places):
        yield from zip(blocks, logits_in_blocks(model, tokens, blocks), strict=True)
        return
    run = CachedRun(model, decoding or Decoding.ways(model)[0])
    yield from zip(blocks, run.read(tokens[:, :prompt], blocks), strict=True)
    for step in (places[i : i + 1] for i in range(prompt, len(places))):
        yield step, run.go_on(tokens[:, step])


def read_through(model: Any, tokens: Tensor, prompt: int, decoding: Decoding | None = None) -> None:
    """Run the model as `logits_of_run` does, for what it does besides giving logits."""
    last = [torch.tensor([prompt - 1])]
    if prompt == tokens.shape[1]:
        next(logits_in_blocks(model, tokens, last))
        return
    run = CachedRun(model, decoding or Decoding.ways(model)[0])
    next(run.read(tokens[:, :prompt], last))
    for step in range(prompt, tokens.shape[1]):
        run.go_on(tokens[:, step : step + 1])


def logits_in_blocks(
    model: Any,
    tokens: Tensor,
    blocks: list[Tensor],
    options: dict[str, Any] | None = None,
    run: CachedRun | None = None,
) -> Iterator[Tensor]:
    """Run the model once; its logits (batch, rows, vocabulary) for each block of positions (rows,).

    The body of the model runs once. Its head runs for each block, with everything that the model
    does to logits besides: a model is asked again for other positions (`logits_to_keep`) while its
    body hands out the hidden states that it gave before. A `run` keeps the cache; without one
    there is none.
    """
    forget_lengths(model)
    options = {"use_cache": False} if options is None else options
    keep: Callable[[Any], None] = (lambda output: None) if run is None else run.keep
    body = model.base_model
    if body is model or "logits_to_keep" not in _parameters(model):
        output = model(input_ids=tokens, **options)
        keep(output)
        yield from (output.logits[:, block] for block in blocks)
        return
    given: list[Any] = []
    hook = body.register_forward_hook(lambda module, inputs, output: given.append(output))
    try:
        output = model(input_ids=tokens, **options, logits_to_keep=blocks[0])
    finally:
        hook.remove()
    keep(output)
    yield output.logits
    for block in blocks[1:]:
        with _answering(body, given[0]):
            logits = model(input_ids=tokens, **options, logits_to_keep=block).logits
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
