"""How many of its k best keys a query attends."""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from retrace.traces import RetraceError

_RULE = re.compile(r"(fraction|top-p|threshold):(\d*\.?\d+)")


@dataclass(frozen=True)
class Budget:
    """A rule that prunes what is within the budget k, query by query and head by head.

    `k`: all of it. `fraction:0.25`: at most that share of the visible keys, rounded up.
    `top-p:0.95`: the fewest best-ranked whose estimated attention mass is that share of the mass
    of all k (Twilight, arXiv:2502.02770, section 4). `threshold:2.5`: the best-ranked down to the
    last whose estimate is within 2.5 of the head's largest.

    The last two read the method's estimates as logits. Each head prunes by its own estimates even
    where the group shares one ranked list. Keys that are always kept come first in the list, count
    towards mass and budget, and stay; pages stay whole, and each key of a page weighs what the page
    is estimated at.
    """

    rule: str = "k"
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `k`, `fraction:0.25`, `top-p:0.95` or `threshold:2.5`."""
        if text == "k":
            return cls()
        match = _RULE.fullmatch(text)
        if match is None or (match[1] != "threshold" and not 0 < float(match[2]) <= 1):
            raise RetraceError(
                f"budget={text!r}: expected k, fraction:F or top-p:P (up to 1), or threshold:T."
            )
        return cls(match[1], float(match[2]))

    @property
    def by_estimate(self) -> bool:
        """Whether the rule reads estimates."""
        return self.rule in ("top-p", "threshold")

    def most(self, ks: Tensor, visible: Tensor) -> Tensor:
        """Most keys of each budget (budgets, 1, 1) for queries that see so many (queries,):
        (budgets, 1, queries or 1)."""
        if self.rule != "fraction":
            return ks
        # Rounded first: 0.29 of 100 keys are 29, though the product is a little more.
        share = torch.ceil(torch.round(self.amount * visible.double(), decimals=6))
        return torch.minimum(ks, share.to(ks.dtype))

    def prune(self, estimates: Tensor, largest: Tensor, attended: Tensor) -> Tensor:
        """How many listed keys are attended at each budget (budgets, group, queries).

        Args:
            estimates: of each listed key (group, queries, listed), best first; -inf where none is.
            largest: estimate of any key that the query sees (group, queries, 1).
            attended: keys within each budget (budgets, group or 1, queries or 1).
        """
        within = attended.clamp(max=estimates.shape[-1]).movedim(0, -1)
        within = within.expand(*estimates.shape[:2], -1)
        if self.rule == "top-p":
            # Nothing listed leaves no mass, and no difference of infinities.
            best = estimates.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
            mass = torch.exp((estimates - best).double()).cumsum(dim=-1)
            wanted = self.amount * torch.nn.functional.pad(mass, (1, 0)).gather(-1, within)
            count = torch.searchsorted(mass, wanted) + 1
        else:
            reaches = estimates >= largest - self.amount
            places = torch.arange(1, estimates.shape[-1] + 1, device=estimates.device)
            last = torch.where(reaches, places, 0).cummax(dim=-1).values
            count = torch.nn.functional.pad(last, (1, 0)).gather(-1, within)
        return torch.minimum(count, within).movedim(-1, 0)

    def __str__(self) -> str:
        if self.rule == "k":
            return "k"
        return f"{self.rule}:{np.format_float_positional(self.amount, trim='-')}"
