"""Keys drawn by their exact probability: the best that sampling can do."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.partial_attention import visible_logits
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class OracleSample(AttendMethod):
    """k draws from the exact probabilities, with replacement; the output is the mean of the values
    drawn, a sink counting as a value of zeros.

    Unbiased, with an error that falls as 1 / sqrt(k). Keys that are drawn often come first.
    """

    source: ClassVar[str] = "arXiv:2410.16179 (MagicPIG), section 3.2"
    holds_keys: ClassVar[bool | None] = True

    seed: int = field(default=0, metadata={"help": "of the random numbers", "least": 0})

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """The mean of k drawn values, and the keys drawn."""
        logits = visible_logits(state, queries, positions)
        total = torch.logsumexp(logits, dim=-1)
        if state.unit.sinks is not None:
            total = torch.logaddexp(total, state.unit.sinks[:, None])
        reached = logits.sub_(total[..., None]).double().exp_().cumsum(dim=-1)
        draws = uniform(self.seed, state.group, positions, k).double()
        if state.unit.sinks is None:  # rounding must leave no draw beyond the last key
            draws = draws * reached[..., -1:]
        drawn = torch.searchsorted(reached, draws).sort(dim=-1).values
        count = logits.shape[-1]  # also the place one past the last key, which is the sink
        counts = torch.zeros(*logits.shape[:2], count + 1, device=logits.device)
        counts.scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=counts.dtype))
        values = torch.nn.functional.pad(state.values[:count], (0, 0, 0, 1))
        again = torch.nn.functional.pad(drawn[..., 1:] == drawn[..., :-1], (1, 0))
        often = counts.gather(-1, drawn).masked_fill(again | (drawn == count), 0)
        often, order = often.sort(dim=-1, descending=True, stable=True)
        ids = drawn.gather(-1, order).masked_fill(often == 0, -1)
        return counts @ values / k, ids[..., :count]
