"""Expected attention: the keys that queries yet to come are likely to attend to."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, POOL, EvictionMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.units.past import Past
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(EvictionMethod):
    """Keeps the keys of largest expected attention times the norm of their value, if the next
    queries are drawn from a normal distribution.

    Its mean m and covariance C are those of the past's queries before position encoding, turned by
    the mean rotation of the next `future` positions: E[exp(q.k)] = exp(m.k + k.C k / 2). The sinks
    of `keep` are left out of the statistics and of the softmax over keys. The paper has the norm of
    the value after the output projection, which a trace does not hold; the code has the value's
    own. Heads of a group share the mean. A layer's softcap and sink logits are not minded. Keys
    that come later are all attended.
    """

    source: ClassVar[str] = "arXiv:2510.00636 (Expected Attention), section 3; NVIDIA/kvpress"

    future: int = field(default=512, metadata={"help": "positions whose rotations are averaged"})
    eps: float = field(
        default=0.0, metadata={"help": "added to attention before the norm; 0.01-0.02 when tuned"}
    )
    covariance: bool = field(default=True, metadata={"help": "mind the queries' covariance"})
    norm: bool = field(default=True, metadata={"help": "multiply by the norm of the value"})
    pool: str = field(default="mean", metadata=POOL)
    keep: Keep = field(default=Keep(sink=4, sink_most=0.25), metadata=KEEP)

    def importance(self, past: Past) -> Tensor:
        """(softmax(m.k + k.C k / 2) + eps) ||v|| (group, keys)"""
        sink = self.keep.sink
        queries = past.queries_before_rotation[:, past.query_positions >= sink]
        if not queries.shape[1]:
            raise RetraceError(
                f"needs queries at positions {sink} to {past.end - 1}, and the trace has none."
            )
        turn = _mean_rotation(past, torch.arange(past.end, past.end + self.future))
        # The mean rotation is no rotation: what it does to both, its transpose does to the keys.
        keys = past.keys @ turn
        mean = queries.mean(dim=1)
        logits = mean @ keys.T
        if self.covariance:
            centred = queries - mean[:, None]
            spread = centred.mT @ centred / centred.shape[1]
            logits = logits + ((keys @ spread) * keys).sum(dim=-1) / 2
        logits[:, :sink] = -torch.inf
        attention = torch.softmax(logits, dim=-1) + self.eps
        return attention * past.values.norm(dim=-1) if self.norm else attention


def _mean_rotation(past: Past, positions: Tensor) -> Tensor:
    """The matrix (channels, channels) that turns a vector by the mean of the layer's rotations for
    positions (positions,)."""
    rotation = past.group.rules.rotation
    assert rotation is not None  # or the queries' could not be undone
    one, other = torch.from_numpy(rotation.pairs()).to(past.keys.device).T
    # Turned with the other channels of the pairs at 0, each pair shows its cosine and its sine.
    probe = past.keys.new_ones(past.keys.shape[1])
    probe[other] = 0
    turned = past.rotated(probe.expand(len(positions), -1), positions).mean(dim=0)
    turn = torch.diag(turned)
    turn[other, other] = turned[one]
    turn[other, one] = turned[other]
    turn[one, other] = -turned[other]
    return turn
