"""The exact model's runs over sequences, beside those with a method in the loop."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from retrace.capture.attention.interface import exact_attention
from retrace.capture.model.logits import Decoding, read_through


class ExactRuns:
    """Runs the exact model over each sequence once, before the method's run begins, and remembers
    what its body gives, a few hundred numbers a token; its head, which gives one for each of the
    vocabulary, runs as often as it is asked for.

    Two runs in turns would mix in models that keep what they have read in their modules.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._body: nn.Module = model.base_model
        # Another model's body may be all of it, or hand out more than hidden states.
        self._separate = self._body is not model and (
            "logits_to_keep" in inspect.signature(model.forward).parameters
        )
        self._known: dict[int, list[Any]] = {}

    @contextmanager
    def of(
        self,
        sequence: int,
        tokens: Tensor,
        prompt: int | None = None,
        decoding: Decoding | None = None,
    ) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """A context in which the model runs exactly, to be entered as often as its run is gone on
        with; within `observed_attention`.

        Args:
            sequence: what the run is remembered by.
            tokens: (batch, positions), on the model's device.
            prompt: how many positions are read at once; all by default.
            decoding: how those after are read.
        """
        if not self._separate:
            yield exact_attention
            return
        if sequence not in self._known:
            self._known[sequence] = self._run(tokens, prompt, decoding)
        answers = iter(self._known[sequence])

        @contextmanager
        def exactly() -> Iterator[None]:
            with self._replaced(lambda *inputs, **options: next(answers)), exact_attention():
                yield

        yield exactly

    def _run(self, tokens: Tensor, prompt: int | None, decoding: Decoding | None) -> list[Any]:
        """What the body gives in each call of a run."""
        outputs: list[Any] = []
        forward = self._body.forward

        def record(*inputs: Any, **options: Any) -> Any:
            outputs.append(_hidden_states(output := forward(*inputs, **options)))
            return output

        with self._replaced(record), exact_attention():
            read_through(self._model, tokens, prompt or tokens.shape[1], decoding)
        return outputs

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """The body answers by `forward`."""
        own = self._body.__dict__.get("forward")  # that of a hook, where the body is dispatched
        self._body.forward = forward
        try:
            yield
        finally:
            del self._body.forward
            if own is not None:
                self._body.forward = own


def _hidden_states(output: Any) -> Any:
    """An output of a model's body without its cache."""
    return type(output)(last_hidden_state=output.last_hidden_state)
