"""What models of 8 and 70 billion parameters take at 128k tokens: storage, time and money.

    python -m benchmarks.speed.costs --out docs/costs.md

No time is measured here. Each figure follows from the shape of a model, a formula that the page
states (`costs.template.md` is its text) and from rates that were measured: those of
`results/rates.yaml` and of the tables that `long_replay.py` and `memory.py` wrote
(`results/long-replay-*.md`, `results/memory.md`). Prices are assumptions, and options.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml

from retrace.analyze.exact.store import KEPT_RANKS
from retrace.traces.queries import parse_queries

RESULTS = Path(__file__).parents[1] / "results"
TOKENS = 1 << 17
QUERIES = ("all", "last:256")
BYTES = 2
"""Of a bfloat16."""
SHARED = "read, exact pass, exact"
GPU_GIB = 78
"""Memory of an H100."""

Rates = dict[str, Any]
"""What results/rates.yaml holds."""


@dataclass(frozen=True)
class Model:
    """The shape of a Llama."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    channels: int
    hidden: int
    intermediate: int
    vocabulary: int = 128256

    @property
    def multiplied(self) -> int:
        """Parameters that each token is multiplied with: all but the embeddings."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.channels
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All of them, less the norms'."""
        return self.multiplied + self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        """Bytes of the parameters."""
        return self.parameters * BYTES

    def operations(self, tokens: int) -> int:
        """Of the forward pass over a sequence."""
        attention = 2 * self.layers * self.heads * self.channels * tokens**2
        return 2 * self.multiplied * tokens + attention

    def trace_bytes(self, tokens: int, queries: int) -> int:
        """Of queries, keys and values of a sequence."""
        vectors = queries * self.heads + 2 * tokens * self.kv_heads
        return self.layers * vectors * self.channels * BYTES

    def answer_bytes(self, queries: int) -> int:
        """Of the exact answers that `analyze` keeps: keys, normalizer and output of each query."""
        return self.layers * self.heads * queries * (4 * KEPT_RANKS + 8 + 4 * self.channels)


SMALL = Model("8B", 32, 32, 8, 128, 4096, 14336)
LARGE = Model("70B", 80, 64, 8, 128, 8192, 28672)
MODELS = (SMALL, LARGE)
CASES = [(model, queries) for model in MODELS for queries in QUERIES]


@dataclass(frozen=True)
class Kept:
    """The queries that a trace holds of a sequence."""

    name: str
    tokens: int = TOKENS

    @cached_property
    def positions(self) -> Any:
        """Their positions."""
        return parse_queries(self.name).positions(self.tokens).astype(np.int64)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.positions)

    @property
    def scores(self) -> int:
        """Pairs of a query of one head and a key that it sees."""
        return int(self.positions.sum()) + self.count


@dataclass(frozen=True)
class Replay:
    """The table of one run of `long_replay.py`: a layer of the 8B shape."""

    machine: str
    file: str
    seconds: dict[tuple[int, str, str], float]
    """By positions, queries and step."""
    estimated: frozenset[tuple[int, str, str]]
    """Those that the table states without having run them."""

    @classmethod
    def read(cls, file: Path) -> "Replay":
        """Of a table in Markdown."""
        lines = file.read_text(encoding="utf-8").splitlines()
        seconds, estimated = {}, set()
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) != 5 or not cells[0].replace(",", "").isdigit():
                continue
            at = (int(cells[0].replace(",", "")), cells[1], cells[3])
            seconds[at] = float(re.sub(r"[^\d.]", "", cells[4]))
            if "left out" in cells[4]:
                estimated.add(at)
        return cls(lines[0].partition(";")[0], file.name, seconds, frozenset(estimated))

    @classmethod
    def of_methods(cls, file: Path, machine: str) -> "Replay":
        """Of the table that `memory.py` wrote of runs of one method, a layer on each thread: what
        a run of `exact` takes, and what the others take beside it."""
        text = file.read_text(encoding="utf-8")
        found = {
            m[1]: float(m[2]) for m in re.finditer(r"^\| ([\w-]+) \|.*\| (\d+) \|$", text, re.M)
        }
        seconds = {SHARED: found["exact"]}
        seconds |= {method: found[method] - found["exact"] for method in ("quest", "sparq")}
        at = {(TOKENS, "last:256", step): value for step, value in seconds.items()}
        return cls(machine, file.name, at, frozenset())

    @property
    def steps(self) -> list[str]:
        """In the table's order."""
        return list(dict.fromkeys(step for _, _, step in self.seconds))

    def layer(self, queries: str, step: str) -> tuple[float, bool]:
        """Seconds of a step of a layer at 128k tokens, and whether they were measured there: if
        not, they grow from the longest that was, if there is one with these queries, reading with
        bytes and all else with scores."""
        known = [at for at in self.seconds if at[2] == step]
        at = max([at for at in known if at[1] == queries] or known)
        longest, there, here = at[0], Kept(at[1], at[0]), Kept(queries)
        if step == "read":
            ratio = SMALL.trace_bytes(TOKENS, here.count) / SMALL.trace_bytes(longest, there.count)
        else:
            ratio = here.scores / there.scores
        measured = at[:2] == (TOKENS, queries) and at not in self.estimated
        return self.seconds[at] * ratio, measured

    def model(self, model: Model, queries: str, step: str) -> tuple[float, bool]:
        """The same of all layers of a model; of one with other heads than the table's, by bytes and
        by scores."""
        seconds, measured = self.layer(queries, step)
        count = Kept(queries).count
        work = model.heads * model.layers / SMALL.heads
        if step == "read":
            own = model.trace_bytes(TOKENS, count)
            work = SMALL.layers * own / SMALL.trace_bytes(TOKENS, count)
        return seconds * work, measured and model is SMALL


def main() -> None:
    """Make the page, and write it where asked."""
    arguments = parse()
    text = page(arguments)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The prices, and where the page goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="price of a GPU's hour, $")
    parser.add_argument("--core-hour", type=float, default=0.05, help="price of a core's hour, $")
    parser.add_argument("--tb-month", type=float, default=25.0, help="price of a TB's month, $")
    parser.add_argument("--gbit", type=float, default=10.0, help="of a link to an object store")
    parser.add_argument("--out", type=Path, help="write the page to this file")
    return parser.parse_args(words)


def page(prices: argparse.Namespace) -> str:
    """The page in Markdown."""
    rates = yaml.safe_load((RESULTS / "rates.yaml").read_text(encoding="utf-8"))
    replays = [Replay.read(file) for file in sorted(RESULTS.glob("long-replay-*.md"))]
    replays.append(Replay.of_methods(RESULTS / "memory.md", rates["cpu"]["machine"]))
    template = Path(__file__).with_name("costs.template.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        tokens=f"{TOKENS:,}",
        gpus=gpus(LARGE, rates),
        activations=f"{activations(LARGE, rates):.0f}",
        **{name: f"{price:g}" for name, price in vars(prices).items() if name != "out"},
        shapes=_shapes(),
        ranks=KEPT_RANKS,
        storage=_storage(prices),
        tflops=f"{per_second(rates) / 1e12:.0f}",
        copy=rates["copy"]["gb_per_second"],
        disk=rates["disk"]["gb_per_second"],
        capture=_captures(rates, prices),
        checks=_checks(rates),
        analysis="\n".join(_analysis(replay, prices) for replay in replays),
        rates=_rates(rates, replays).rstrip("\n"),
    )


def per_second(rates: Rates) -> float:
    """Operations of a forward pass."""
    return SMALL.operations(TOKENS) / float(rates["forward"]["seconds"])


def activations(model: Model, rates: Rates) -> float:
    """GiB that a forward pass takes beside the weights."""
    beside = float(rates["forward"]["gib"]) - SMALL.weights / 2**30
    return beside * model.hidden / SMALL.hidden


def gpus(model: Model, rates: Rates) -> int:
    """H100s that hold a model's layers one after the other, and its activations each."""
    return ceil(model.weights / 2**30 / (GPU_GIB - activations(model, rates)))


def capture_steps(model: Model, queries: str, rates: Rates) -> dict[str, float]:
    """Seconds of each step of a capture, which go on at the same time."""
    size = model.trace_bytes(TOKENS, Kept(queries).count) / 1e9
    return {
        "model": model.operations(TOKENS) / per_second(rates),
        "copy": size / rates["copy"]["gb_per_second"],
        "disk": size / rates["disk"]["gb_per_second"],
    }


def _shapes() -> str:
    rows = [
        [
            model.name,
            model.layers,
            model.heads,
            model.kv_heads,
            model.channels,
            f"{model.parameters / 1e9:.2f} · 10⁹",
            f"{model.weights / 1e9:.0f} GB",
            f"{model.operations(TOKENS) / 1e15:.1f} · 10¹⁵",
        ]
        for model in MODELS
    ]
    head = ["model", "layers L", "heads H", "kv heads G", "channels d"]
    return _table([*head, "parameters", "weights", "operations of the forward pass"], rows)


def _storage(prices: argparse.Namespace) -> str:
    rows = []
    for model, queries in CASES:
        count = Kept(queries).count
        trace, answers = model.trace_bytes(TOKENS, count), model.answer_bytes(count)
        rows.append(
            [
                f"{model.name}, `{queries}`",
                f"{trace / TOKENS / 1e3:,.0f} KB",
                f"{trace / 1e9:,.1f} GB",
                f"{answers / 1e9:,.1f} GB",
                *(f"${size / 1e12 * prices.tb_month:,.2f}" for size in (trace, answers)),
            ]
        )
    head = ["model, queries", "trace, each token", "trace", "exact answers"]
    return _table([*head, "trace, a month", "answers, a month"], rows)


def _captures(rates: Rates, prices: argparse.Namespace) -> str:
    rows = []
    for model, queries in CASES:
        about = "" if model is SMALL else "about "
        size = model.trace_bytes(TOKENS, Kept(queries).count) / 1e9
        steps = capture_steps(model, queries, rates)
        link = size / (prices.gbit / 8)
        disk, store = dict(steps), {"model": steps["model"], "network": link}
        hours = max(steps.values()) / 3600
        rows.append(
            [
                f"{model.name}, `{queries}`",
                *(f"{about}{seconds:.1f}" for seconds in (*steps.values(), link)),
                f"{about}{_limit(disk)}",
                f"{about}${hours * gpus(model, rates) * prices.gpu_hour:,.2f}",
                f"{about}{_limit(store)}",
                f"{about}{size / steps['model']:.1f} GB/s",
            ]
        )
    head = ["model, queries", "model, s", "copy, s", "disk, s", "network, s", "to disk", "money"]
    return _table([*head, "to a store, at least", "keeps up"], rows)


def _limit(steps: dict[str, float]) -> str:
    name = max(steps, key=lambda step: steps[step])
    return f"{steps[name]:.0f} s, by {name}"


def _checks(rates: Rates) -> str:
    checks = []
    for capture in rates["captures"]:
        tokens, queries = capture["tokens"], capture["queries"]
        size = SMALL.trace_bytes(tokens, Kept(queries, tokens).count) / 1e9
        expected = max(capture["forward"], size / rates["disk"]["gb_per_second"])
        checks.append(
            f"{expected:.1f} s for {tokens:,} tokens and `{queries}`, measured "
            f"{capture['seconds']:.1f}"
        )
    return "; ".join(checks)


def _analysis(replay: Replay, prices: argparse.Namespace) -> str:
    """What one run's rates come to."""
    gpu = "NVIDIA" in replay.machine
    price = prices.gpu_hour if gpu else prices.core_hour
    columns = [
        {step: replay.model(model, queries, step) for step in replay.steps}
        for model, queries in CASES
    ]
    rows = [[step, *(_seconds(*c[step]) for c in columns)] for step in replay.steps]
    totals = [sum(seconds for seconds, _ in c.values()) for c in columns]
    whole = [all(measured for _, measured in c.values()) for c in columns]
    rows.append(["together", *map(_seconds, totals, whole)])
    slowest = [max(c, key=lambda step: c[step][0]) for c in columns]
    rows.append(["most of it", *(_named(step) for step in slowest)])
    money = [f"${total / 3600 * price:,.2f}" for total in totals]
    rows.append(["money", *(m if w else f"about {m}" for m, w in zip(money, whole, strict=True))])
    head = ["seconds", *(f"{model.name}, `{queries}`" for model, queries in CASES)]
    return f"{replay.machine}, {'one GPU' if gpu else 'one core'}:\n\n{_table(head, rows)}"


def _named(step: str) -> str:
    return step if step in ("read", "exact pass", SHARED) else f"{step}: search and metrics"


def _rates(rates: Rates, replays: Sequence[Replay]) -> str:
    rows = []
    for rate in (rates["forward"], rates["copy"], rates["disk"]):
        seconds = rate.get("seconds")
        value = f"{rate['gb_per_second']:g} GB/s" if seconds is None else f"{seconds:g} s"
        rows.append([rate["what"], value, rate["machine"], rate["source"]])
    for replay in replays:
        link = f"[{replay.file}](../benchmarks/results/{replay.file})"
        rows.append(["steps of replaying a layer of the 8B shape", "", replay.machine, link])
    return _table(["what", "rate", "machine", "source"], rows)


def _seconds(seconds: float, measured: bool) -> str:
    figure = f"{seconds:.1f}" if seconds < 10 else f"{float(f'{seconds:.3g}'):,.0f}"
    return figure if measured else f"about {figure}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    main()
