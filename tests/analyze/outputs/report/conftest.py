"""Results of random figures, and what a page holds of them, read by other code than wrote it."""

import base64
import gzip
import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import METRICS, Results
from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.metrics.patterns import PATTERNS
from retrace.analyze.metrics.registry import AT_ALL, WITH_INTERVAL
from retrace.analyze.tables.columns import PATTERN_COLUMNS, POSITION_COLUMNS

SEQUENCE_COUNTS = [1000, 2000, 4792]
"""Queries that count, by sequence."""


def random_results(
    layers: Sequence[int],
    heads: int,
    methods: Sequence[str],
    topk: Sequence[int],
    curve: Sequence[int],
    *,
    empty: Sequence[int] = (),
    seed: int = 0,
    task: str = "text",
    sequences: bool = False,
    positions: Sequence[int] = (),
    patterns: bool = False,
) -> Results:
    """Random figures of every metric; none where no query counts, at the budgets in `empty`.
    Those of single sequences, of buckets that begin at these positions, and of patterns are others,
    where there are any."""
    generator = np.random.default_rng(seed)

    def table(metrics: Sequence[str], budgets: Sequence[int]) -> pd.DataFrame:
        axes = {"method": methods, "layer": layers, "head": range(heads), "topk": budgets}
        places = pd.MultiIndex.from_product(
            [pd.CategoricalIndex(axes["method"]), *list(axes.values())[1:], pd.Index(metrics)],
            names=[*axes, "metric"],
        )
        rows = places.to_frame(index=False)
        rows["module"] = "model.layers." + rows["layer"].astype(str) + ".self_attn"
        rows["mean"], rows["std"] = generator.random((2, len(rows)))
        rows["count"], rows["protocol"], rows["min_context"] = 7792, "all:256", "10k"
        rows.loc[rows["topk"].isin(list(empty)), ["mean", "std", "count"]] = np.nan, np.nan, 0
        # Exact attention holds the same mass whichever method stands beside it.
        exact = rows["metric"] == "exact_attention_fraction"
        shared = rows[exact].groupby(["layer", "head", "topk"])["mean"].transform("first")
        rows.loc[exact, "mean"] = shared
        return rows

    run = {
        "trace": ["0361c56b"], "protocol": "all:256", "min_context": None, "layers": list(layers),
        "calibration": None, "model": {"pretrained": "tiny", "parameters": 1234},
        "task": [{"task": task}], "dtype": "float32", "sequences": [0, 1],
        "methods": {
            method: {"name": method, "parameters": {"page": 16, "keep": "none"},
                     "source": f"source of {method}",
                     "state": {"builds": 3, "build_seconds": 0.25, "largest_bytes": 4096}}
            for method in methods
        },
        "history": [{"when": "2026-11-25T00:55:42Z", "device": "cpu", "threads": 2}],
    }  # fmt: skip
    metrics, curves = table(list(METRICS), topk), table(list(AT_ALL), curve)
    results = Results(metrics, curves, run)
    kept = metrics[metrics["metric"].isin(WITH_INTERVAL) & (metrics["count"] > 0)]
    kept = kept[["method", "layer", "module", "head", "topk", "metric"]]
    if sequences:
        parts = [
            kept.assign(sequence=s, count=n, mean=generator.random(len(kept)))
            for s, n in enumerate(SEQUENCE_COUNTS)
        ]
        results.sequences = pd.concat(parts, ignore_index=True)
    if positions:
        parts = [
            kept.assign(axis=axis, first=first, mean=generator.random(len(kept)), count=first + 1)
            for axis in AXES
            for first in positions
        ]
        results.positions = pd.concat(parts).assign(std=0.1).astype(POSITION_COLUMNS)
    if patterns:
        places = pd.MultiIndex.from_product(
            [layers, range(heads), PATTERNS], names=["layer", "head", "pattern"]
        )
        rows = places.to_frame(index=False).assign(module="m", std=0.1, count=2, best=False)
        rows["mean"] = generator.random(len(rows))
        first = np.arange(0, len(rows), len(PATTERNS))
        rows.loc[first + generator.integers(1, len(PATTERNS), len(first)), "best"] = True
        results.head_patterns = rows[list(PATTERN_COLUMNS)].astype(PATTERN_COLUMNS)
    return results


class Parts(HTMLParser):
    """The tags of a page, and the text within each script by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = (dict(attrs).get("id") or "") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data


class Held:
    """What a page holds: its index, and the figures that the index names."""

    def __init__(self, text: str) -> None:
        self.parts = Parts(text)
        self.index: dict[str, Any] = json.loads(self.parts.scripts["index"])
        planes = gzip.decompress(base64.b64decode(self.parts.scripts["figures"]))
        count = len(planes) // 4
        whole = bytearray(len(planes))
        for byte in range(4):
            whole[byte::4] = planes[byte * count : (byte + 1) * count]
        self.figures = np.frombuffer(bytes(whole), "<f4")

    def entry(self, label: str) -> dict[str, Any]:
        """A method by the name that the page gives it."""
        [found] = [entry for entry in self.index["entries"] if entry["label"] == label]
        return dict(found)

    def grid(self, entry: dict[str, Any], place: int) -> np.ndarray:
        """A grid (layers, heads) by its place."""
        run = self.index["runs"][entry["run"]]
        shape = len(run["layers"]), run["heads"]
        return self.figures[place : place + shape[0] * shape[1]].reshape(shape)


@pytest.fixture(scope="session")
def made() -> Callable[..., Results]:
    """Makes results of random figures."""
    return random_results


@pytest.fixture(scope="session")
def held() -> type[Held]:
    """Reads a page."""
    return Held
