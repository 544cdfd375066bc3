"""Which setting each kv head gets: the cheapest that meets the target, or the best within bytes.

A stack that serves a model may take one method for a layer, or for all of it (`share`), and one
budget for a layer (`budget`). A method is then judged by what the best budgets under it come to
together. Where none meets the target, full attention stands in, which every method is at a budget
of everything.
"""

from typing import Literal, get_args

import pandas as pd

from retrace.analyze.recommendation.recommendation import GROUP, SETTING, Target
from retrace.traces import RetraceError

Share = Literal["head", "layer", "model"]
"""Of which kv heads have one method: each alone, all of a layer, or all."""
Budgets = Literal["head", "layer"]
"""Of which kv heads have one budget."""
WITHIN: dict[str, list[str]] = {"head": GROUP, "layer": ["layer"], "model": []}
"""The columns that tell those apart."""


def check_shared(share: str, budget: str) -> None:
    """Refuse what cannot be shared so.

    Raises:
        RetraceError: another word, or one budget where methods differ.
    """
    for name, value, known in (
        ("share", share, get_args(Share)),
        ("budgets", budget, get_args(Budgets)),
    ):
        if value not in known:
            raise RetraceError(f"{name} {value!r}: expected {' or '.join(known)}.")
    if budget == "layer" and share == "head":
        raise RetraceError(
            "One budget for a layer takes one method for it: share methods by layer or model too."
        )


def choose(
    candidates: pd.DataFrame, target: Target, share: Share = "head", budget: Budgets = "head"
) -> pd.DataFrame:
    """The setting of each kv head (layer, kv_head): method, topk, chosen, bytes_ratio.

    Args:
        candidates: each setting in each kv head (layer, kv_head, method, topk), with `bound` and
            `figure` of the target's metric, `bytes_ratio`, `error_norm`, and the `weight` that the
            kv head's bytes have in the model's.
        target: what is asked for.
        share: which kv heads have one method.
        budget: which have one budget.

    Raises:
        RetraceError: nothing meets the target anywhere, or saves bytes.
    """
    _check_any(candidates, target)
    budgeted = target.metric == "bytes_ratio"
    at = WITHIN[budget]
    rows = candidates.assign(
        read=candidates["bytes_ratio"] * candidates["weight"],
        missing=~(target.met(candidates["bound"]) & (candidates["bytes_ratio"] < 1)),
    )
    totals = {"missing": "max", "read": "sum", "error_norm": "sum", "weight": "sum"}
    settings = rows.groupby([*at, *SETTING], sort=False).agg(totals).reset_index()
    if not budgeted:  # where a setting misses, full attention stands in
        full = settings["missing"]
        settings["topk"] = settings["topk"].mask(full, 0)
        settings["read"] = settings["read"].mask(full, settings["weight"])
        settings["error_norm"] = settings["error_norm"].mask(full, 0.0)
    settings["spare"] = settings["read"].where(settings["missing"], 0.0)
    cost = ["error_norm", "read"] if budgeted else ["read", "error_norm"]
    order = ["missing", *(["spare"] if budgeted else []), *cost]
    best = settings.sort_values(order, kind="stable").drop_duplicates([*at, "method"])
    within = WITHIN[share]
    summed = best.assign(missing=best["missing"].astype(int))
    totals = {"missing": "sum", "spare": "sum", "error_norm": "sum", "read": "sum"}
    summed = summed.groupby([*within, "method"], sort=False).agg(totals).reset_index()
    if not budgeted:
        order = cost  # full attention has its bytes, and no head is missing
    summed = summed.sort_values(order, kind="stable")
    winners = summed.drop_duplicates(within) if within else summed.head(1)
    best = best.merge(winners[[*within, "method"]], on=[*within, "method"])
    heads = candidates[GROUP].drop_duplicates()
    choice = heads.merge(best[[*at, *SETTING, "missing"]], on=at)
    known = candidates[[*GROUP, *SETTING, "bytes_ratio"]]
    choice = choice.merge(known, on=[*GROUP, *SETTING], how="left")
    full = choice["topk"] == 0
    choice["method"] = choice["method"].mask(full, "dense")
    choice["bytes_ratio"] = choice["bytes_ratio"].mask(full, 1.0)
    choice["chosen"] = ~choice["missing"].astype(bool)
    choice = choice.set_index(GROUP).sort_index()[[*SETTING, "chosen", "bytes_ratio"]]
    return choice.astype({"topk": int, "bytes_ratio": float})


def _check_any(candidates: pd.DataFrame, target: Target) -> None:
    cheaper = candidates[candidates["bytes_ratio"] < 1]
    if cheaper.empty:
        raise RetraceError(
            "Nothing tried reads fewer bytes than full attention in any head: try other methods, "
            "or smaller budgets with --topk."
        )
    if target.met(cheaper["bound"]).any():
        return
    nearest = cheaper.sort_values("bound", ascending=target.at_most).iloc[0]
    raise RetraceError(
        f"Nothing tried meets {target} in any head: nearest is {nearest['method']}, top-k "
        f"{nearest['topk']} in layer {nearest['layer']}, kv head {nearest['kv_head']}, with "
        f"{nearest['figure']:.4g} (bound {nearest['bound']:.4g}). Ask for less, try other "
        "methods or budgets with --method and --topk, or capture more sequences."
    )
