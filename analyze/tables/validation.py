"""What a results folder holds, checked for the form that its readers rely on: anybody may have
written it. What does not fit raises a `ValueError` that says what it is."""

from collections.abc import Callable
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_float_dtype, is_integer_dtype, is_string_dtype

from retrace.analyze.metrics.patterns import KINDS as KINDS_OF_HEADS
from retrace.analyze.metrics.patterns import PATTERNS
from retrace.analyze.metrics.possible import ROUNDING, most_of
from retrace.analyze.tables.columns import TAIL_FIGURES


def _is_text(column: "pd.Series[Any]") -> bool:
    is_category = isinstance(column.dtype, pd.CategoricalDtype)
    texts = column.cat.categories.to_series() if is_category else column
    return bool(is_string_dtype(texts) and column.notna().all())


def _is_count(column: "pd.Series[Any]") -> bool:
    return bool(is_integer_dtype(column) and column.between(0, 2**31 - 1).all())


KINDS: dict[str, Callable[["pd.Series[Any]"], bool]] = {
    **dict.fromkeys(("method", "module", "metric", "axis", "cache", "pattern"), _is_text),
    **dict.fromkeys(("protocol", "min_context"), _is_text),
    **dict.fromkeys(("layer", "sequence", "head", "topk", "first", "at", "count"), _is_count),
    **dict.fromkeys(("worst_sequence", "worst_position"), _is_count),
    **dict.fromkeys(("mean", "std", *TAIL_FIGURES), is_float_dtype),
    "best": is_bool_dtype,
}
"""What the columns of all tables hold."""
ENTRIES: tuple[tuple[str, type, dict[str, type]], ...] = (
    ("methods", dict, {"name": str, "parameters": dict}),
    ("history", list, {"when": str, "methods": dict}),
    ("missing", list, {"layer": int, "sequence": int, "methods": dict}),
)
"""Lists and mappings of run.json, and what each of their entries has."""


def checked_table(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table, if its columns hold what belongs there."""
    for column in map(str, table):
        if len(table) and not KINDS[column](table[column]):
            raise ValueError(f"its {name} holds something else in column {column}")
    if len(table) and "pattern" in table:
        right = table["pattern"].isin(PATTERNS) & table["mean"].between(0, 1 + ROUNDING)
        right &= table["pattern"].isin(KINDS_OF_HEADS) | ~table["best"]
        if not right.all():
            raise ValueError(f"its {name} holds patterns that cannot be")
    if len(table) and "metric" not in table and not (table["mean"] >= 0).all():
        raise ValueError(f"its {name} holds a figure that cannot be")
    if len(table) and "metric" in table:
        most = table["metric"].astype(str).map(most_of)
        figures = [name for name in ("mean", *TAIL_FIGURES) if name in table]
        right = pd.Series(True, table.index)
        for figure in figures:
            right &= (table[figure] >= 0) & (table[figure] <= most)
        if "std" in table:
            right &= (table["std"] >= 0) | table["std"].isna()
        wrong = table[~right & (table["count"] > 0)]
        if len(wrong):
            row = wrong.iloc[0]
            found = ", ".join(f"{row[figure]:.6g}" for figure in figures)
            raise ValueError(
                f"its {name} holds a figure that cannot be, {row['metric']} of {found} "
                f"of {row['method']} in layer {row['layer']}, head {row['head']}"
            )
    return table


def checked_facts(run: dict[str, Any]) -> dict[str, Any]:
    """A run's facts, if they have the form that others rely on."""
    outdated = run.get("outdated", [])
    if not isinstance(outdated, list) or not all(isinstance(m, str) for m in outdated):
        raise ValueError("its run.json has no outdated as retrace writes them")
    for name, kind, needed in ENTRIES:
        held: Any = run.get(name, kind() if name == "missing" else None)
        entries = held.values() if isinstance(held, dict) else held
        if not isinstance(held, kind) or not all(_has(entry, needed) for entry in entries):
            raise ValueError(f"its run.json has no {name} as retrace writes them")
    return run


def _has(entry: Any, needed: dict[str, type]) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in needed.items()
    )
