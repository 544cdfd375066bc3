"""What authors of methods test with finds what is wrong, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from retrace.analyze import AttendMethod, ScoreMethod, analyze
from retrace.testing import KINDS, check_method, make_past, make_trace
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class Products(ScoreMethod):
    """Exact scores, less softcaps."""

    holds_keys = True

    def build(self, past: Any) -> Any:
        return past.keys

    def scores(self, state: Any, queries: Any, positions: Any) -> Any:
        return queries @ state[: int(positions[-1]) + 1].T


@dataclass(frozen=True, kw_only=True)
class Centred(Products):
    """Keys less the mean of all keys, later ones among them."""

    def build(self, past: Any) -> Any:
        return past.keys * past.keys.mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class NoIds(AttendMethod):
    """An output without ids."""

    def attend(self, state: Any, queries: Any, positions: Any, k: int) -> Any:
        return queries


def test_a_past_holds_what_it_was_given() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(7, n, generator=generator) for n in (4, 3))
    queries = torch.randn(2, 7, 4, generator=generator)
    past = make_past(keys, values, queries, end=5, scale=0.25)
    assert torch.equal(past.keys, keys[:5]) and torch.equal(past.values, values[:5])
    assert torch.equal(past.queries, queries[:, :5] * 0.25)
    assert past.query_positions.tolist() == [0, 1, 2, 3, 4]
    assert past.group.rules.group == 2 and len(past.heads) == 1


def test_its_attention_is_a_causal_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(6, 4, generator=generator), torch.randn(1, 6, 4)
    past = make_past(keys, queries=queries, window=3)
    scores = (queries[0].double() @ keys.T.double()) / 2
    for row in range(6):
        first = max(0, row - 2)
        wanted = torch.zeros(6, dtype=torch.float64)
        wanted[first : row + 1] = scores[row, first : row + 1].softmax(dim=0)
        found = past.attention(slice(row, row + 1))[0, 0].double()
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (((5,),), {}, "expected (keys, channels)"),
        (((5, 4), (4, 4)), {}, "values are (4, 4)"),
        (((5, 4), (5, 4), (5, 4)), {}, "queries are (5, 4)"),
        (((5, 4),), {"end": 6}, "end=6"),
        (((5, 4),), {"window": 0}, "window must be at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], ...], options: dict[str, int], words: str
) -> None:
    with pytest.raises(RetraceError) as error:
        make_past(*map(torch.zeros, shapes), **options)
    assert words in str(error.value)


def test_a_trace_is_as_asked_for(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.zarr", sequences=2, positions=40, heads=4, channels=6)
    assert (trace.sequences, trace.layers) == ((0, 1), tuple(range(len(KINDS))))
    assert trace.layer(0).query(1).shape == (4, 40, 6) and trace.layer(1).rules.window == 24
    with pytest.raises(RetraceError, match="exists already"):
        make_trace(tmp_path / "t.zarr")


def test_its_attention_is_neither_flat_nor_on_one_key(tmp_path: Path) -> None:
    results = analyze(make_trace(tmp_path / "t.zarr"), ["exact"], [8], workers=1)
    mass = results.metrics[results.metrics["metric"] == "attention_fraction"]["mean"]
    assert mass.between(0.2, 0.95).all()


def test_a_method_that_is_right_passes() -> None:
    results = check_method(Products(), [8], layers=[{}, {"window": 24}])
    assert results.table(topk=8)["Mean Recall"].min() > 0.999


def test_a_leak_is_named() -> None:
    with pytest.raises(RetraceError, match="sees the future"):
        check_method(Centred())


def test_an_answer_of_another_form_is_named() -> None:
    with pytest.raises(RetraceError, match="no pair of output and ids"):
        check_method(NoIds())


def test_every_protocol_can_be_asked_for() -> None:
    blocks = check_method("block-oracle:block=8", [16], protocol="prefill:16")
    assert blocks.metrics["protocol"].unique().tolist() == ["prefill:16"]
    decoded = check_method("h2o", [8], protocol="decode:16:from=64", layers=[{}])
    assert decoded.metrics["protocol"].unique().tolist() == ["decode:16:from=64"]
