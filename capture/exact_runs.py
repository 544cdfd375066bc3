"""The exact model's runs over sequences, each computed once however often it is asked for."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from retrace.capture.interface import exact_attention


class ExactRuns:
    """Remembers what the body of a model gives, which is a few hundred numbers a token; its head,
    which gives one for each of the vocabulary, runs every time."""

    def __init__(self, model: Any) -> None:
        self._body: nn.Module = model.base_model
        # Another model's body may be all of it, or hand out more than hidden states.
        self._separate = self._body is not model and (
            "logits_to_keep" in inspect.signature(model.forward).parameters
        )
        self._known: dict[int, list[Any]] = {}

    @contextmanager
    def of(self, sequence: int) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """A context in which the model runs exactly over a sequence, to be entered as often as its
        run is gone on with."""
        if not self._separate:
            yield exact_attention
            return
        outputs: list[Any] = []
        known = self._known.get(sequence)
        forward = self._body.forward

        def record(*inputs: Any, **options: Any) -> Any:
            outputs.append(_hidden_states(output := forward(*inputs, **options)))
            return output

        answers = iter(known or ())
        answer = record if known is None else lambda *inputs, **options: next(answers)

        @contextmanager
        def exactly() -> Iterator[None]:
            self._body.forward = answer
            try:
                with exact_attention():
                    yield
            finally:
                del self._body.forward

        yield exactly
        self._known[sequence] = known or outputs


def _hidden_states(output: Any) -> Any:
    """An output of a model's body without its cache."""
    return type(output)(last_hidden_state=output.last_hidden_state)
