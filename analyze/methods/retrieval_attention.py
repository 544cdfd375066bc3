"""RetrievalAttention: a graph of keys that is linked by past queries."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.methods.toolkit import graphs
from retrace.analyze.methods.toolkit.vector_indexes import rows
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup

ROWS = 512
"""Past queries that are compared with all keys at once."""


@dataclass(frozen=True, kw_only=True)
class RetrievalAttention(SearchMethod):
    """Greedy search by inner product over a graph of the keys, each query head with its own.

    Queries are distributed otherwise than keys, so that links come from past queries: the best key
    of each is linked with its next best ones, as RoarGraph projects its graph of queries and keys,
    and every key then with what a search for it finds, so that all can be reached. Of too many
    links those stay that lie in different directions. The graph was never published; sizes are
    chosen here, smaller than RoarGraph's (100 near keys, 35 links, a beam of 500) for its millions
    of vectors, and the public code searches exactly. The first `sink` keys are always compared, and
    so are later ones until `step` of them are linked, by a search for each; the paper attends 128
    first and 512 last keys besides k, where here k are attended in all.
    """

    source: ClassVar[str] = (
        "arXiv:2409.10516 (RetrievalAttention), section 3; arXiv:2408.08933 (RoarGraph), section 4"
    )

    step: int = field(
        default=512,
        metadata={"help": "keys that join the index together; those since are searched exactly"},
    )
    sink: int = field(default=128, metadata={"help": "first keys, always compared", "least": 0})
    near: int = field(default=32, metadata={"help": "best keys of a past query that are linked"})
    links: int = field(default=32, metadata={"help": "links of a key, by queries and by searches"})
    ef_construction: int = field(default=64, metadata={"help": "beam width when keys are linked"})
    ef: int = field(default=100, metadata={"help": "beam width of a search"})

    def build(self, past: Past) -> Any:
        """The sinks, the other keys (keys, channels), the links of each for every head, the key
        that searches begin at, which is the one nearest to the mean, and what they cost."""
        return self.build_each([past])[0]

    def build_each(self, pasts: Sequence[Past]) -> Sequence[Any]:
        """The states of several pasts."""
        states = [self._unlinked(past) for past in pasts]

        def link(at: int, head: int, near: graphs.Ids) -> None:
            keys, links = states[at]["keys"], states[at]["links"][head]
            graphs.project(keys, near, links[:, : self.links])
            self._connect(links, keys, 0, states[at]["entry"])

        _on_cores(
            [
                partial(link, at, head, near)
                for at, past in enumerate(pasts)
                for head, near in enumerate(self._nearest(past) if len(states[at]["keys"]) else ())
            ],
            pasts[0].keys.device,
        )
        return states

    def extend(self, state: Any, new: Past) -> Any:
        """Link the keys to those that a search for each finds, in order."""
        missing = self.sink - len(state["sinks"])
        sinks = torch.cat([state["sinks"], new.keys[: max(0, missing)]])
        added = rows(new.keys[max(0, missing) :])
        keys, first = np.concatenate([state["keys"], added]), len(state["keys"])
        heads = [np.concatenate([links, self._empty(len(added))]) for links in state["links"]]
        if len(added):
            _on_cores(
                [partial(self._connect, links, keys, first, state["entry"]) for links in heads],
                new.keys.device,
            )
        return {**state, "sinks": sinks, "keys": keys, "links": heads}

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best k of the sinks and what a beam search meets."""
        group, count, _ = queries.shape
        width = max(self.ef, k) if len(state["keys"]) else 0
        ids = np.full((group, count, width), -1, np.int32)
        scores = np.full((group, count, width), -np.inf, np.float32)
        cost = np.zeros((group, count, 2), np.int32)
        vectors = rows(queries).reshape(group, count, -1)

        def walk(head: int) -> None:
            links, entry = state["links"][head], state["entry"]
            graphs.search(
                state["keys"], links, entry, vectors[head], ids[head], scores[head], cost[head]
            )

        _on_cores([partial(walk, head) for head in range(group if width else 0)], queries.device)
        state["cost"] = torch.from_numpy(cost.sum(axis=0)).to(queries.device)
        met = torch.from_numpy(ids).to(queries.device).long()
        met = torch.where(met < 0, -1, met + self.sink)
        first = torch.arange(len(state["sinks"]), device=queries.device).expand(group, count, -1)
        every = torch.cat([first, met], dim=-1)
        products = [queries @ state["sinks"].T, torch.from_numpy(scores).to(queries.device)]
        best = top(torch.cat(products, dim=-1), min(k, every.shape[-1]))[1]
        return every.gather(-1, best.clamp(min=0)).masked_fill(best < 0, -1)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The sinks, the keys that each head's search compares and the links that it follows."""
        compared, expanded = state["cost"].unbind(dim=-1)
        links = expanded * (2 * self.links * 4)  # of four bytes each
        read: Tensor = (compared + len(state["sinks"])) * group.key_bytes + links
        return read

    def _connect(self, links: graphs.Ids, keys: graphs.Floats, first: int, entry: int) -> None:
        """Link the keys from one on to those that a search for each finds."""
        graphs.connect(keys, links, first, entry, self.ef_construction, links[:, self.links :])

    def _unlinked(self, past: Past) -> dict[str, Any]:
        """A state without links."""
        keys = rows(past.keys[self.sink :])
        entry = int(((keys - keys.mean(axis=0)) ** 2).sum(axis=-1).argmin()) if len(keys) else 0
        heads = [self._empty(len(keys)) for _ in range(past.group.rules.group)]
        sinks = past.keys[: self.sink]
        return {"sinks": sinks, "keys": keys, "links": heads, "entry": entry, "cost": None}

    def _empty(self, keys: int) -> graphs.Ids:
        return np.full((keys, 2 * self.links), -1, np.int32)

    def _nearest(self, past: Past) -> graphs.Ids:
        """The best keys of each past query among those that it sees, without sinks
        (group, queries, near), -1 where there are fewer."""
        queries, positions = past.asked(slice(None))
        keys = torch.arange(self.sink, past.end, device=positions.device)
        found = []
        for start in range(0, len(positions), ROWS):
            some = slice(start, start + ROWS)
            seen = visible(positions[some], keys, past.group.rules)
            products = queries[:, some] @ past.keys[self.sink :].T
            products = products.masked_fill(~seen, -torch.inf)
            found.append(top(products, min(self.near, len(keys)))[1])
        return torch.cat(found, dim=1).cpu().numpy().astype(np.int32)


def _on_cores(calls: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Do some calls, one after another: `analyze` has a task on each core. With a GPU it has one in
    all, and the other cores take a call each."""
    if device.type == "cpu" or len(calls) < 2:
        for call in calls:
            call()
    else:
        with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1)) as pool:
            list(pool.map(lambda call: call(), calls))
