"""DuoAttention: retrieval heads see all keys, streaming heads sinks and recent ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import LearnedLike, Learns
from retrace.analyze.methods.policy import StreamingPolicy
from retrace.analyze.units.attention import softcap
from retrace.analyze.units.past import Past
from retrace.traces import LayerRules, RetraceError


@dataclass(frozen=True, kw_only=True)
class DuoAttention(StreamingPolicy):
    """The kv heads whose attention stays nearest to the query stream: they see `sink` and `recent`
    keys alone. `of` answers the others, all keys by default, which are as many under every budget.

    The paper learns a gate of each head by gradients through the model. This is the score that
    kvpress computes without: the mean query of calibration sequences, before position encoding, is
    placed after as many copies of the mean key as `positions` less one and on the last of them, and
    the attention that keys up to each have in sum is averaged over keys. A head that looks far back
    scores high; those of a group count as their mean. `streaming` is the share of kv heads, over
    all recorded layers, that score least. Layers with a window or chunks of their own are not
    ranked: `of` answers them.
    """

    source: ClassVar[str] = "arXiv:2410.10819 (DuoAttention); NVIDIA/kvpress, on-the-fly scores"
    calibrated: ClassVar[bool] = True
    learns: ClassVar[Learns] = "model"

    streaming: float = field(default=0.5, metadata={"help": "share of kv heads that stream"})
    sink: int = field(
        default=128, metadata={"help": "first keys that streaming heads see", "least": 0}
    )
    recent: int = field(default=256, metadata={"help": "last keys that they see"})
    positions: int = field(default=500, metadata={"help": "keys that the mean query looks at"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.streaming <= 1:
            raise RetraceError(f"streaming={self.streaming}: expected a share between 0 and 1.")

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The `score` (heads,) float64 of each ranked kv head, and its `layer` and `kv_head`
        (heads,) int64."""
        scores: dict[tuple[int, int], list[Tensor]] = {}
        for first in pasts:
            for layer in first.layers:
                for past in first.layer(layer):
                    rules = past.group.rules
                    if rules.window is None and rules.chunk is None:
                        at = layer, past.group.kv_head
                        scores.setdefault(at, []).append(self._score(past))
        places = torch.tensor(list(scores), dtype=torch.int64).reshape(-1, 2)
        means = [torch.stack(each).mean() for each in scores.values()]
        score = torch.stack(means).cpu() if means else torch.empty(0, dtype=torch.float64)
        return {"score": score, "layer": places[:, 0].clone(), "kv_head": places[:, 1].clone()}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        return {
            "score": (torch.float64, (None,)),
            "layer": (torch.int64, (None,)),
            "kv_head": (torch.int64, (None,)),
        }

    def _score(self, past: Past) -> Tensor:
        """How far back a kv head looks, from 0 to 1."""
        query = past.queries_before_rotation.double().mean(dim=1, keepdim=True)
        key = past.keys_before_rotation.double().mean(dim=0).expand(self.positions, -1)
        places = torch.arange(self.positions, device=key.device)
        keys = past.rotated(key, places)
        logits = softcap(past.rotated(query, places[-1:]) @ keys.T, past.group.rules)
        return logits.softmax(dim=-1).cumsum(dim=-1).mean()

    def streams(self, past: Past) -> bool:
        """Whether the head is among those that score least, ties to the lower layer and head."""
        learned, group = past.calibration, past.group
        own = (learned["layer"] == group.layer) & (learned["kv_head"] == group.kv_head)
        if not bool(own.any()):
            return False
        least = learned["score"].argsort(stable=True)[: round(self.streaming * len(own))]
        return bool(own[least].any())
