"""The columns of every table of results, and their types."""

from retrace.analyze.metrics.tails import PERCENTILES

KEYS = ["method", "layer", "module", "head", "topk", "metric"]
COLUMNS = [*KEYS, "mean", "std", "count", "protocol", "min_context"]
SEQUENCE_COLUMNS = {
    "method": "str",
    "layer": "int32",
    "module": "str",
    "sequence": "int32",
    "head": "int32",
    "topk": "int32",
    "metric": "str",
    "mean": "float32",
    "count": "int32",
}
"""Columns of the table of sequences, and their types: it is the largest."""

POSITION_COLUMNS = {
    **dict.fromkeys(["method", "module", "metric", "axis"], "category"),
    **dict.fromkeys(["layer", "head", "topk", "first", "count"], "int32"),
    **dict.fromkeys(["mean", "std"], "float32"),
}
"""Those of the table of positions."""
LOCALITY_COLUMNS = {
    **dict.fromkeys(["method", "module", "cache", "metric"], "category"),
    **dict.fromkeys(["layer", "head", "topk", "at", "count"], "int32"),
    "mean": "float64",
}
"""Those of the table of locality."""
CACHE = ["cache", "at"]
"""Columns of that table that `KEYS` lacks."""
PERCENTILE_COLUMNS = {f"p{percent}": percent for percent in PERCENTILES}
"""Columns of percentiles, and which they are."""
TAIL_FIGURES = [*PERCENTILE_COLUMNS, "worst"]
TAIL_COLUMNS = {
    **dict.fromkeys(["method", "module", "metric"], "category"),
    **dict.fromkeys(
        ["layer", "head", "topk", "worst_sequence", "worst_position", "count"], "int32"
    ),
    **dict.fromkeys(TAIL_FIGURES, "float32"),
}
"""Those of the table of tails."""
PROJECTED_COLUMNS = {
    **dict.fromkeys(["method", "module"], "category"),
    **dict.fromkeys(["layer", "topk", "count"], "int32"),
    **dict.fromkeys(["mean", "std"], "float64"),
}
"""Those of the table of projected errors."""
BUCKET = ["axis", "first"]
"""Columns that name a bucket of queries."""
PATTERN_COLUMNS = {
    **dict.fromkeys(["layer", "head", "count"], "int32"),
    **dict.fromkeys(["module", "pattern"], "category"),
    **dict.fromkeys(["mean", "std"], "float64"),
    "best": "bool",
}
"""Those of the table of heads' patterns."""
COLUMNS_OF = {
    "metrics": COLUMNS,
    "curves": COLUMNS,
    "sequences": list(SEQUENCE_COLUMNS),
    "positions": list(POSITION_COLUMNS),
    "head_patterns": list(PATTERN_COLUMNS),
    "locality": list(LOCALITY_COLUMNS),
    "tails": list(TAIL_COLUMNS),
    "projected": list(PROJECTED_COLUMNS),
}
"""Columns of each table."""
