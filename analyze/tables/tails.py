"""Tails of every method and budget in one line each: over all layers and heads, and the query that
is worst of all."""

import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from retrace.analyze.metrics.registry import BY_NAME, TAILED
from retrace.analyze.tables.columns import PERCENTILE_COLUMNS

AT = ["layer", "head", "worst_sequence", "worst_position"]
WORST = [*AT, "worst"]


def tails_of_all(tails: pd.DataFrame) -> pd.DataFrame:
    """A row for each method, budget and metric of a table of tails: the means over layers and heads
    of its percentiles, the worst figure of any of them, and which layer, head, sequence and
    position has it; of several alike the first layer's and head's.

    Columns: method, topk, metric, those of percentiles, and `WORST`.
    """
    rows = []
    plain = tails.astype({"method": "str", "metric": "str"})
    plain = plain.sort_values(["layer", "head"], kind="stable")
    groups = {key: part for key, part in plain.groupby(["method", "topk", "metric"], sort=False)}
    for method in dict.fromkeys(tails["method"].astype(str)):
        for k in sorted(plain.loc[plain["method"] == method, "topk"].unique()):
            for metric in TAILED:
                part = groups.get((method, k, metric))
                if part is None:
                    continue
                # Shares are bad where they are small.
                bad = -BY_NAME[metric].better * part["worst"]
                place: Any = bad.idxmax()
                percentiles = part[[*PERCENTILE_COLUMNS]].astype("float64").mean().to_dict()
                worst = part.loc[place, WORST].to_dict()
                rows.append(
                    {"method": method, "topk": int(k), "metric": metric, **percentiles, **worst}
                )
    columns = ["method", "topk", "metric", *PERCENTILE_COLUMNS, *WORST]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(["topk", *AT], "int64"))


def show_command(run: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The command that shows the worst query of a row of `tails_of_all`, as a shell takes it; empty
    for a method that was given as an object, which no command line can name."""
    method = str(row["method"])
    facts = run["methods"].get(method, {})
    if facts.get("given"):
        return ""
    words = ["retrace", "show", str(run.get("trace_path", "TRACE"))]
    for flag, name in (
        ("--layer", "layer"),
        ("--head", "head"),
        ("--sequence", "worst_sequence"),
        ("--position", "worst_position"),
        ("--topk", "topk"),
    ):
        words += [flag, str(row[name])]
    words += ["--method", method]
    if run.get("protocol", "all") != "all":
        words += ["--protocol", str(run["protocol"])]
    held_out = run.get("calibration")
    if isinstance(held_out, list) and held_out:
        words += ["--calibration", ",".join(map(str, held_out))]
    elif facts.get("calibration"):
        words += ["--calibration-from", "FILE"]  # which results name by its digest alone
    return shlex.join(words)
