"""A method that writes into what it is handed is refused by name: nobody meets what it wrote."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

from retrace.analyze import analyze, calibrate
from retrace.analyze.exact.store import exact_answers
from retrace.analyze.units.seals import Seal
from retrace.traces import RetraceError, Trace

WRITERS = """
@dataclass(frozen=True, kw_only=True)
class ByKeys(ScoreMethod):
    def scores(self, state, queries, positions):
        return queries @ state.keys.T


@dataclass(frozen=True, kw_only=True)
class Keys(ByKeys):
    def build(self, past):
        past.keys.div_(past.keys.norm(dim=-1, keepdim=True))
        return past


@dataclass(frozen=True, kw_only=True)
class Numpy(ByKeys):
    def build(self, past):
        past.keys.numpy()[3:5] *= 2
        return past


@dataclass(frozen=True, kw_only=True)
class Sorted(ByKeys):
    def build(self, past):
        past.values[:] = past.values.sort(dim=0).values
        return past


@dataclass(frozen=True, kw_only=True)
class Swapped(ByKeys):
    def build(self, past):
        past.keys[[2, 5]] = past.keys[[5, 2]]
        return past


@dataclass(frozen=True, kw_only=True)
class Turned(ByKeys):
    def build(self, past):
        past.keys[:] = past.keys.roll(1, dims=1)
        return past


@dataclass(frozen=True, kw_only=True)
class OtherHead(ByKeys):
    def build(self, past):
        past.heads[1].keys.zero_()
        return past


@dataclass(frozen=True, kw_only=True)
class OtherLayer(ByKeys):
    def build(self, past):
        past.layer(1)[0].values[0] += 1
        return past


@dataclass(frozen=True, kw_only=True)
class Queries(ByKeys):
    def build(self, past):
        past.unit.queries.mul_(2)
        return past


@dataclass(frozen=True, kw_only=True)
class Positions(ByKeys):
    def build(self, past):
        past.query_positions[-1] += 1
        return past


@dataclass(frozen=True, kw_only=True)
class InScores(ScoreMethod):
    def scores(self, state, queries, positions):
        state.keys[0, 0] += 1
        return queries @ state.keys.T


@dataclass(frozen=True, kw_only=True)
class Fails(ByKeys):
    def build(self, past):
        past.keys.zero_()
        raise RuntimeError("after it wrote")


@dataclass(frozen=True, kw_only=True)
class InSearch(SearchMethod):
    def extend(self, state, new):
        return state

    def search(self, state, queries, k):
        state.keys.neg_()
        return torch.zeros(*queries.shape[:2], 1, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class InExtend(SearchMethod):
    def extend(self, state, new):
        new.values.neg_()
        return state

    def search(self, state, queries, k):
        return torch.zeros(*queries.shape[:2], 1, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class InAttend(AttendMethod):
    def attend(self, state, queries, positions, k):
        state.values.add_(1)
        ids = positions[:, None].expand(len(queries), -1, 1)
        return state.values[positions].expand(len(queries), -1, -1), ids


def function(query, key, value, attention_mask, head_mask):
    key.numpy()[:] = 0
    ids = torch.zeros(*query.shape[:3], 1, dtype=torch.int64)
    return torch.zeros(*query.shape[:3], value.shape[3]), None, ids


@dataclass(frozen=True, kw_only=True)
class Late(ScoreMethod):
    '''In one place that is not tried ahead.'''

    def scores(self, state, queries, positions):
        at = state.group.layer, state.group.sequence, state.group.kv_head
        if at == (1, 1, 1) and 30 in positions:
            state.keys.numpy()[7] = 5
        return queries @ state.keys.T


@dataclass(frozen=True, kw_only=True)
class LateNan(ScoreMethod):
    '''So that the others fail first.'''

    def scores(self, state, queries, positions):
        if state.group.layer == 1:
            state.keys[0] = torch.nan
        return torch.zeros(*queries.shape[:2], state.end, device=queries.device)


@dataclass(frozen=True, kw_only=True)
class Learned(ByKeys):
    calibrated = True

    def calibrate(self, pasts):
        return {"mean": pasts[0].keys.mean(dim=0), "empty": torch.zeros(0)}

    def build(self, past):
        past.calibration["mean"].add_(1)
        return past


@dataclass(frozen=True, kw_only=True)
class InCalibrate(ByKeys):
    calibrated = True

    def calibrate(self, pasts):
        pasts[-1].values.mul_(0.5)
        return {"mean": pasts[0].keys.mean(dim=0)}
"""
PLACE = r"layer \d, kv head \d, sequence \d"


@pytest.fixture
def trace(make_trace: Callable[..., Trace], rules: Any) -> Trace:
    """Two layers of two kv heads and two sequences, of this test alone."""
    return make_trace([rules(), rules()], [40, 36, 33], name="own")


def exact_of(trace: Trace, *methods: str, keep: bool = True) -> pd.DataFrame:
    """The figures of exact attention, beside these methods."""
    rows = analyze(
        trace, [*methods, "exact"], [2], keep_exact=keep, workers=1, calibration_sequences=[0]
    ).metrics
    return rows[rows["method"] == "exact"].reset_index(drop=True)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("Keys", "the keys"),
        ("Numpy", "the keys"),
        ("Sorted", "the values"),
        ("Swapped", "the keys"),
        ("Turned", "the keys"),
        ("OtherHead", "the keys of layer 0, kv head 1"),
        ("OtherLayer", "the values of layer 1, kv head 0"),
        ("Queries", "the queries"),
        ("Positions", "the positions"),
        ("InScores", "the keys"),
        ("Fails", "the keys"),
        ("InSearch", "the keys"),
        ("InExtend:step=4", "the values"),
        ("InAttend", "the values"),
        ("function", "the keys"),
        ("Late", "the keys of layer 1, kv head 1, sequence 1"),
        ("LateNan", "the keys of layer 1"),
        ("Learned", r"past\.calibration\['mean'\]"),
        ("InCalibrate", "the values"),
    ],
)
def test_a_writer_is_refused_by_name(
    trace: Trace, write_methods: Any, method: str, what: str
) -> None:
    clean = exact_of(trace, keep=False)
    file = write_methods(WRITERS)
    with pytest.raises(RetraceError, match=rf"^mine\.py:{method} wrote into {what}") as caught:
        exact_of(trace, "knorm", f"{file}:{method}", "quest")
    assert "\n" not in str(caught.value)
    # Whatever was kept before that is right.
    pd.testing.assert_frame_equal(exact_of(trace), clean)
    pd.testing.assert_frame_equal(exact_of(trace), clean)
    assert exact_answers(trace.path) is not None


def test_queries_are_handed_out_as_copies(trace: Trace, write_methods: Any) -> None:
    body = """
    @dataclass(frozen=True, kw_only=True)
    class Own(ScoreMethod):
        def scores(self, state, queries, positions):
            scores = queries @ state.keys.T
            queries.zero_()
            positions += 1
            return scores

        def aux_bytes(self, state, keys, group):
            keys *= 2
            return keys
    """
    method = f"{write_methods(body)}:Own"
    pd.testing.assert_frame_equal(exact_of(trace, method), exact_of(trace, keep=False))


def test_what_is_learned_is_kept_only_of_whole_tensors(trace: Trace, write_methods: Any) -> None:
    method = f"{write_methods(WRITERS)}:InCalibrate"
    with pytest.raises(RetraceError, match=r"InCalibrate wrote into the values"):
        calibrate(trace, method, workers=1)
    assert not list(trace.path.parent.glob("*calibration*/*.npz"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(40, 6),
        torch.randn(3, 40, 7).transpose(0, 1),
        torch.arange(40)[:, None].repeat(1, 3),
        torch.randn(40, 4).to(torch.bfloat16),
        torch.randn(40, 2).to(torch.float64),
        torch.rand(40, 3) > 0.5,
        torch.randn(40, 9)[:, 1:5],
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_seal_sees_every_bit(tensor: torch.Tensor, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    tensor = tensor.clone().to(device)
    seal = Seal({"it": tensor})
    assert not list(seal.broken())
    for index in ((0,) * tensor.dim(), (-1,) * tensor.dim()):
        before = tensor[index].clone()
        tensor[index] = ~before if tensor.dtype == torch.bool else before + 1
        assert list(seal.broken()) == ["it"]
        tensor[index] = before
        assert not list(seal.broken())


def test_a_seal_of_long_tensors_sees_rows_that_change_places() -> None:
    tensor = torch.arange(40_000.0)[:, None].repeat(1, 2)
    seal = Seal({"it": tensor, "none": torch.zeros(0, 3), "one": torch.tensor(1.0)})
    tensor[[5, 39_000]] = tensor[[39_000, 5]]
    assert list(seal.broken()) == ["it"]
