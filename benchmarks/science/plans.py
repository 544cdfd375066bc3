"""Does a plan keep in the loop what it promises, and is it worth more than one setting for all?

    python -m benchmarks.science.plans --data wikitext-2 --page docs/recommend.md

SmolLM2 reads 1,024 tokens at a time of WikiText-2. `recommend` chooses a plan for an error norm of
0.1 on the validation text. On the test text, which chose nothing, each layer's error is measured in
replay and in the loop, and the model's likelihood with the plan is held against that with each
method alone at the budget that reads as many bytes. Traces are kept in `--work`, so that a run that
was cut short goes on. The section goes into the page between its marks.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.page import parser, publish
from retrace.analyze import Plan, Recommendation, Results, analyze, draw_plan, recommend
from retrace.analyze.tables.intervals import interval_of_mean
from retrace.capture import capture
from retrace.traces import Trace

FIRST = 512
"""The first query that a plan answers."""
LENGTH = 1024
BUDGETS = (16, 32, 64, 128, 256)
MARKS = "<!-- plans: {} -->"
"""Around the section, `begin` and `end`."""


def main() -> None:
    """Run what is missing, and write the section."""
    arguments = _arguments()
    work: Path = arguments.work
    chooses = _exact(work / "choose.zarr", arguments.data / "valid.txt", arguments.choose)
    text = _exact(work / "text.zarr", arguments.data / "test.txt", arguments.text)
    shared: dict[str, Any] = {"protocol": f"prefix:{FIRST}", "min_context": FIRST, "workers": 1}
    if not (work / "plan.json").exists():
        found = recommend(chooses, arguments.target, arguments.methods, BUDGETS, **shared)
        found.save(work / "plan.json")
    found, plan = Recommendation.load(work / "plan.json"), Plan.load(work / "plan.json")
    named = f"plan:{work / 'plan.json'}"
    tried = analyze(text, [*arguments.methods, named], BUDGETS, out=work / "replay", **shared)
    ours = _mean(tried, f"plan:{plan.digest}", None, "bytes_ratio")
    alone = {m: _budget(tried, m, ours) for m in arguments.methods}
    for method, k in alone.items():
        tried = analyze(text, method, [k], out=work / "replay", **shared)
    run = _loop(text, named, None, work / "loop-plan.zarr", layers=None)
    others = {
        (m, k): _loop(text, m, k, work / f"loop-{i}.zarr", layers=[0])
        for i, (m, k) in enumerate(alone.items())
    }
    within = analyze(run, named, out=work / "loop-errors", **shared)
    lines = _section(arguments, found, plan, tried, within, text, run, others)
    if arguments.page is not None:
        draw_plan(plan, arguments.page.with_name("plan.png"))
        _insert(arguments.page, lines)
    publish("\n".join(lines), arguments.out)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="valid.txt and test.txt")
    options.add_argument("--work", type=Path, default=Path("build/plans"))
    options.add_argument("--page", type=Path, help="put the section into this page, and the map by")
    options.add_argument("--target", default="error_norm=0.1")
    options.add_argument("--methods", nargs="+", default=["window", "quest", "sparq"])
    options.add_argument("--choose", type=int, default=8, help="sequences that choose and verify")
    options.add_argument("--text", type=int, default=8, help="sequences that chose nothing")
    return options.parse_args()


def _exact(out: Path, text: Path, limit: int) -> Trace:
    return capture(
        "builtin:smollm2", text=[text], limit=limit, max_length=LENGTH, dtype="float32", out=out,
        resume=True,
    )  # fmt: skip


def _loop(text: Trace, method: str, k: int | None, out: Path, layers: list[int] | None) -> Trace:
    return capture(
        reference=text.path, approximate=method, topk=k, from_position=FIRST, layers=layers,
        out=out, resume=True,
    )  # fmt: skip


def _mean(results: Results, method: str, k: int | None, metric: str) -> float:
    rows = results.metrics
    rows = rows[(rows["method"] == method) & (rows["metric"] == metric)]
    return float(rows.loc[rows["topk"] == k, "mean"].mean() if k else rows["mean"].mean())


def _budget(results: Results, method: str, ratio: float) -> int:
    """The budget at which a method reads that share of the bytes, between those that were tried."""
    ratios = [_mean(results, method, k, "bytes_ratio") for k in BUDGETS]
    if ratios[-1] < ratio:  # beyond the largest, by the last two
        step = (BUDGETS[-1] - BUDGETS[-2]) / (ratios[-1] - ratios[-2])
        return int(BUDGETS[-1] + step * (ratio - ratios[-1]))
    return max(1, int(np.interp(ratio, ratios, BUDGETS)))


def _losses(exact: Trace, run: Trace) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Of each sequence: the loss of likelihood over the tokens predicted, in all, and how many."""
    apart = [
        (run.nll(s)[FIRST:-1].astype(float) - exact.nll(s)[FIRST:-1].astype(float))
        for s in exact.sequences
    ]
    return np.array([part.sum() for part in apart]), np.array([len(part) for part in apart])


def _perplexity(trace: Trace) -> float:
    nll = np.concatenate([trace.nll(s)[FIRST:-1].astype(float) for s in trace.sequences])
    return float(np.exp(nll.mean()))


def _layer_errors(results: Results, method: str) -> pd.DataFrame:
    """By layer: the mean error norm, and that of the worst head."""
    rows = results.metrics
    rows = rows[(rows["method"] == method) & (rows["metric"] == "error_norm")]
    return rows.groupby("layer")["mean"].agg(["mean", "max"])


def _section(
    arguments: argparse.Namespace,
    found: Recommendation,
    plan: Plan,
    tried: Results,
    within: Results,
    text: Trace,
    run: Trace,
    others: dict[tuple[str, int], Trace],
) -> list[str]:
    name = f"plan:{plan.digest}"
    heads = found.heads
    replay, loop = _layer_errors(tried, name), _layer_errors(within, name)
    met = [
        int((rows.loc[rows["metric"] == "error_norm", "mean"] <= found.target.value).sum())
        for rows in (r.metrics[r.metrics["method"] == name] for r in (tried, within))
    ]
    dense = sum(setting.full for setting in plan.settings.values())
    counts = ", ".join(f"{n} times {what}" for what, n in list(plan.counts().items())[:6])
    lines = [
        f"SmolLM2-135M, all {len(plan.layers)} layers in float32. The target is "
        f"{found.facts['target']['metric']} of at most {found.target.value:g} in every head. The "
        f"plan is chosen on {len(found.facts['choose'])} + {len(found.facts['verify'])} sequences "
        f"of {LENGTH:,} tokens of WikiText-2's validation text. It runs on {len(text.sequences)} "
        f"of the test text, with queries from position {FIRST} on. "
        "`python -m benchmarks.science.plans --data FOLDER --page docs/recommend.md` makes this "
        "section.",
        "",
        f"![The plan](plan.png) The plan's {len(plan.settings)} kv heads: {dense} keep full "
        f"attention; most frequent are {counts}.",
        "",
        f"Of {len(heads)} heads, {met[0]} keep to the target in replay of the test text, and "
        f"{met[1]} in the loop. There the error is each layer's own, for the inputs that errors of "
        "lower layers leave it.",
        "",
        "| layer | bound, worst head | promised, mean | replay, mean | worst head | in the loop, "
        "mean | worst head |",
        "|---|---|---|---|---|---|---|",
    ]
    said = heads.groupby("layer")[["bound", "verify_error_norm"]].agg(["max", "mean"])
    for layer in plan.layers:
        cells = [
            said.loc[layer, ("bound", "max")],
            said.loc[layer, ("verify_error_norm", "mean")],
            *replay.loc[layer],
            *loop.loc[layer],
        ]
        lines.append(f"| {layer} | {' | '.join(f'{float(cell):.3f}' for cell in cells)} |")
    lines += [
        "",
        f"Exact perplexity is {_perplexity(text):.2f}. Each method alone has the same budget "
        "everywhere, so chosen that it reads the bytes of the plan. In brackets 95 % intervals "
        "over sequences.",
        "",
        "| setting | bytes | mean error norm | perplexity | loss in nats per token | plan loses "
        "less by |",
        "|---|---|---|---|---|---|",
    ]
    ours, count = _losses(text, run)
    better: list[str] = []
    for label, method, k, of in [
        ("the plan", name, None, run),
        *((f"`{m}`, {k}", m, k, trace) for (m, k), trace in others.items()),
    ]:
        lost, _ = _losses(text, of)
        low, high = interval_of_mean(lost, count)
        cell = "-"
        if of is not run:
            less = interval_of_mean(lost - ours, count)
            mean = (lost - ours).sum() / count.sum()
            cell = f"{mean:+.4f} [{less[0]:+.4f}, {less[1]:+.4f}]"
            better += [label] if less[0] > 0 else []
        lines.append(
            f"| {label} | {_mean(tried, method, k, 'bytes_ratio'):.1%} | "
            f"{_mean(tried, method, k, 'error_norm'):.4f} | {_perplexity(of):.2f} | "
            f"{lost.sum() / count.sum():+.4f} [{low:+.4f}, {high:+.4f}] | {cell} |"
        )
    told = f"better than {' and '.join(better)} alone" if better else "better than none alone"
    sequences = len(text.sequences)
    lines += [
        "",
        f"At 95 %, over {sequences} sequences, the plan is {told}; where an interval holds 0, the "
        "two are not told apart. Budgets come as near to the plan's bytes as pages and whole "
        "keys allow.",
    ]
    return lines


def _insert(page: Path, lines: list[str]) -> None:
    """Put lines between the marks of a page."""
    begin, end = MARKS.format("begin"), MARKS.format("end")
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text("\n".join([before + begin, "", *lines, "", end]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
