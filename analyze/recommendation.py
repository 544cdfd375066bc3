"""`recommend`: the cheapest method and budget of every kv head that meets a target.

Half of the sequences choose, the other half verify. A method at a budget meets the target in a kv
head if, over the sequences that choose, the far end of the 95 % interval of the figure meets it in
each of its query heads: the upper end where less is better, the lower where more is. Of those that
do, the one that reads fewest bytes is taken. The mean itself would not do: where it just meets the
target, the truth is beyond it half of the time, and the cheapest of many settings is the luckiest.
Where nothing meets the target, the head keeps full attention.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import pandas as pd

from retrace.analyze.head_classes import BUDGET, CLASSES, PROBE, SHARE, SINKS, head_classes
from retrace.analyze.intervals import CONFIDENCE, ENOUGH
from retrace.analyze.methods.registry import parse_specs
from retrace.analyze.results import Results
from retrace.analyze.run import analyze
from retrace.analyze.scope import choose_calibration
from retrace.analyze.tasks import Progress
from retrace.traces import Location, RetraceError, Trace, open_trace

log = logging.getLogger("retrace")

FORMAT = 1
"""Of the JSON file; it goes up when a reader of the earlier one would misread it."""
METHODS = ("window", "quest", "sparq")
TOPK = (16, 32, 64, 128, 256)
AT_MOST = {"error_norm": True, "attention_fraction": False, "recall": False, "bytes_ratio": True}
"""What can be asked for, and whether the target is the most or the least that will do."""
FIGURES = ("error_norm", "attention_fraction", "recall", "density", "bytes_ratio")
DENSE = {"error_norm": 0.0, "bytes_ratio": 1.0}
"""Figures of full attention; the others are 1 too."""
GROUP = ["layer", "kv_head"]
SETTING = ["method", "topk"]
_MIXED = "recommended"


@dataclass(frozen=True)
class Target:
    """A bound on a metric. `bytes_ratio` asks for the least error norm within it, the others for
    the fewest bytes."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `error_norm=0.05`.

        Raises:
            RetraceError: an unknown metric, or a value out of range.
        """
        metric, _, number = (part.strip() for part in text.partition("="))
        if metric not in AT_MOST:
            near = get_close_matches(metric, AT_MOST)
            guess = f" Did you mean {near[0]}?" if near else ""
            raise RetraceError(
                f"There is no target {metric!r}.{guess} Targets: {', '.join(AT_MOST)}, as in "
                "error_norm=0.05."
            )
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not (0 < value if metric == "error_norm" else 0 < value <= 1):
            kind = "above 0" if metric == "error_norm" else "above 0 and at most 1"
            raise RetraceError(f"The target {text!r} needs a number {kind}, as in {metric}=0.1.")
        return cls(metric, value)

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return AT_MOST[self.metric]

    def met(self, figures: Any) -> Any:
        """Whether figures meet it, one by one."""
        return figures <= self.value if self.at_most else figures >= self.value

    def __str__(self) -> str:
        return f"{self.metric} at {'most' if self.at_most else 'least'} {self.value:g}"


@dataclass(frozen=True)
class Recommendation:
    """A method and a budget for every kv head, and what they come to on sequences that did not
    choose them."""

    facts: dict[str, Any]
    """Of the whole: see `docs/recommend.md`."""
    kv_heads: pd.DataFrame
    """One row per (layer, module, kv_head): method, topk (0 for full attention), chosen (whether
    it meets the target), and bytes_ratio."""
    heads: pd.DataFrame
    """One row per (layer, kv_head, head): class, the mass on each class's keys (sink, local,
    retrieval), and `<half>_<figure>` for the halves choose and verify; `bound` is the end of the
    interval that had to meet the target."""

    @property
    def target(self) -> Target:
        """What was asked for."""
        return Target(**self.facts["target"])

    def to_json(self) -> dict[str, Any]:
        """All of it, as the file has it."""
        layers: list[dict[str, Any]] = []
        heads = {at: rows for at, rows in self.heads.groupby(GROUP)}
        for (layer, module), rows in self.kv_heads.groupby(["layer", "module"], sort=False):
            groups = [
                {
                    **{name: row[name] for name in ("kv_head", *SETTING, "chosen", "bytes_ratio")},
                    "heads": heads[row["layer"], row["kv_head"]]
                    .drop(columns=GROUP)
                    .to_dict("records"),
                }
                for row in rows.to_dict("records")
            ]
            layers.append({"layer": layer, "module": module, "kv_heads": groups})
        return {**self.facts, "layers": layers}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Raises:
            RetraceError: it is of another format.
        """
        if content.get("retrace_recommendation") != FORMAT:
            raise RetraceError(
                f"This is no recommendation of format {FORMAT} "
                f"(but {content.get('retrace_recommendation')}): `retrace recommend` makes them."
            )
        facts = {name: value for name, value in content.items() if name != "layers"}
        groups, heads = [], []
        for layer in content["layers"]:
            for group in layer["kv_heads"]:
                own = {"layer": layer["layer"], "kv_head": group["kv_head"]}
                groups.append(
                    {"layer": layer["layer"], "module": layer["module"]}
                    | {name: value for name, value in group.items() if name != "heads"}
                )
                heads += [own | head for head in group["heads"]]
        return cls(facts, pd.DataFrame(groups), pd.DataFrame(heads))

    def save(self, file: str | Path) -> None:
        """Write the JSON file, whole."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.partial")
        aside.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        aside.replace(file)

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a file back.

        Raises:
            RetraceError: it is none, or of another format.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RetraceError(f"{file} is not a recommendation ({error}).") from error
        return cls.from_json(content)

    def table(self) -> pd.DataFrame:
        """One row per kv head: layer, kv head, the classes of its heads, method and budget, bytes
        ratio, and of its worst head the target's metric on both halves, with whether the verify
        half meets the target."""
        target = self.target
        metric, worst = target.metric, "max" if target.at_most else "min"
        heads = self.heads.groupby(GROUP)
        found = self.kv_heads.set_index(GROUP)
        verify = heads[f"verify_{metric}"].agg(worst)
        table = pd.DataFrame(
            {
                "Classes": heads["class"].agg(", ".join),
                "Method": [
                    f"{m}, {k}" if k else m for m, k in found[SETTING].itertuples(index=False)
                ],
                "Bytes Ratio": found["bytes_ratio"],
                "Bound": heads["bound"].agg(worst),
                "Choose": heads[f"choose_{metric}"].agg(worst),
                "Verify": verify,
                "Met": ["yes" if met else "no" for met in target.met(verify)],
            },
            index=found.index,
        )
        table.insert(0, "Layer", found["module"])
        table.insert(1, "KV Head", [str(kv_head) for _, kv_head in found.index])
        return table.reset_index(drop=True)


def recommend(
    trace: Trace | str | Location,
    target: str,
    methods: Sequence[str] = METHODS,
    topk: Sequence[int] = TOPK,
    *,
    protocol: str = "all",
    min_context: int | None = None,
    layers: Sequence[int] | None = None,
    calibration_sequences: Sequence[int] | None = None,
    device: str = "auto",
    workers: int | None = None,
    keep_exact: bool = True,
    progress: Progress | None = None,
) -> Recommendation:
    """The cheapest of these methods and budgets for every kv head that meets a target, chosen on
    one half of the trace's sequences and verified on the other.

    Every other sequence chooses, the first among them; those in between verify. All methods and
    budgets are judged on the same queries.

    Args:
        trace: a trace or where it is: a path or a URL.
        target: such as `error_norm=0.05`, `attention_fraction=0.95` or `recall=0.9`, to be met by
            every query head; `bytes_ratio=0.1` is the least error norm within a tenth of the bytes
            that full attention reads.
        methods: method specs to choose from. Those that share a choice between the heads of a
            layer are judged as if all of them used it.
        topk: budgets to choose from.
        protocol: as in `analyze`.
        min_context: the first position that counts, whatever the budget; half of the shortest
            sequence if None.
        layers: indices of the layers; all recorded ones if None.
        calibration_sequences: those that methods learn from, which are in neither half; by default
            the last quarter if a method needs them.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        workers: as in `analyze`.
        keep_exact: as in `analyze`.
        progress: told how far it is.

    Raises:
        RetraceError: fewer than three sequences, a target that nothing meets in any head (with the
            nearest figure), and what `analyze` raises.
    """
    wanted = Target.parse(target)
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    specs, optional = parse_specs(methods)
    for spec in specs:
        if spec.method.across_layers and str(spec) not in optional:
            raise RetraceError(
                f"{spec} takes its choice from other layers, so that no head can use it alone."
            )
    learns = calibration_sequences is not None or any(s.method.calibrated for s in specs)
    held_out = choose_calibration(trace, calibration_sequences) if learns else ()
    choose, verify = _halves(trace, held_out)
    if len(choose) < ENOUGH:
        log.warning(
            "Only %d sequences choose: intervals over fewer than %d hold the mean less often than "
            "they say, so that more heads than expected miss the target. Capture more.",
            len(choose),
            ENOUGH,
        )
    shortest = min(trace.length(s) for s in (*choose, *verify))
    results = analyze(
        trace,
        [*methods, PROBE],
        topk,
        protocol=protocol,
        min_context=shortest // 2 if min_context is None else min_context,
        layers=layers,
        calibration_sequences=held_out or None,
        device=device,
        workers=workers,
        keep_exact=keep_exact,
        progress=progress,
    )
    # Of `all`, not every method runs on every trace.
    ran = set(results.methods())
    able = [str(s) for s in specs if str(s) in ran and not s.method.across_layers]
    return choose_and_verify(results, trace, wanted, choose, verify, able)


def _halves(trace: Trace, held_out: Sequence[int]) -> tuple[list[int], list[int]]:
    """The sequences that choose and those that verify."""
    free = [s for s in trace.sequences if s not in held_out]
    if len(free) < 3:
        besides = f" besides {len(held_out)} for calibration" if held_out else ""
        raise RetraceError(
            f"A recommendation takes at least 3 sequences{besides}, two to choose by and one to "
            f"verify; {trace.path} has {len(free)}: capture more, with a larger --limit."
        )
    return free[::2], free[1::2]


def choose_and_verify(
    results: Results,
    trace: Trace,
    target: Target,
    choose: Sequence[int],
    verify: Sequence[int],
    methods: Sequence[str],
) -> Recommendation:
    """A recommendation from results that hold `PROBE` and these methods, over these sequences."""
    rows = results.sequences
    group = {int(i): trace.layer(i).rules.group for i in rows["layer"].unique()}
    rows = rows.assign(kv_head=rows["head"] // rows["layer"].map(group)).astype({"layer": int})
    halves = {
        half: replace(results, sequences=rows[rows["sequence"].isin(list(chosen))])
        for half, chosen in (("choose", choose), ("verify", verify))
    }
    choice = _chosen(_candidates(halves["choose"], target, methods, group), target)
    mixed = {half: replace(part, sequences=_as_one(part, choice)) for half, part in halves.items()}
    heads = _heads(results, mixed, target, group)
    modules = rows.drop_duplicates("layer").set_index("layer")["module"]
    kv_heads = choice.reset_index().astype({"layer": int, "kv_head": int})
    kv_heads.insert(1, "module", kv_heads["layer"].map(modules))
    facts = {
        "retrace_recommendation": FORMAT,
        "retrace": version("retrace-attention"),
        "trace": {"path": str(trace.path), "digests": results.run["trace"]},
        **{name: results.run[name] for name in ("model", "task")},
        "target": {"metric": target.metric, "value": target.value},
        "confidence": CONFIDENCE,
        **{name: results.run[name] for name in ("protocol", "min_context")},
        "choose": list(choose),
        "verify": list(verify),
        "calibration": results.run["calibration"] or [],
        "methods": {
            method: {k: results.run["methods"][method][k] for k in ("name", "parameters", "source")}
            for method in methods
        },
        "topk": results.topk(PROBE),
        "classes": {"share": SHARE, "budget": BUDGET, "sinks": SINKS, "keys": CLASSES},
        "kv_bytes_per_position": {
            str(i): (rules.key_dim + rules.value_dim) * trace.dtype.itemsize
            for i in group
            for rules in (trace.layer(i).rules,)
        },
        "mean": {half: _model(part) for half, part in mixed.items()},
        **_met(heads, target),
        "one_setting": _one_setting(halves, target, methods),
    }
    return Recommendation(facts, kv_heads, heads)


def _heads(
    results: Results, mixed: Mapping[str, Results], target: Target, group: Mapping[int, int]
) -> pd.DataFrame:
    """The classes of all heads, and their figures on both halves, as `Recommendation.heads`."""
    heads = head_classes(results.curves)
    heads.insert(1, "kv_head", heads["head"] // heads["layer"].map(group))
    keys = ["layer", "head"]
    for half, part in mixed.items():
        figures = part.intervals("head", metrics=FIGURES)
        if half == "choose":
            ends = figures[figures["metric"] == target.metric].set_index(keys)
            heads = heads.join(ends["high" if target.at_most else "low"].rename("bound"), on=keys)
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


def _candidates(
    choose: Results, target: Target, methods: Sequence[str], group: Mapping[int, int]
) -> pd.DataFrame:
    """Each setting in each kv head (layer, kv_head, method, topk): `bound` and `figure` of the
    target's metric in its worst head, mean `bytes_ratio` and `error_norm`."""
    found = choose.intervals("head", methods=methods, metrics=[target.metric])
    found["kv_head"] = found["head"] // found["layer"].map(group)
    keys = [*GROUP, *SETTING]
    heads = found.groupby(keys, sort=False)
    end, worst = ("high", "max") if target.at_most else ("low", "min")
    table = pd.DataFrame({"bound": heads[end].agg(worst), "figure": heads["mean"].agg(worst)})
    rows = choose.sequences
    rows = rows[rows["metric"].isin(["bytes_ratio", "error_norm"])]
    rows = rows.assign(total=rows["mean"].astype("float64") * rows["count"])
    sums = rows.groupby([*keys, "metric"])[["total", "count"]].sum()
    means = (sums["total"] / sums["count"]).unstack("metric")
    return table.join(means).reset_index()


def _chosen(candidates: pd.DataFrame, target: Target) -> pd.DataFrame:
    """The setting of each kv head (layer, kv_head): method, topk, chosen, bytes_ratio.

    Raises:
        RetraceError: nothing meets the target anywhere.
    """
    budgeted = target.metric == "bytes_ratio"
    meets = candidates[target.met(candidates["bound"]) & (candidates["bytes_ratio"] < 1)]
    if meets.empty:
        ascending = target.at_most
        nearest = candidates.sort_values("bound", ascending=ascending).iloc[0]
        raise RetraceError(
            f"Nothing tried meets {target} in any head: nearest is {nearest['method']}, top-k "
            f"{nearest['topk']} in layer {nearest['layer']}, kv head {nearest['kv_head']}, with "
            f"{nearest['figure']:.4g} (bound {nearest['bound']:.4g}). Ask for less, or try other "
            "methods or budgets with --method and --topk."
        )
    cost = ["error_norm", "bytes_ratio"] if budgeted else ["bytes_ratio", "error_norm"]
    best = meets.sort_values(cost, kind="stable").drop_duplicates(GROUP).set_index(GROUP)
    if budgeted:
        least = candidates.sort_values("bytes_ratio", kind="stable").drop_duplicates(GROUP)
        others = least.set_index(GROUP)
    else:
        others = candidates.drop_duplicates(GROUP).set_index(GROUP)
        others = others.assign(method="dense", topk=0, bytes_ratio=1.0)
    others = others[~others.index.isin(best.index)]
    both = pd.concat([best.assign(chosen=True), others.assign(chosen=False)]).sort_index()
    choice: pd.DataFrame = both[[*SETTING, "chosen", "bytes_ratio"]]
    return choice.astype({"topk": int, "bytes_ratio": float})


def _as_one(half: Results, choice: pd.DataFrame) -> pd.DataFrame:
    """The rows of the settings chosen, as those of one method."""
    rows = half.sequences
    settings = list(choice.reset_index()[[*GROUP, *SETTING]].itertuples(index=False, name=None))
    chosen = rows[pd.MultiIndex.from_frame(rows[[*GROUP, *SETTING]]).isin(settings)]
    # Full attention was not replayed: its figures are known.
    full = rows[(rows["method"] == PROBE) & (rows["topk"] == rows["topk"].min())]
    kept = choice.index[choice["topk"] == 0]
    full = full[pd.MultiIndex.from_frame(full[GROUP]).isin(kept)]
    full = full.assign(mean=full["metric"].map(DENSE).fillna(1.0).astype("float32"))
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
    halves: Mapping[str, Results], target: Target, methods: Sequence[str]
) -> dict[str, Any] | None:
    """The best method and budget for all layers and heads alike, the mean over which meets the
    target by the same rule; None where there is none."""
    found = halves["choose"].intervals("model", methods=methods, metrics=FIGURES)
    end = "high" if target.at_most else "low"
    ends = found[found["metric"] == target.metric].set_index(SETTING)[end]
    means = found.pivot(index=SETTING, columns="metric", values="mean")
    cost = ["error_norm", "bytes_ratio"] if target.metric == "bytes_ratio" else ["bytes_ratio"]
    meets = means[target.met(ends.reindex(means.index)) & (means["bytes_ratio"] < 1)]
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
