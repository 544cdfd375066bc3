"""What tables of points and their facts must hold: anybody may have written them."""

from typing import Any

import pandas as pd

TEXTS = {"method", "task", "metric"}
"""Columns of tables of points that hold text; the others hold numbers."""


def checked_points(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table that names methods and budgets, if its other columns hold numbers.

    Raises:
        ValueError: it does not, or they do not.
    """
    if not {"method", "topk"} <= set(table):
        raise ValueError(f"{name} names no methods and budgets")
    for column in table:
        if column in TEXTS:
            right = all(isinstance(text, str) for text in table[column])
        else:
            right = pd.api.types.is_numeric_dtype(table[column])
        if not right:
            raise ValueError(f"{name} holds something else in column {column}")
    return table


def checked_methods(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts, if their methods are as retrace writes them.

    Raises:
        ValueError: they are not.
    """
    methods = facts.get("methods", {})
    if not isinstance(methods, dict) or not all(isinstance(e, dict) for e in methods.values()):
        raise ValueError("its facts have no methods as retrace writes them")
    return facts
