"""What a model writes next: the likeliest token, or one that is drawn, until the text ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from retrace.capture.settings import CaptureSettings


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. What is drawn for a sequence depends on the seed and its number alone,
    not on what else is generated nor by how many processes."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest of this much probability together."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end a sequence."""
    decode: Callable[[Sequence[int]], str]
    """The text of token ids, for `stop`."""

    @classmethod
    def of(cls, settings: CaptureSettings, tokenizer: Any) -> "Sampling":
        """As the settings say."""
        return cls(
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            stop=tuple(settings.stop),
            decode=tokenizer.decode,
        )

    def facts(self) -> dict[str, Any]:
        """What a trace tells of it; nothing where the likeliest tokens are taken to the end."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        stop = {"stop": [*self.stop]} if self.stop else {}
        return (drawn if self.temperature else {}) | stop

    def of_sequence(self, sequence: int) -> "Writer":
        """What writes the sequence of this number."""
        return Writer(self, sequence)


class Writer:
    """Chooses the tokens of one sequence, in order."""

    def __init__(self, sampling: Sampling, sequence: int) -> None:
        self._sampling = sampling
        self._draw = np.random.default_rng([sampling.seed, sequence])

    def choose(self, logits: Tensor) -> int:
        """The next token by its logits (vocabulary,)."""
        sampling = self._sampling
        if not sampling.temperature:
            return int(logits.argmax())
        scores = logits.detach().double().cpu().numpy() / sampling.temperature
        order = np.argsort(-scores, kind="stable")
        weights = np.exp(scores[order] - scores[order[0]])
        reached = np.cumsum(weights) / weights.sum()
        # The token with which the likeliest reach top_p is one of them.
        reached = reached[: np.searchsorted(reached, sampling.top_p) + 1]
        place = int(np.searchsorted(reached, self._draw.random() * reached[-1], "right"))
        return int(order[min(place, len(reached) - 1)])

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the text of the tokens so far holds what ends it."""
        stop = self._sampling.stop
        if not stop:
            return False
        text = self._sampling.decode(tokens)
        return any(end in text for end in stop)
