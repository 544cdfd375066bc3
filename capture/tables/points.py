"""Tables of points: methods and budgets in the loop, and what each came to."""

from typing import Any

import pandas as pd

from retrace.analyze.tables.saved import SavedTables

TEXTS = {"method", "task", "metric"}
"""Columns of tables of points that hold text; the others hold numbers."""


class SavedPoints(SavedTables):
    """Tables whose rows are of a method and a budget each. Anybody may have written them."""

    def markdown(self) -> str:
        """The table, in Markdown."""
        raise NotImplementedError

    def text(self) -> str:
        """The same."""
        return self.markdown()

    @classmethod
    def checked_table(cls, table: pd.DataFrame, name: str) -> pd.DataFrame:
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

    @classmethod
    def checked_facts(cls, facts: Any) -> dict[str, Any]:
        """Facts, if their methods are as retrace writes them.

        Raises:
            ValueError: they are not.
        """
        checked = super().checked_facts(facts)
        methods = checked.get("methods", {})
        if not isinstance(methods, dict) or not all(isinstance(e, dict) for e in methods.values()):
            raise ValueError("its facts have no methods as retrace writes them")
        return checked
