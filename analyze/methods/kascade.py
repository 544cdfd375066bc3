"""Kascade: a few anchor layers select, and heads of the layers above each reuse what is most like
what they attend themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import POOL, LearnedLike, Learns, ScoreMethod
from retrace.analyze.methods.toolkit.partial_attention import visible_logits
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules, RetraceError


@dataclass(frozen=True, kw_only=True)
class Kascade(ScoreMethod):
    """The exact best keys of the nearest anchor layer at or below this one, by the softmaxes of a
    group there in sum: of the kv head whose choice serves each kv head here best.

    A choice serves as well as the share it holds of the attention that the head's own best `keys`
    would: the least over queries, the mean over sequences. Anchors, the first layer among them, are
    those by which all layers are served best in sum. The paper weighs layers by how much attention
    changes the residual stream, which a trace doesn't hold: here all count alike. It finds layers
    0, 2, 8, 13 and 14 of Llama-3.1-8B, attends all keys in layer 0, and takes a tenth of the
    keys; results are per layer and budget, so that either policy can be read off. In prefill its
    kernels share a selection among neighbouring queries; here each has its own, as in decoding.
    """

    source: ClassVar[str] = "arXiv:2512.16391 (Kascade); microsoft/kascade"
    across_layers: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    learns: ClassVar[Learns] = "model"

    anchors: int = field(default=5, metadata={"help": "layers that select"})
    keys: int = field(default=64, metadata={"help": "best keys that are compared to choose them"})
    queries: int = field(default=64, metadata={"help": "queries of a sequence that compare them"})
    pool: str = field(default="sum-softmax", metadata=POOL)

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The recorded `layers` (layers,), the `anchor` of each, and which kv head of that each of
        its own reuses, `heads` (layers, kv heads); all int64."""
        layers = torch.tensor(pasts[0].layers)
        served = torch.stack([self._served(past) for past in pasts]).mean(dim=0).cpu()
        by_layer = served.amax(dim=2).mean(dim=-1)
        chosen = torch.tensor(best_anchors(by_layer.double().numpy(), self.anchors))
        row = chosen[torch.searchsorted(chosen, torch.arange(len(layers)), right=True) - 1]
        # NumPy's argmax leaves ties to the first.
        heads = served[row, torch.arange(len(layers))].numpy().argmax(axis=1)
        return {"layers": layers, "anchor": layers[row], "heads": torch.from_numpy(heads)}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        sizes = {"layers": (layers,), "anchor": (layers,), "heads": (layers, rules.kv_heads)}
        return {name: (torch.int64, size) for name, size in sizes.items()}

    def _served(self, past: Past) -> Tensor:
        """How well a choice serves (anchor, layer, the anchor's kv heads, the layer's)."""
        count = min(self.queries, len(past.query_positions))
        places = torch.arange(1, count + 1, device=past.keys.device)
        rows = places * len(past.query_positions) // max(count, 1) - 1
        # Of each kv head's group in sum.
        attention = [
            torch.stack([head.attention(rows).sum(dim=0) for head in past.layer(layer)])
            for layer in past.layers
        ]
        if len({a.shape for a in attention}) > 1:
            raise RetraceError("maps the kv heads of layers, and not all have the same number.")
        mass = torch.stack(attention)
        best = top(mass, min(self.keys, mass.shape[-1]))[1]
        own = mass.gather(-1, best).sum(dim=-1).clamp(min=torch.finfo(mass.dtype).tiny)
        layers, heads = mass.shape[:2]
        served = mass.new_zeros(layers, layers, heads, heads)
        for anchor in range(layers):
            for layer in range(anchor, layers):
                for head, ids in enumerate(best[anchor]):
                    held = mass[layer].gather(-1, ids.expand(heads, -1, -1)).sum(dim=-1)
                    served[anchor, layer, head] = (held / own[layer]).amin(dim=-1)
        return served

    def build(self, past: Past) -> Any:
        """The kv head of the anchor layer whose choice is reused."""
        learned, layer = past.calibration, past.group.layer
        row = int((learned["layers"] == layer).nonzero())
        anchor = int(learned["anchor"][row])
        if anchor == layer:
            return past
        return past.layer(anchor)[int(learned["heads"][row, past.group.kv_head])]

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The logits in the anchor layer."""
        return visible_logits(state, state.queries_at(positions, len(queries)), positions)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """All keys in an anchor layer, where the selected ones count again; nothing elsewhere."""
        return keys * group.key_bytes if self.reads_cache(state, group) else 0.0

    def reads_cache(self, state: Any, group: HeadGroup) -> bool:
        """In an anchor layer."""
        return bool(state.group.layer == group.layer)


def best_anchors(served: npt.NDArray[np.float64], count: int) -> list[int]:
    """Which layers select (count or all,), ascending, the first among them, so that the sum of
    `served` (anchor, layer) over all layers, each by the nearest anchor at or below it, is largest;
    by dynamic programming, ties to the lower anchors."""
    layers = len(served)
    count = min(count, layers)
    # The best sum from each layer up that so many anchors reach, with that layer the first.
    total = np.full((count + 1, layers + 1), -np.inf)
    total[0, layers] = 0.0
    following = np.zeros((count + 1, layers), int)
    for more in range(1, count + 1):
        for anchor in range(layers):
            until = np.arange(anchor + 1, layers + 1)
            sums = served[anchor, anchor:].cumsum() + total[more - 1, until]
            following[more, anchor] = until[sums.argmax()]
            total[more, anchor] = sums.max()
    chosen = [0]
    for more in range(count, 1, -1):
        chosen.append(int(following[more, chosen[-1]]))
    return chosen
