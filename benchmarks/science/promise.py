"""Does `recommend` keep its promise: on a trace's sequences halved anew, and on simulated losses.

    python -m benchmarks.science.promise --trace t.zarr

The trace's sequences choose and verify as in `recommend`, in many ways to draw the halves; beside
it stands what comes of choosing by the means themselves. One draw is the command's own, and has to
come to what `recommend` says. The tables are those of `docs/recommend.md`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.page import origin, parser, publish
from retrace.analyze import analyze
from retrace.analyze.commands.recommend import choose_and_verify
from retrace.analyze.recommendation.bounds import upper_bounds
from retrace.analyze.recommendation.head_classes import PROBE
from retrace.analyze.recommendation.recommendation import Target
from retrace.traces import Trace, open_trace

Array = npt.NDArray[np.float64]
HALVES = ((9, 8), (4, 4), (2, 2))
SIMULATED_HALVES = ((4, 4), (9, 8), (16, 16))
HEADS = 90


def main() -> None:
    """Replay, draw halves, simulate, and print the tables."""
    arguments = _arguments()
    lines = [origin(), "", *_measured(arguments), "", *_chosen_in_simulation(arguments.trials)]
    publish("\n".join([*lines, "", *_bounds_in_simulation(arguments.trials)]), arguments.out)


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--trace", required=True)
    arguments.add_argument("--methods", nargs="+", default=["quest", "sparq", "exact"])
    arguments.add_argument("--topk", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    arguments.add_argument("--min-context", type=int, default=512)
    arguments.add_argument("--trials", type=int, default=200)
    arguments.add_argument(
        "--targets",
        nargs="+",
        default=[
            "error_norm=0.1",
            "error_norm=0.3",
            "attention_fraction=0.95",
            "attention_fraction=0.8",
        ],
    )
    return arguments.parse_args()


@dataclass(frozen=True)
class Figures:
    """What each sequence comes to, settings x heads x sequences."""

    mean: Array
    count: Array
    bytes_ratio: Array
    error_norm: Array


def _measured(arguments: argparse.Namespace) -> list[str]:
    trace = open_trace(arguments.trace)
    counted = [s for s in trace.sequences if trace.query_positions(s)[-1] >= arguments.min_context]
    results = analyze(
        trace, [*arguments.methods, PROBE], arguments.topk, min_context=arguments.min_context
    )
    rng = np.random.default_rng(0)
    lines = [
        "| target | sequences | all heads met it | bytes | where means choose: all met it | bytes "
        "| all bounds of one setting hold |",
        "|---|---|---|---|---|---|---|",
    ]
    own = []
    for text in arguments.targets:
        target = Target.parse(text)
        figures = _figures(results.sequences, arguments.methods, target)
        kv_heads = _kv_heads(trace)
        for halves in HALVES:
            if sum(halves) > len(counted):
                continue
            drawn = [rng.permutation(len(counted))[: sum(halves)] for _ in range(arguments.trials)]
            cells = [
                _kept(figures, kv_heads, target, drawn, halves[0], bounded)
                for bounded in (True, False)
            ]
            held = _bounds_held(figures, target, drawn, halves[0])
            lines.append(
                f"| `{text}` | {halves[0]} + {halves[1]} | {cells[0]} | {cells[1]} "
                f"| {held.min():.0%} to {held.max():.0%} |"
            )
        said = choose_and_verify(
            results, trace, target, counted[::2], counted[1::2], arguments.methods
        )
        met, worst = said.facts["heads_met"]["verify"], said.facts["worst_head"][target.metric]
        ratio = said.facts["mean"]["verify"]["bytes_ratio"]["mean"]
        order = np.r_[0 : len(counted) : 2, 1 : len(counted) : 2]
        halved = len(counted[::2])
        again = _met_and_bytes(figures, kv_heads, target, order[:halved], order[halved:], True)
        if again[0] != (met == said.facts["heads"]) or abs(again[1] - ratio) > 1e-4:
            raise SystemExit(f"recommend says {met} heads and {ratio}, this script {again}")
        own.append(
            f"`{text}`: {met} of {said.facts['heads']} heads, the worst {worst:.4f}, at "
            f"{ratio:.1%} of the bytes"
        )
    budgeted = choose_and_verify(
        results,
        trace,
        Target("bytes_ratio", 0.3),
        counted[::2],
        counted[1::2],
        arguments.methods,
    ).facts
    error = budgeted["mean"]["verify"]["error_norm"]["mean"]
    own.append(
        f"`bytes_ratio=0.3`: {budgeted['heads_met']['verify']} of {budgeted['heads']} heads, the "
        f"worst {budgeted['worst_head']['bytes_ratio']:.4f}, mean error norm {error:.3f}"
    )
    return [*lines, "", "As the command halves the sequences:", "", *(f"- {line}" for line in own)]


def _figures(rows: pd.DataFrame, methods: list[str], target: Target) -> Figures:
    rows = rows[rows["method"].isin(methods)].astype({"method": str, "metric": str})
    axes = ["method", "topk", "layer", "head", "sequence"]

    def of(metric: str, name: str) -> Array:
        column = rows[rows["metric"] == metric].set_index(axes)[name].astype("float64")
        table = column.unstack(["layer", "head", "sequence"]).sort_index(axis=1)
        sequences = table.columns.get_level_values("sequence").nunique()
        return table.to_numpy().reshape(len(table), -1, sequences)

    return Figures(
        of(target.metric, "mean"),
        of(target.metric, "count"),
        of("bytes_ratio", "mean"),
        of("error_norm", "mean"),
    )


def _kv_heads(trace: Trace) -> npt.NDArray[np.int64]:
    """Where each kv head's query heads begin, those of all layers in one row."""
    groups = [
        group
        for i in trace.layers
        for rules in (trace.layer(i).rules,)
        for group in [rules.group] * (rules.heads // rules.group)
    ]
    return np.cumsum([0, *groups[:-1]])


def _met_and_bytes(
    figures: Figures,
    kv_heads: npt.NDArray[np.int64],
    target: Target,
    choose: npt.NDArray[np.int64],
    verify: npt.NDArray[np.int64],
    bounded: bool,
) -> tuple[bool, float]:
    """Whether all heads meet the target on the sequences that verify, and their mean bytes."""
    losses = target.loss(figures.mean[..., choose]).clip(min=0)
    counts, new_counts = figures.count[..., choose], figures.count[..., verify]
    if bounded:
        bounds = np.array(
            [upper_bounds(*of) for of in zip(losses, counts, new_counts, strict=True)]
        )
    else:
        bounds = _mean(losses, counts)
    worst = np.maximum.reduceat(bounds, kv_heads, axis=1)
    cost = _mean(figures.bytes_ratio[..., choose], counts)
    cost = np.add.reduceat(cost, kv_heads, axis=1) / np.diff([*kv_heads, cost.shape[1]])
    limit = target.value if target.at_most else 1 - target.value
    cost[(worst > limit) | (cost >= 1)] = np.inf
    best = cost.argmin(axis=0)
    sizes = np.diff([*kv_heads, bounds.shape[1]])
    setting = np.repeat(best, sizes)
    dense = np.repeat(np.isinf(cost.min(axis=0)), sizes)
    heads = np.arange(bounds.shape[1])
    lost = _mean(target.loss(figures.mean[..., verify]), new_counts)[setting, heads]
    read = _mean(figures.bytes_ratio[..., verify], new_counts)[setting, heads]
    return bool((lost <= limit)[~dense].all()), float(np.where(dense, 1, read).mean())


def _mean(values: Array, counts: Array) -> Array:
    mean: Array = (values * counts).sum(axis=2) / counts.sum(axis=2)
    return mean


def _kept(
    figures: Figures,
    kv_heads: npt.NDArray[np.int64],
    target: Target,
    drawn: list[npt.NDArray[np.int64]],
    chooses: int,
    bounded: bool,
) -> str:
    found = [
        _met_and_bytes(figures, kv_heads, target, of[:chooses], of[chooses:], bounded)
        for of in drawn
    ]
    met, read = (np.mean(column) for column in zip(*found, strict=True))
    return f"{met:.1%} | {read:.1%}"


def _bounds_held(
    figures: Figures, target: Target, drawn: list[npt.NDArray[np.int64]], chooses: int
) -> Array:
    """How often, for each setting, the bounds of all heads hold together."""
    held = np.zeros(len(figures.mean))
    for of in drawn:
        losses, counts = target.loss(figures.mean[..., of]).clip(min=0), figures.count[..., of]
        new = _mean(losses[..., chooses:], counts[..., chooses:])
        for i in range(len(held)):
            bounds = upper_bounds(
                losses[i, :, :chooses], counts[i, :, :chooses], counts[i, :, chooses:]
            )
            held[i] += bool((new[i] <= bounds).all())
    return held / len(drawn)


def _chosen_in_simulation(trials: int) -> list[str]:
    """Heads that choose among budgets whose losses are a factor 1.25 apart."""
    rng = np.random.default_rng(0)
    lines = ["| sequences | all of 90 simulated heads met the target |", "|---|---|"]
    for ours, theirs in HALVES:
        met = 0
        for _ in range(5 * trials):
            spread = 0.15 * np.sqrt(8 / rng.chisquare(8, HEADS))[:, None]
            scale = rng.uniform(0.1, 0.6, HEADS)[:, None]
            shared = rng.normal(size=(HEADS, ours + theirs))
            reached = np.zeros(HEADS)
            for budget in range(15):  # the dearest first
                noise = 0.8 * shared + 0.6 * rng.normal(size=shared.shape)
                values = scale * 0.1 * 1.25**budget * np.exp(spread * noise)
                bounds = upper_bounds(
                    values[:, :ours], np.ones((HEADS, ours)), np.ones((HEADS, theirs))
                )
                kept = bounds <= 0.1
                reached[kept] = values[kept, ours:].mean(axis=1)
            met += bool((reached <= 0.1).all())
        lines.append(f"| {ours} + {theirs} | {met / (5 * trials):.1%} |")
    return lines


Losses = Callable[[np.random.Generator, int], Array]


def _spread(rng: np.random.Generator, spread: Array | float, sequences: int) -> Array:
    losses: Array = np.exp(spread * rng.normal(size=(HEADS, sequences)))
    return losses


def _alike(rng: np.random.Generator, n: int) -> Array:
    return _spread(rng, 0.15, n)


def _unlike(rng: np.random.Generator, n: int) -> Array:
    return _spread(rng, 0.15 * np.exp(0.6 * rng.normal(size=(HEADS, 1))), n)


def _nine_wild(rng: np.random.Generator, n: int) -> Array:
    return _spread(rng, np.where(np.arange(HEADS) < 9, 0.6, 0.1)[:, None], n)


def _rare(share: float, times: float, heads: int) -> Losses:
    return lambda rng, n: (
        _spread(rng, 0.1, n) * np.where(rng.random((heads, n)) < share, times, 1.0)
    )


SIMULATED: dict[str, Losses] = {
    "all heads vary by 15 %": _alike,
    "heads vary by 15 % times exp(0.6 z), z standard normal": _unlike,
    "nine heads vary by 60 %, the others by 10 %": _nine_wild,
    "one text in 20 is three times as hard for all heads": _rare(0.05, 3, 1),
    "one text in 10 is twice as hard for all heads": _rare(0.1, 2, 1),
    "for each head by itself, one text in 50 is twice as hard": _rare(0.02, 2, HEADS),
    "for each head by itself, one text in 20 is three times as hard": _rare(0.05, 3, HEADS),
}


def _bounds_in_simulation(trials: int) -> list[str]:
    """How often the bounds of all heads hold together, by how losses vary from text to text."""
    rng = np.random.default_rng(0)
    names = " | ".join(f"{ours} + {theirs}" for ours, theirs in SIMULATED_HALVES)
    lines = [f"| losses from text to text | {names} |", "|---" * (len(SIMULATED_HALVES) + 1) + "|"]
    for name, losses in SIMULATED.items():
        cells = []
        for ours, theirs in SIMULATED_HALVES:
            held = 0
            for _ in range(5 * trials):
                values = losses(rng, ours + theirs)
                bounds = upper_bounds(
                    values[:, :ours], np.ones((HEADS, ours)), np.ones((HEADS, theirs))
                )
                held += bool((values[:, ours:].mean(axis=1) <= bounds).all())
            cells.append(f"{held / (5 * trials):.0%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
