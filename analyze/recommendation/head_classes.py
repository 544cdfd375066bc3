"""Which keys a head's attention is on: sinks, recent keys, few others, or many."""

import pandas as pd

SINKS = 4
"""First keys of a sequence that count as sinks, as in StreamingLLM (arXiv:2309.17453)."""
PROBE = f"window:keep=sink:{SINKS}"
"""A method whose attention fraction at budget k is the mass on the sinks and the k - 4 newest keys,
and at budget 4 that on the sinks."""
BUDGET = 64
SHARE = 0.8
CLASSES: dict[str, str] = {
    "sink": f"the first {SINKS} keys",
    "local": f"the first {SINKS} keys and the most recent ones",
    "retrieval": "the keys of largest score, wherever they are",
    "diffuse": "no set of so few keys",
}
"""What holds `SHARE` of a head's attention mass, in `BUDGET` keys at most; the first that does
names the head."""


def head_classes(curves: pd.DataFrame) -> pd.DataFrame:
    """The class of each head, from `Results.curves` that hold `PROBE`.

    A head is of the first class whose keys hold at least `SHARE` of its attention mass, mean over
    queries; see `CLASSES`. Sink and local heads are what DuoAttention (arXiv:2410.10819) calls
    streaming heads, and others retrieval heads, of which diffuse ones have no few keys to retrieve.
    That paper learns the classes by their effect; these follow from attention alone.

    Returns:
        Columns: layer, head, class, and the mass on each class's keys: sink, local, retrieval.
        The budget is the largest up to `BUDGET` that the curves have.
    """
    probe = curves[curves["method"] == PROBE]
    budgets = probe.loc[probe["metric"] == "attention_fraction", "topk"]
    most = int(budgets[budgets <= BUDGET].max())

    def mass(metric: str, k: int) -> "pd.Series[float]":
        rows = probe[(probe["metric"] == metric) & (probe["topk"] == k)]
        return rows.set_index(["layer", "head"])["mean"]

    masses = pd.DataFrame(
        {
            "sink": mass("attention_fraction", min(SINKS, most)),
            "local": mass("attention_fraction", most),
            "retrieval": mass("exact_attention_fraction", most),
        }
    ).sort_index()
    holds = masses >= SHARE
    masses.insert(
        0, "class", holds.idxmax(axis="columns").where(holds.any(axis="columns"), "diffuse")
    )
    return masses.reset_index()
