"""Replaying an attention function as models define them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past
from retrace.traces import RetraceError

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Function(AttendMethod):
    """A function `(query, key, value, attention_mask, head_mask) -> (output, scores, ids)`.

    All tensors are (batch, heads, positions, channels), keys and values repeated for the group;
    `attention_mask` (1, 1, queries, keys) is added to scores: 0 where a key is visible, the least
    finite number elsewhere; `head_mask` is None. `ids` (batch, heads, queries, any) are the keys
    attended, best first, -1 where a query sees fewer than were asked for; `scores` may be None and
    are not used. If the function takes a keyword `topk`, it is called once per budget with it;
    otherwise its one answer stands for all budgets. Queries come scaled so that the usual
    1 / sqrt(channels) inside the function gives the layer's own scale.

    What it reads to find its keys is said by an attribute of the function: `holds_keys` is True
    where it multiplies queries with all keys, and False where it reads only what it attends. For
    anything between take a class with `aux_bytes`.
    """

    source: ClassVar[str] = "a function of yours"

    function: AttentionFunction = field(metadata={"help": "the function"})

    @property
    def reads_all_keys(self) -> bool | None:
        """What an attribute `holds_keys` of the function says, if it has one."""
        said = getattr(self.function, "holds_keys", None)
        return None if said is None else bool(said)

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Call the function for a block of queries and the keys up to the last of them."""
        keys, values, rules = state.keys, state.values, state.group.rules
        end = int(positions[-1]) + 1
        shape = (1, len(queries), -1, -1)
        hidden = ~visible(positions, torch.arange(end, device=keys.device), rules)
        mask = torch.zeros(hidden.shape, device=keys.device)
        mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)[None, None]
        budget = {"topk": k} if "topk" in inspect.signature(self.function).parameters else {}
        answer = self.function(
            queries[None] * queries.shape[-1] ** 0.5,
            keys[:end].expand(shape),
            values[:end].expand(shape),
            mask,
            None,
            **budget,
        )
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise RetraceError("gave no triple of output, scores and ids.")
        output, _, ids = answer
        return output[0], ids[0]
