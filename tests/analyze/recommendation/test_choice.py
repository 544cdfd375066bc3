"""The choice among shared settings is what trying every combination comes to."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze.recommendation.choice import check_shared, choose
from retrace.analyze.recommendation.recommendation import Target
from retrace.traces import RetraceError

METHODS, TOPK, LAYERS, KV_HEADS = ("a", "b", "c"), (8, 16), (0, 3), 2
WEIGHTS = {0: 2.0, 3: 1.0}
AT = list(itertools.product(LAYERS, range(KV_HEADS)))


def candidates(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for (layer, kv_head), method in itertools.product(AT, METHODS):
        start, error = rng.uniform(0.05, 0.5), rng.uniform(0.1, 0.5)
        for k in TOPK:
            rows.append(
                {
                    "layer": layer,
                    "kv_head": kv_head,
                    "method": method,
                    "topk": k,
                    "bound": error * 12 / k,
                    "figure": error * 10 / k,
                    "bytes_ratio": start * k / 8 * 1.3,
                    "error_norm": error * 10 / k,
                    "weight": WEIGHTS[layer],
                }
            )
    return pd.DataFrame(rows)


def best_of_all(rows: pd.DataFrame, limit: float, share: str, budget: str) -> float:
    """The least bytes of any assignment that the rules allow, each tried."""
    table = rows.set_index(["layer", "kv_head", "method", "topk"])

    def cost(at: Any, method: str, k: int) -> float:
        row = table.loc[(*at, method, k)]
        fits = row["bound"] <= limit and row["bytes_ratio"] < 1
        return float(row["bytes_ratio"] * row["weight"]) if fits else np.inf

    def of_heads(heads: Any, method: str) -> float:
        """With one budget for all of these heads, or full attention in all of them."""
        full = sum(WEIGHTS[layer] for layer, _ in heads)
        return min(full, *(sum(cost(at, method, k) for at in heads) for k in TOPK))

    best = np.inf
    owners = {"head": AT, "layer": list(LAYERS), "model": [0]}[share]
    for methods in itertools.product(METHODS, repeat=len(owners)):
        named = dict(zip(owners, methods, strict=True))

        def method_of(at: Any, named: dict[Any, str] = named) -> str:
            return named[{"head": at, "layer": at[0], "model": 0}[share]]

        if budget == "head":
            total = sum(of_heads([at], method_of(at)) for at in AT)
        else:
            groups = [[at for at in AT if at[0] == layer] for layer in LAYERS]
            total = sum(of_heads(heads, method_of(heads[0])) for heads in groups)
        best = min(best, total)
    return best


@pytest.mark.parametrize(
    ("share", "budget"),
    [
        ("head", "head"),
        ("layer", "head"),
        ("layer", "layer"),
        ("model", "head"),
        ("model", "layer"),
    ],
)
def test_against_trying_everything(share: Any, budget: Any) -> None:
    full = mixed = 0
    for seed in range(30):
        rows = candidates(seed)
        limit = 0.27
        found = choose(rows, Target("error_norm", limit), share, budget)
        weights = np.array([WEIGHTS[layer] for layer, _ in found.index])
        total = float((found["bytes_ratio"] * weights).sum())
        assert total == pytest.approx(best_of_all(rows, limit, share, budget))
        used = found[found["method"] != "dense"]
        within = {"head": 1, "layer": "layer", "model": lambda _: 0}
        if share != "head":
            assert (used.groupby(within[share])["method"].nunique() <= 1).all()
        if budget == "layer":
            assert (found.groupby("layer")["topk"].nunique() == 1).all()
        full += int((found["method"] == "dense").sum())
        mixed += int(used["method"].nunique() > 1)
        assert (found["chosen"] == (found["method"] != "dense")).all()
    assert full > 3
    assert share == "model" or mixed > 3


def test_sharing_costs() -> None:
    target = Target("error_norm", 0.35)
    for seed in range(20):
        rows = candidates(seed)
        weights = np.array([WEIGHTS[layer] for layer, _ in AT])
        totals = [
            float((choose(rows, target, *how)["bytes_ratio"] * weights).sum())
            for how in (("head", "head"), ("layer", "head"), ("model", "head"), ("model", "layer"))
        ]
        assert totals == sorted(totals)


def test_within_bytes() -> None:
    """The least error of a method whose heads are all within, else of the fewest beyond."""
    rows = candidates(0).assign(bound=lambda r: r["bytes_ratio"], figure=lambda r: r["bytes_ratio"])
    target = Target("bytes_ratio", 0.6)
    found = choose(rows, target, "model", "layer")
    scores = {}
    for method in METHODS:
        missing, error, read = 0, 0.0, 0.0
        for layer in LAYERS:
            own = rows[(rows["method"] == method) & (rows["layer"] == layer)]
            by_budget = own.groupby("topk").agg(
                {"bytes_ratio": ["max", "sum"], "error_norm": "sum"}
            )
            fits = by_budget[by_budget["bytes_ratio", "max"] <= 0.6]
            if fits.empty:
                missing += 1
                read += WEIGHTS[layer] * by_budget["bytes_ratio", "sum"].min()
            else:
                error += fits["error_norm", "sum"].min()
        scores[method] = (missing, read, error)
    assert found["method"].unique().tolist() == [min(scores, key=lambda m: scores[m])]


def test_what_cannot_be_shared() -> None:
    with pytest.raises(RetraceError, match="One budget for a layer takes one method"):
        check_shared("head", "layer")
    with pytest.raises(RetraceError, match="share 'group': expected head or layer or model"):
        check_shared("group", "head")
