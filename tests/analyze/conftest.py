"""Synthetic traces, and the definitions of every figure in plain float64, one query at a time."""

import os
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which other tests do too

from retrace.traces import LayerRules, Trace, create_trace, open_trace
from retrace.traces.schema import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = tuple[Array, Array, Array]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"heads": 4, "kv_heads": 2},
    "one kv head": {"heads": 3, "kv_heads": 1},
    "one head": {"heads": 1, "kv_heads": 1},
    "window": {"window": 13},
    "narrow window": {"window": 3},
    "chunk": {"chunk": 16},
    "softcap": {"softcap": 8.0},
    "sinks": {"heads": 4, "kv_heads": 2, "sinks": (0.5, -1.0, 2.0, 4.0)},
    "wide values": {"value_dim": 24},
    "narrow values": {"value_dim": 3},
    "everything": {
        "heads": 6,
        "kv_heads": 2,
        "value_dim": 5,
        "window": 21,
        "softcap": 8.0,
        "sinks": (0.0, 1.0, 2.0, -1.0, 3.0, 0.5),
    },
}
"""Every kind of rule a layer can have, by name."""


def layer_rules(**changes: Any) -> LayerRules:
    """Rules of a small layer: 2 heads of 8 channels unless changed."""
    sizes = {"module": "layer", "heads": 2, "kv_heads": 2, "key_dim": 8, "value_dim": 8}
    return LayerRules(**{**sizes, "scale": 0.5, **changes})


def random_tensors(rules: LayerRules, length: int, rng: np.random.Generator) -> Tensors:
    """Query (heads, positions, channels), key (kv_heads, positions, channels) and
    value (kv_heads, positions, value channels) that make attention peaked.

    Keys drift along the sequence, share a mean and start with one that all queries like.
    Queries and keys lie on a grid of quarters: their products are exact in float32 as well as in
    float64, so that both rank alike, and ties are frequent.
    """
    mean = rng.normal(size=(rules.kv_heads, 1, rules.key_dim))
    drift = rng.normal(size=(rules.kv_heads, length, rules.key_dim)).cumsum(axis=1)
    drift /= np.sqrt(np.arange(1, length + 1))[:, None]
    key = mean + drift + 0.7 * rng.normal(size=drift.shape)
    query = 1.2 * rng.normal(size=(rules.heads, length, rules.key_dim))
    query += 0.5 * np.repeat(mean, rules.group, axis=0)
    key[:, 0] = 2 * mean[:, 0]
    value = 1 + rng.normal(size=(rules.kv_heads, length, rules.value_dim))
    return np.round(query * 4) / 4, np.round(key * 4) / 4, value


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors this small take longer to share out than to compute with."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_traces() -> dict[str, Trace]:
    """Traces of random tensors that several tests read."""
    return {}


@pytest.fixture
def make_trace(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: dict[str, Trace],
) -> Callable[..., Trace]:
    """A function that writes a trace and opens it.

    Takes the rules of its layers, the lengths of its sequences, the positions of the kept queries
    (all, if not given), tensors by (layer, sequence) in place of random ones, a seed, and more that
    `create_trace` is told, such as marks. With a name the trace is the test's own; a nameless one
    of random tensors is shared.
    """

    def make(
        rules: LayerRules | Sequence[LayerRules],
        lengths: Sequence[int] = (53, 1, 24),
        *,
        dtype: str = "float32",
        queries: Sequence[Sequence[int]] | None = None,
        tensors: dict[tuple[int, int], Tensors] | None = None,
        name: str | None = None,
        seed: int = 0,
        **more: Any,
    ) -> Trace:
        if name is None and tensors is None:
            asked = repr((rules, lengths, dtype, queries, seed, more))
            if asked not in shared_traces:
                path = tmp_path_factory.mktemp("shared") / "trace"
                shared_traces[asked] = make(
                    rules,
                    lengths,
                    dtype=dtype,
                    queries=queries,
                    name=str(path),
                    seed=seed,
                    **more,
                )
            return shared_traces[asked]
        layers = [rules] if isinstance(rules, LayerRules) else list(rules)
        rng = np.random.default_rng(seed)
        positions = [
            np.arange(n, dtype=np.int32) if queries is None else np.array(queries[s], np.int32)
            for s, n in enumerate(lengths)
        ]
        writer = create_trace(
            tmp_path / f"{name or 'trace'}.zarr",
            rules={i: replace(r, module=f"model.layers.{i}") for i, r in enumerate(layers)},
            tokens=[rng.integers(0, 99, n).astype(np.int32) for n in lengths],
            query_positions=positions,
            dtype=dtype,
            attributes={"model": "random", "task": "none"},
            **more,
        )
        for sequence, length in enumerate(lengths):
            for layer, layer_rules in enumerate(layers):
                given = random_tensors(layer_rules, length, rng)
                if tensors is not None and (layer, sequence) in tensors:
                    given = tensors[layer, sequence]
                query, key, value = (t.astype(DTYPES[dtype]) for t in given)
                writer.write_layer(sequence, layer, query[:, positions[sequence]], key, value)
            writer.finish_sequence(sequence, rng.random(length, np.float32))
        writer.close()
        return open_trace(writer.path)

    return make


@pytest.fixture
def rules() -> Callable[..., LayerRules]:
    """Rules of a small layer, with changes."""
    return layer_rules


@pytest.fixture
def tensors() -> Callable[[LayerRules, int, np.random.Generator], Tensors]:
    """Random tensors of one sequence that make attention peaked."""
    return random_tensors


@pytest.fixture(params=RULES, ids=list(RULES))
def any_rules(request: pytest.FixtureRequest) -> LayerRules:
    """Every kind of rule, one after another."""
    return layer_rules(**RULES[request.param])


@dataclass(frozen=True)
class Query:
    """One query of one head with all keys and values of its kv head, in float64."""

    rules: LayerRules
    head: int
    position: int
    query: Array
    """(channels,)"""
    group: Array
    """The same position's queries of all heads of the group (group, channels)."""
    keys: Array
    """(positions, channels)"""
    values: Array
    """(positions, value channels)"""

    @cached_property
    def visible(self) -> Array:
        """The keys that the query sees, ascending."""
        i, window, chunk = self.position, self.rules.window, self.rules.chunk
        return np.array(
            [
                j
                for j in range(i + 1)
                if (window is None or i - j < window)
                and (chunk is None or j // chunk == i // chunk)
            ]
        )

    @cached_property
    def scores(self) -> Array:
        """s_ij for every key, -inf for those it does not see."""
        return self.scores_of(self.query)

    def scores_of(self, query: Array) -> Array:
        """The same for another query at this position."""
        s = self.rules.scale * (self.keys @ query)
        if self.rules.softcap is not None:
            s = self.rules.softcap * np.tanh(s / self.rules.softcap)
        scores = np.full(len(s), -np.inf)
        scores[self.visible] = s[self.visible]
        return scores

    @cached_property
    def sink(self) -> float:
        """exp of the head's sink, 0 where the layer has none."""
        return 0.0 if self.rules.sinks is None else float(np.exp(self.rules.sinks[self.head]))

    @cached_property
    def probabilities(self) -> Array:
        """p_ij for every key."""
        return np.exp(self.scores - self._log_total(self.scores))

    @cached_property
    def output(self) -> Array:
        """o_i"""
        return self.probabilities @ self.values

    def best(self, scores: Array, k: int) -> list[int]:
        """The k visible keys of largest score, ties to the lower key."""
        return sorted(map(int, self.visible), key=lambda j: (-scores[j], j))[:k]

    def top(self, k: int) -> list[int]:
        """T_k(i)"""
        return self.best(self.scores, k)

    def renormalised(self, ids: Sequence[int]) -> Array:
        """Softmax over these keys only, the sink in the denominator, times their values."""
        chosen = np.array(ids, int)
        scores = self.scores[chosen]
        return np.exp(scores - self._log_total(scores)) @ self.values[chosen]

    def _log_total(self, scores: Array) -> float:
        """log of the sum of exp(score) and the sink's share: scores may be of any size."""
        sink = -np.inf if self.rules.sinks is None else self.rules.sinks[self.head]
        return float(np.logaddexp.reduce([*scores, sink]))

    def figures(self, ids: Sequence[int], k: int, output: Array | None = None) -> dict[str, float]:
        """Every figure but the bytes, for keys attended in order of rank under budget k."""
        assert len(set(ids)) == len(ids) and set(ids) <= set(self.visible)
        output = self.renormalised(ids) if output is None else output
        error = np.linalg.norm(self.output - output)
        return {
            "recall": len(set(ids[:k]) & set(self.top(k))) / min(k, len(self.visible)),
            "attended_recall": len(set(ids) & set(self.top(k))) / min(k, len(self.visible)),
            "error_norm": error / np.linalg.norm(self.output),
            "attention_fraction": self.probabilities[list(ids)].sum(),
            "exact_attention_fraction": self.probabilities[self.top(k)].sum(),
            "density": len(ids) / len(self.visible),
        }


@cache
def all_queries(trace: Trace, layer: int = 0) -> list[list[Query]]:
    """The queries of a layer, the heads of one group at one position together."""
    recorded = trace.layer(layer)
    rules = recorded.rules
    groups = []
    for sequence in trace.sequences:
        query, key, value = (
            read(sequence).astype(np.float64)
            for read in (recorded.query, recorded.key, recorded.value)
        )
        for kv_head in range(rules.kv_heads):
            heads = range(kv_head * rules.group, (kv_head + 1) * rules.group)
            for row, position in enumerate(trace.query_positions(sequence)):
                group = query[heads.start : heads.stop, row]
                groups.append(
                    [
                        Query(
                            rules,
                            h,
                            int(position),
                            query[h, row],
                            group,
                            key[kv_head],
                            value[kv_head],
                        )
                        for h in heads
                    ]
                )
    return groups


Select = Callable[[Query, int], Sequence[int]]
Expected = pd.DataFrame


def expected_figures(
    trace: Trace,
    select: Select,
    k: int,
    *,
    layer: int = 0,
    first: int | None = None,
    aux: Callable[[Query], float] = lambda query: 0.0,
    holds_keys: bool = False,
    output: Callable[[Query, Sequence[int]], Array] | None = None,
    counts: Callable[[Query], bool] = lambda query: True,
) -> Expected:
    """Mean, std and count by (metric, head) of a method that attends `select(query, k)`.

    `first` is the first position that counts (10 k if not given), and `counts` says which queries
    do from there on; `aux` is the bytes of what a group reads to find its keys, `holds_keys`
    whether those are the keys themselves, `output` the method's own output.
    """
    samples: dict[tuple[str, int], list[float]] = defaultdict(list)
    rules = trace.layer(layer).rules
    key_bytes, value_bytes = 2 * rules.key_dim, 2 * rules.value_dim  # as served
    for group in all_queries(trace, layer):
        if group[0].position < (10 * k if first is None else first) or not counts(group[0]):
            continue
        chosen = [list(select(query, k)) for query in group]
        union = len(set().union(*chosen))
        read = union * (value_bytes if holds_keys else key_bytes + value_bytes) + aux(group[0])
        for query, ids in zip(group, chosen, strict=True):
            own = None if output is None else output(query, ids)
            figures = query.figures(ids, k, own)
            full = len(query.visible) * (key_bytes + value_bytes)
            for metric, figure in {**figures, "bytes_ratio": read / full}.items():
                samples[metric, query.head].append(figure)
    return (
        pd.DataFrame(
            [(*at, np.mean(x), np.std(x), len(x)) for at, x in samples.items()],
            columns=["metric", "head", "mean", "std", "count"],
        )
        .set_index(["metric", "head"])
        .sort_index()
    )


@pytest.fixture
def queries_of() -> Callable[..., list[list[Query]]]:
    """The queries of a layer of a trace, as the definitions see them."""
    return all_queries


@pytest.fixture
def expected() -> Callable[..., Expected]:
    """What a method must come to, from the definitions alone."""
    return expected_figures


@pytest.fixture
def assert_figures() -> Callable[..., None]:
    """Compare one method at one budget with what it must come to, head by head."""

    def compare(
        results: Any, method: str, k: int, figures: Expected, *, layer: int = 0, atol: float = 2e-5
    ) -> None:
        rows = results.metrics
        rows = rows[(rows.method == method) & (rows.topk == k) & (rows.layer == layer)]
        found = rows.set_index(["metric", "head"])
        assert len(found.loc[["recall"]]) == rows["head"].nunique()
        found = found.loc[figures.index, ["mean", "std", "count"]]
        pd.testing.assert_frame_equal(
            found, figures, check_exact=False, check_dtype=False, rtol=0, atol=atol
        )

    return compare


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial that goes ahead of a run and takes longer than a small one: the properties
    of every method have it."""
    monkeypatch.setattr("retrace.analyze.replay.trials.Trials.check", lambda self, method: None)


@pytest.fixture
def write_methods(tmp_path: Path) -> Callable[..., str]:
    """A function that writes a loose file of methods and returns its path as specs have it."""

    def write(body: str, name: str = "mine.py") -> str:
        path = tmp_path / name
        path.write_text(METHOD_IMPORTS + textwrap.dedent(body), encoding="utf-8")
        return str(path)

    return write


METHOD_IMPORTS = """\
from dataclasses import dataclass, field
import torch
from retrace.analyze import AttendMethod, ScoreMethod, SearchMethod
"""
