"""One query: what it could see, its best keys, and which of them each method took and missed."""

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

AROUND = 2
"""Tokens on either side of a key that are shown with it."""
BEFORE = 24
"""Tokens before the query that are shown."""
QUERY = ["layer", "module", "head", "sequence", "position"]
KEY_COLUMNS = ["method", "key", "token", "text", "around", "rank", "probability", "attended"]
FIGURE_COLUMNS = [
    "method",
    "keys",
    "best_taken",
    "best_missed",
    "recall",
    "attended_recall",
    "attention_fraction",
    "exact_attention_fraction",
    "error_norm",
    "density",
]


@dataclass(frozen=True)
class OneQuery:
    """One query of one head, its best keys, and what methods attend for it."""

    trace: str
    layer: int
    module: str
    head: int
    """Of the query heads."""
    kv_head: int
    sequence: int
    position: int
    visible: int
    """Keys that the query sees."""
    topk: int
    protocol: str
    tokens: pd.DataFrame
    """position, token and text of the query's own token, the last row, and of those before it, at
    most `BEFORE`. A text is empty where no tokenizer is known."""
    keys: pd.DataFrame
    """One row per method and key that is among the `topk` best or that it attends: method, key (its
    position), token, text, around (with `AROUND` tokens on either side, none later than the query),
    rank (from 1 among the best; missing beyond `topk`), probability (exact attention on it) and
    whether the method `attended` to it; the best first, then the others as the method ranks
    them."""
    figures: pd.DataFrame
    """One row per method: keys (how many it attends), best_taken and best_missed (how many of the
    best), and this query's recall, attended_recall, attention_fraction, exact_attention_fraction,
    error_norm and density, as they are defined for all queries."""

    def best(self) -> pd.DataFrame:
        """The best keys, a row each: rank, key, token, text, around, probability, and a column for
        each method, which says whether it attended to it."""
        rows = self.keys[self.keys["rank"].notna()]
        taken = rows.pivot(index="rank", columns="method", values="attended")
        first = rows[rows["method"] == self.figures["method"].iloc[0]].set_index("rank")
        named = first[["key", "token", "text", "around", "probability"]]
        found: pd.DataFrame = named.join(taken[list(self.figures["method"])]).reset_index()
        return found

    def table(self) -> pd.DataFrame:
        """`keys`, with the query that they are of in columns of their own."""
        rows = self.keys.copy()
        for i, name in enumerate(QUERY):
            rows.insert(i, name, getattr(self, name))
        rows.insert(len(QUERY) + 1, "topk", self.topk)
        return rows

    def to_json(self) -> dict[str, Any]:
        """All of it, with tables as lists of rows."""
        facts = asdict(self)
        for name in ("tokens", "keys", "figures"):
            rows = getattr(self, name).to_dict("records")
            facts[name] = [{n: None if pd.isna(v) else v for n, v in row.items()} for row in rows]
        return facts
