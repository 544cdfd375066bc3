"""The tails that a page shows: percentiles, where the worst queries are, and what they missed."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from retrace.analyze.metrics.registry import BY_NAME
from retrace.analyze.tables.columns import PERCENTILE_COLUMNS
from retrace.analyze.tables.figures import Figures
from retrace.analyze.tables.one_query import OneQuery
from retrace.analyze.tables.tails import AT, show_command, tails_of_all

MOST_KEYS = 24
"""Most of the best keys that a picture shows."""


def tails_of(results: Figures) -> list[dict[str, Any]]:
    """A row for each method, budget and metric; none of results without tails."""
    return [
        {
            "method": row["method"],
            "topk": row["topk"],
            "metric": BY_NAME[row["metric"]].title,
            "percentiles": [row[name] for name in PERCENTILE_COLUMNS],
            "worst": row["worst"],
            "at": [row[name] for name in AT],
            "command": show_command(results.run, row),
        }
        for row in _rows(tails_of_all(results.tails))
    ]


def picture_of(query: OneQuery, why: str) -> dict[str, Any]:
    """A worst query as the page draws it; `why` it is one."""
    best = query.best()
    methods = list(query.figures["method"])
    return {
        "why": why,
        "place": f"layer {query.layer}, head {query.head}, sequence {query.sequence}, position "
        f"{query.position:,}, which sees {query.visible:,} keys",
        "tokens": _words(_rows(query.tokens)),
        "methods": methods,
        "keys": [
            {
                "rank": int(row["rank"]),
                "key": int(row["key"]),
                "token": _words([row])[0],
                "around": row["around"],
                "probability": row["probability"],
                "taken": [bool(row[method]) for method in methods],
            }
            for row in _rows(best.head(MOST_KEYS))
        ],
        "more": max(0, len(best) - MOST_KEYS),
        "figures": [
            [row["keys"], row["best_taken"], row["recall"], row["attention_fraction"],
             row["error_norm"]]
            for row in _rows(query.figures)
        ],
    }  # fmt: skip


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows: Any = table.to_dict("records")
    return [*rows]


def _words(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of tokens, or their ids where no tokenizer is known."""
    return [str(row["text"] or f"{row['token']} ") for row in rows]
