"""Presses of kvpress, replayed."""

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.units.past import Past
from retrace.traces import RetraceError

PRESSES = (
    "KnormPress",
    "KeyDiffPress",
    "LagKVPress",
    "CURPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "CompactorPress",
    "SnapKVPress",
    "TOVAPress",
    "ObservedAttentionPress",
    "ExpectedAttentionPress",
    "CapPress",
    "StreamingLLMPress",
    "RandomPress",
)
"""Those whose score follows from keys, values, queries and attention, as a trace holds them."""
TURN_QUERIES = ("ExpectedAttentionPress", "CapPress")
"""Presses that take queries before position encoding and turn them themselves."""
PROJECT_KEYS = ("LeverageScorePress", "CompactorPress")
"""Presses that take keys before position encoding."""
_RANDOM = threading.Lock()
"""Presses draw from PyTorch's one generator, which all threads share."""


@dataclass(frozen=True, kw_only=True)
class KVPress(EvictionMethod):
    """The keys that a press of kvpress scores highest where the past ends; later ones all attended.

    `arguments` are those of the press: `kvpress:press=SnapKVPress,arguments=window_size=32`,
    several joined by `+`. How many keys are kept is the budget's to say, not `compression_ratio`'s.
    Presses that read weights or hidden states are refused, and a budget that the window of
    `SnapKVPress` fills. Random numbers begin anew at each state.
    """

    source: ClassVar[str] = "NVIDIA/kvpress 0.5"
    extra: ClassVar[str | None] = "kvpress"
    install: ClassVar[str | None] = "pip install --no-deps kvpress==0.5.5 cachetools fire termcolor"

    press: str = field(default="KnormPress", metadata={"help": "its class", "choices": PRESSES})
    arguments: str = field(default="", metadata={"help": "of the class, as name=value+name=value"})

    @property
    def fixed(self) -> bool:
        """Whether no window sets a least budget."""
        return not self._window

    def at(self, k: int) -> Self:
        """The same, where the budget is more than the press keeps whatever it finds."""
        if 0 < k <= self._window:
            raise RetraceError(
                f"keeps the {self._window} keys of its window, which leaves nothing to find of "
                f"k = {k}: name a larger --topk, or a smaller one as arguments=window_size=N."
            )
        return self

    @property
    def _window(self) -> int:
        return int(self._arguments().get("window_size", 64)) if self.press == "SnapKVPress" else 0

    def importance(self, past: Past) -> Tensor:
        """The press's score of each key (keys,)."""
        heads = past.heads
        keys, values = (
            torch.stack([getattr(head, name) for head in heads])[None]
            for name in ("keys", "values")
        )
        self._check_queries(past)
        # A press projects hidden states to queries and turns them by their position: here they are
        # queries that have been turned, on the scale by which it divides their products. Where it
        # turns them by other positions, they are queries that have not been.
        name = "queries_before_rotation" if self.press in TURN_QUERIES else "queries"
        queries = torch.cat([getattr(head, name) for head in heads]) * keys.shape[-1] ** 0.5
        hidden = [queries]
        if self.press in PROJECT_KEYS:
            hidden.append(torch.stack([head.keys_before_rotation for head in heads]))
        module = _Attention(past, len(queries), queries.shape[-1])
        still = torch.ones_like(queries[:1]), torch.zeros_like(queries[:1])
        attentions = None
        if self.press == "ObservedAttentionPress":
            attentions = torch.cat([head.attention(slice(None)) for head in heads])[None]
        given = {"position_embeddings": still}
        try:
            with _RANDOM, torch.random.fork_rng():
                torch.manual_seed(0)
                scores = self._press().score(
                    module, _side_by_side(hidden), keys, values, attentions, given
                )
        except (AssertionError, ValueError) as error:
            raise RetraceError(f"{self.press}: {error}.") from error
        found: Tensor = scores[0, past.group.kv_head]
        return found

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for part in self.arguments.split("+") if self.arguments else ():
            name, _, value = part.partition("=")
            arguments[name] = float(value) if "." in value else int(value)
        return arguments

    def _press(self) -> Any:
        kind = getattr(self.library(), self.press)
        try:
            return kind(**self._arguments())
        except TypeError as error:
            raise RetraceError(f"{self.press}: {error}.") from error

    @staticmethod
    def _check_queries(past: Past) -> None:
        """A press takes the last queries for those of the last positions."""
        positions = past.query_positions
        if not len(positions) or int(positions[0]) != past.end - len(positions):
            raise RetraceError(
                f"judges keys by all queries before position {past.end}, and the trace holds only "
                "some: capture more of them (--queries)."
            )


class _Attention:
    """What a press asks of an attention module."""

    def __init__(self, past: Past, heads: int, channels: int) -> None:
        self.config = SimpleNamespace(
            num_attention_heads=heads, num_key_value_heads=past.group.rules.kv_heads
        )
        self.head_dim = channels
        self.layer_idx = past.group.layer
        self.rotation = past.group.rules.rotation
        self.queries = heads * channels

    def q_proj(self, hidden: Tensor) -> Tensor:
        """The part of the hidden states that is queries already."""
        return hidden[..., : self.queries]

    def k_proj(self, hidden: Tensor) -> Tensor:
        """The part that is keys before position encoding."""
        return hidden[..., self.queries :]

    def rotary_emb(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions (1, positions), each (1, positions, channels).

        Raises:
            RetraceError: channels are not turned in halves, as presses take for granted.
        """
        rotation = self.rotation
        if (
            rotation is None
            or rotation.pairing != "half"
            or 2 * len(rotation.frequencies) != (self.head_dim)
        ):
            raise RetraceError("takes channel i to be turned with channel i + half of all.")
        angles = positions[..., None] * torch.tensor(rotation.frequencies, device=like.device)
        turned = torch.cat([angles, angles], dim=-1)
        return turned.cos() * rotation.scaling, turned.sin() * rotation.scaling


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Hidden states (1, positions, any) of vectors (heads, positions, channels)."""
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=-1)[None]
