"""`recommend`: the cheapest method and budget of every kv head that meets a target.

Half of the sequences choose, the other half verify. A method at a budget meets the target in a kv
head if, in each of its query heads, the bound does that the mean over other sequences keeps
(`retrace.analyze.recommendation.bounds`). Of those that do, the one that reads fewest bytes is
taken. The mean itself would not do: where it just meets the target, that of other sequences is
beyond it half of the time, and the cheapest of many settings is the luckiest. Where nothing meets
the target, the head keeps full attention.

The bound is for all heads at once. Choosing among settings takes nothing off: one that is chosen
and then misses was lucky in one half and unlucky in the other, and a bound that the difference of
two independent halves may cross with some probability is crossed so with far less.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal, Unpack, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from retrace.analyze.arguments import choose_calibration
from retrace.analyze.commands.analyze import analyze
from retrace.analyze.methods.specs import Methods, listed, parse_specs
from retrace.analyze.metrics.registry import BY_NAME
from retrace.analyze.options import AnalysisOptions, with_defaults
from retrace.analyze.recommendation.bounds import ASSUMES, CONFIDENCE, ENOUGH, upper_bounds
from retrace.analyze.recommendation.choice import Budgets, Share, check_shared
from retrace.analyze.recommendation.choice import choose as choose_settings
from retrace.analyze.recommendation.head_classes import (
    BUDGET,
    CLASSES,
    PROBE,
    SHARE,
    SINKS,
    head_classes,
)
from retrace.analyze.recommendation.recommendation import (
    FORMAT,
    GROUP,
    SETTING,
    Recommendation,
    Target,
)
from retrace.analyze.recommendation.whole_model import choose_together
from retrace.analyze.replay.trials import able_to_learn
from retrace.analyze.results import Results
from retrace.analyze.units.costs import SERVING_ITEMSIZE
from retrace.analyze.units.protocol import Protocol
from retrace.traces import LayerRules, Location, RetraceError, Trace, open_trace
from retrace.traces.progress import ShowDone

log = logging.getLogger("retrace")

Over = Literal["head", "model"]
"""Whose figure meets the target."""
METHODS = ("window", "quest", "sparq")
TOPK = (16, 32, 64, 128, 256)
FIGURES = ("error_norm", "attention_fraction", "recall", "density", "bytes_ratio")
DENSE = {name: metric.full for name, metric in BY_NAME.items()}
"""Figures of full attention."""
_MIXED = "recommended"


def recommend(
    trace: Trace | str | Location,
    target: str,
    methods: Methods = METHODS,
    topk: Sequence[int] = TOPK,
    *,
    share: Share = "head",
    budgets: Budgets = "head",
    over: Over = "head",
    fractions: bool = False,
    progress: ShowDone | None = None,
    **options: Unpack[AnalysisOptions],
) -> Recommendation:
    """The cheapest of these methods and budgets for every kv head that meets a target, chosen on
    one half of the trace's sequences and verified on the other.

    Every other sequence chooses, the first among them; those in between verify. All methods and
    budgets are judged on the same queries.

    Args:
        trace: a trace or where it is: a path or a URL.
        target: such as `attention_fraction=0.95`, which predicts what the model loses best,
            `error_norm=0.05` or `recall=0.9`, to be met by every query head on other sequences, by
            a bound of 95 % under what `ASSUMES` says; `bytes_ratio=0.1` is the least error norm
            within a tenth of the bytes that full attention reads.
        methods: those to choose from, as in `analyze`. Those that share a choice between the heads
            of a layer are judged as if all of them used it.
        topk: budgets to choose from.
        share: which kv heads have one method: each its own (`head`), those of a `layer`, or all of
            the `model`.
        budgets: which have one budget: each its own (`head`), or those of a `layer`.
        over: whose figure meets the target: every `head`'s, or the mean over all heads of the
            `model`, at the least bytes of the whole: heads that gain most by a byte get it.
            `bytes_ratio` then is that of the model, whose mean error norm is least.
        fractions: write budgets as fractions of the context; the sequences must be of one length.
        progress: told how far it is.
        options: `retrace.analyze.options.AnalysisOptions` says what each is. `min_context` is half
            of the shortest sequence by default; sequences without queries from there on are in
            neither half, and neither are `calibration_sequences`.

    Raises:
        RetraceError: fewer than three sequences, a target that nothing meets in any head (with the
            nearest figure), and what `analyze` raises.
    """
    wanted = Target.parse(target)
    check_shared(share, budgets)
    if over not in get_args(Over) or (over == "model" and (share, budgets) != ("head", "head")):
        raise RetraceError(
            f"over {over!r}: expected head or model, and over the model each kv head has its own "
            "method and budget."
        )
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    specs, optional = parse_specs(methods)
    chosen = with_defaults(options, AnalysisOptions)
    given = chosen["calibration_from"] is not None
    specs = specs if given else able_to_learn(trace, specs, optional)
    for spec in specs:
        if spec.method.across_layers and str(spec) not in optional:
            raise RetraceError(
                f"{spec} takes its choice from other layers, so that no head can use it alone."
            )
    min_context = chosen["min_context"]
    if isinstance(min_context, str):
        raise RetraceError("All budgets are judged on the same queries: min_context is a position.")
    learns = any(s.method.calibrated for s in specs)
    if not given and (chosen["calibration_sequences"] is not None or learns):
        held_out = choose_calibration(trace, chosen["calibration_sequences"])
    else:
        held_out = ()
    free = [s for s in trace.sequences if s not in held_out]
    if min_context is None:
        min_context = min(map(trace.length, free), default=0) // 2
    choose, verify = _halves(trace, free, min_context, len(held_out))
    context = _context(trace, [*choose, *verify], chosen["protocol"]) if fractions else None
    if len(choose) < ENOUGH:
        log.warning(
            "Only %d sequences choose: with fewer than %d all heads meet the target somewhat less "
            "often than in %.0f of 100 cases, and it takes more bytes. Capture more.",
            len(choose),
            ENOUGH,
            100 * CONFIDENCE,
        )
    chosen["min_context"] = min_context
    if not given:
        chosen["calibration_sequences"] = held_out or None
    results = analyze(trace, [*listed(methods), PROBE], topk, progress=progress, **chosen)
    # Of `all`, not every method runs on every trace.
    ran = set(results.methods())
    able = [str(s) for s in specs if str(s) in ran and not s.method.across_layers]
    found = choose_and_verify(results, trace, wanted, choose, verify, able, share, budgets, over)
    return found if context is None else found.in_fractions(context)


def _context(trace: Trace, sequences: Sequence[int], protocol: str) -> int:
    """The context that budgets of these sequences are fractions of."""
    contexts = {Protocol.parse(protocol).context(trace.length(s)) for s in sequences}
    if len(contexts) > 1:
        raise RetraceError(
            f"Fractions are of one context, and the sequences have from {min(contexts)} to "
            f"{max(contexts)} positions: capture sequences of one length, or take a protocol that "
            "begins at one position (prefix:P)."
        )
    return contexts.pop()


def _halves(
    trace: Trace, free: Sequence[int], first: int, held_out: int
) -> tuple[list[int], list[int]]:
    """Of these sequences, those that choose and those that verify."""
    counted = [s for s in free if trace.query_positions(s)[-1] >= first]
    if len(counted) < 3:
        besides = f" besides {held_out} for calibration" if held_out else ""
        raise RetraceError(
            f"A recommendation takes at least 3 sequences{besides}, two to choose by and one to "
            f"verify; {trace.path} has {len(counted)} with queries from position {first} on: "
            "capture more, with a larger --limit."
        )
    return counted[::2], counted[1::2]


def choose_and_verify(
    results: Results,
    trace: Trace,
    target: Target,
    choose: Sequence[int],
    verify: Sequence[int],
    methods: Sequence[str],
    share: Share = "head",
    budgets: Budgets = "head",
    over: Over = "head",
) -> Recommendation:
    """A recommendation from results that hold `PROBE` and these methods, over these sequences."""
    rows = results.sequences
    rules = {int(i): trace.layer(i).rules for i in rows["layer"].unique()}
    # What heads that share one cache read can be told of all of them only: they choose as one.
    group = {i: r.group if r.cached_bytes is None else r.heads for i, r in rules.items()}
    rows = rows.assign(kv_head=rows["head"] // rows["layer"].map(group)).astype({"layer": int})
    halves = {
        half: replace(results, sequences=rows[rows["sequence"].isin(list(chosen))])
        for half, chosen in (("choose", choose), ("verify", verify))
    }
    tried = rows[rows["method"].isin(list(methods))]
    bounds = _bounds(tried, target, choose, verify, over=[*GROUP, "head"])
    candidates = _candidates(halves["choose"], bounds, target)
    sizes = {i: _kv_bytes(r) for i, r in rules.items()}
    candidates = candidates.assign(weight=candidates["layer"].map(sizes))
    together: dict[str, float] | None = None
    if over == "model":
        choice, together = choose_together(tried, target, choose, verify, sizes)
    else:
        choice = choose_settings(candidates, target, share, budgets)
    mixed = {half: replace(part, sequences=_as_one(part, choice)) for half, part in halves.items()}
    heads = _heads(results, mixed, bounds, choice, target, rules)
    modules = rows.drop_duplicates("layer").set_index("layer")["module"]
    kv_heads = _each_kv_head(choice, rules).reset_index().astype({"layer": int, "kv_head": int})
    kv_heads.insert(1, "module", kv_heads["layer"].map(modules))
    facts = {
        "retrace_recommendation": FORMAT,
        "retrace": version("retrace-attention"),
        "trace": {"path": str(trace.path), "digests": results.run["trace"]},
        **{name: results.run[name] for name in ("model", "task", "natively_sparse")},
        "target": {"metric": target.metric, "value": target.value},
        "share": {"methods": share, "budgets": budgets},
        "over": over,
        "together": together,
        "confidence": CONFIDENCE,
        "assumes": ASSUMES,
        **{name: results.run[name] for name in ("protocol", "min_context", "serving_dtype")},
        "choose": list(choose),
        "verify": list(verify),
        "calibration": results.run["calibration"] or [],
        "methods": {
            method: {
                k: results.run["methods"][method][k]
                for k in ("name", "parameters", "source", "charged")
            }
            for method in methods
        },
        "topk": results.topk(PROBE),
        "classes": {"share": SHARE, "budget": BUDGET, "sinks": SINKS, "keys": CLASSES},
        "kv_bytes_per_position": {str(i): _kv_bytes(r) for i, r in rules.items()},
        "mean": {half: _model(part) for half, part in mixed.items()},
        **_met(heads, target),
        "one_setting": _one_setting(halves, target, tried, choose, verify),
    }
    return Recommendation(facts, kv_heads, heads)


def _kv_bytes(rules: LayerRules) -> float:
    """Bytes of a position of one kv head."""
    if rules.cached_bytes is None:
        return (rules.key_dim + rules.value_dim) * SERVING_ITEMSIZE
    return rules.cached_bytes / rules.kv_heads


def _bounds(
    tried: pd.DataFrame,
    target: Target,
    choose: Sequence[int],
    verify: Sequence[int],
    over: list[str],
) -> pd.DataFrame:
    """Of each setting and what figures are `over`: the `figure` of the target's metric on the
    sequences that choose, and the `bound` that those of one setting keep together, on as many
    queries as the sequences that verify have."""
    rows = tried[tried["metric"] == target.metric]
    each = rows.pivot_table(["mean", "count"], [*SETTING, *over], "sequence")

    def of(name: str, half: Sequence[int]) -> npt.NDArray[np.float64]:
        columns = pd.MultiIndex.from_product([[name], half])
        return each.reindex(columns=columns).fillna(0).to_numpy(np.float64)

    counts, new_counts = of("count", choose), of("count", verify)
    losses = target.loss(of("mean", choose)).clip(min=0)
    with np.errstate(invalid="ignore"):
        figures = (losses * counts).sum(axis=1) / counts.sum(axis=1)
    bounds = np.empty(len(each))
    for place in each.groupby(SETTING).indices.values():
        bounds[place] = upper_bounds(losses[place], counts[place], new_counts[place])
    found = pd.DataFrame(
        {
            "bound": target.loss(np.nan_to_num(bounds, nan=np.inf)),
            "figure": target.loss(figures),
        },
        index=each.index,
    )
    return found.reset_index()


def _heads(
    results: Results,
    mixed: Mapping[str, Results],
    bounds: pd.DataFrame,
    choice: pd.DataFrame,
    target: Target,
    rules: Mapping[int, LayerRules],
) -> pd.DataFrame:
    """The classes of all heads, and their figures on both halves, as `Recommendation.heads`."""
    group = {layer: r.group for layer, r in rules.items()}
    chosen = choice.reset_index()[[*GROUP, *SETTING]].merge(bounds, how="left")
    bound = chosen.dropna().set_index(["layer", "head"])["bound"]
    keys = ["layer", "head"]
    heads = head_classes(results.curves).join(bound, on=keys)
    heads["bound"] = heads["bound"].fillna(DENSE[target.metric])
    heads.insert(1, "kv_head", heads["head"] // heads["layer"].map(group))
    for half, part in mixed.items():
        figures = part.intervals("head", metrics=FIGURES)
        means = figures.pivot(index=keys, columns="metric", values="mean")
        heads = heads.join(means[list(FIGURES)].add_prefix(f"{half}_"), on=keys)
    return heads.astype({"layer": int, "kv_head": int, "head": int})


def _met(heads: pd.DataFrame, target: Target) -> dict[str, Any]:
    """In how many heads each half meets the target, and where it is missed most, or met least."""
    verify = heads[f"verify_{target.metric}"]
    worst = heads.iloc[verify.argmax() if target.at_most else verify.argmin()]
    return {
        "heads": len(heads),
        "heads_met": {
            half: int(target.met(heads[f"{half}_{target.metric}"]).sum())
            for half in ("choose", "verify")
        },
        "worst_head": {
            "layer": int(worst["layer"]),
            "head": int(worst["head"]),
            target.metric: float(worst[f"verify_{target.metric}"]),
        },
    }


def _each_kv_head(choice: pd.DataFrame, rules: Mapping[int, LayerRules]) -> pd.DataFrame:
    """A choice (layer, kv_head) with a row for each kv head of layers that chose as one."""
    parts = []
    for layer, r in rules.items():
        own = choice[choice.index.get_level_values("layer") == layer]
        if r.cached_bytes is not None:
            own = own.loc[own.index.repeat(r.kv_heads)]
            own.index = pd.MultiIndex.from_product([[layer], range(r.kv_heads)], names=GROUP)
        parts.append(own)
    return pd.concat(parts)


def _candidates(choose: Results, bounds: pd.DataFrame, target: Target) -> pd.DataFrame:
    """Each setting in each kv head (layer, kv_head, method, topk): `bound` and `figure` of the
    target's metric in its worst head, mean `bytes_ratio` and `error_norm`."""
    keys = [*GROUP, *SETTING]
    worst = bounds.groupby(keys)[["bound", "figure"]].agg("max" if target.at_most else "min")
    rows = choose.sequences
    rows = rows[rows["metric"].isin(["bytes_ratio", "error_norm"])]
    rows = rows.assign(total=rows["mean"].astype("float64") * rows["count"])
    sums = rows.groupby([*keys, "metric"])[["total", "count"]].sum()
    means = (sums["total"] / sums["count"]).unstack("metric")
    return worst.join(means).reset_index()


def _as_one(half: Results, choice: pd.DataFrame) -> pd.DataFrame:
    """The rows of the settings chosen, as those of one method."""
    rows = half.sequences
    settings = list(choice.reset_index()[[*GROUP, *SETTING]].itertuples(index=False, name=None))
    chosen = rows[pd.MultiIndex.from_frame(rows[[*GROUP, *SETTING]]).isin(settings)]
    # Full attention was not replayed: its figures are known.
    full = rows[(rows["method"] == PROBE) & (rows["topk"] == rows["topk"].min())]
    kept = choice.index[choice["topk"] == 0]
    full = full[pd.MultiIndex.from_frame(full[GROUP]).isin(kept)]
    full = full.assign(mean=full["metric"].map(DENSE).astype("float32"))
    both: pd.DataFrame = pd.concat([chosen, full], ignore_index=True)
    return both.assign(method=_MIXED, topk=0)


def _model(part: Results) -> dict[str, dict[str, float | None]]:
    """Means over layers and heads by metric, with intervals; None where there is none."""
    found: Any = part.intervals("model", metrics=FIGURES).set_index("metric")
    parts = ("mean", "low", "high")
    return {
        name: {p: None if pd.isna(x := found.loc[name, p]) else float(x) for p in parts}
        for name in FIGURES
    }


def _one_setting(
    halves: Mapping[str, Results],
    target: Target,
    tried: pd.DataFrame,
    choose: Sequence[int],
    verify: Sequence[int],
) -> dict[str, Any] | None:
    """The best method and budget for all layers and heads alike, the mean over which meets the
    target by the same rule; None where there is none."""
    bounds = _bounds(tried, target, choose, verify, over=[]).set_index(SETTING)["bound"]
    methods = list(tried["method"].unique())
    found = halves["choose"].intervals("model", methods=methods, metrics=FIGURES)
    means = found.pivot(index=SETTING, columns="metric", values="mean")
    cost = ["error_norm", "bytes_ratio"] if target.metric == "bytes_ratio" else ["bytes_ratio"]
    meets = means[target.met(bounds.reindex(means.index)) & (means["bytes_ratio"] < 1)]
    meets = meets.sort_values(cost, kind="stable")
    if meets.empty:
        return None
    method, k = meets.index[0]
    alone = {
        half: replace(
            part,
            sequences=part.sequences[
                part.sequences["method"].eq(method) & part.sequences["topk"].eq(k)
            ],
        )
        for half, part in halves.items()
    }
    return {"method": method, "topk": int(k), "mean": {h: _model(p) for h, p in alone.items()}}
