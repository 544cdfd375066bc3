"""The k largest scores of a row, compiled and in PyTorch's operations, against a sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.analyze.exact.top_k import plain_top, top


def by_sorting(row: list[float], k: int) -> tuple[list[float], list[int]]:
    """The k largest finite scores of a row and their places, ties to the lower place."""
    places = [
        i for i in sorted(range(len(row)), key=lambda i: (-row[i], i)) if row[i] != float("-inf")
    ][:k]
    missing = k - len(places)
    return [row[i] for i in places] + [float("-inf")] * missing, places + [-1] * missing


def assert_top(rows: torch.Tensor, k: int) -> None:
    for find in (top, plain_top):
        scores, ids = find(rows, k)
        for row, row_scores, row_ids in zip(
            rows.tolist(), scores.tolist(), ids.tolist(), strict=True
        ):
            assert (row_scores, row_ids) == by_sorting(row, k), find.__name__


@settings(max_examples=200)
@given(
    keys=st.integers(1, 150),
    k=st.integers(1, 40),
    levels=st.integers(1, 1000),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_random_rows(keys: int, k: int, levels: int, hidden: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(levels, (7, keys), generator=generator).float()
    rows[torch.rand(rows.shape, generator=generator) < hidden] = -torch.inf
    assert_top(rows, k)


def test_last_keys_outnumber_the_groups() -> None:
    for keys in range(32, 64):
        assert_top(torch.arange(keys).float().expand(2, -1), 1)


def test_leading_axes_are_kept() -> None:
    scores, ids = top(torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)), 7)
    assert scores.shape == ids.shape == (2, 3, 7)
    assert (ids[..., 5:] == -1).all() and (scores[..., 5:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_budget_of_nothing(dtype: torch.dtype) -> None:
    scores, ids = top(torch.rand(2, 3, 5, dtype=dtype), 0)
    assert scores.shape == ids.shape == (2, 3, 0)
    assert scores.dtype == dtype and ids.dtype == torch.int64


def test_lowest_finite_score_is_found() -> None:
    lowest = torch.finfo(torch.float32).min
    assert top(torch.tensor([[-torch.inf, lowest, lowest]]), 2)[1].tolist() == [[1, 2]]


@pytest.mark.parametrize(("keys", "k"), [(127, 64), (1000, 64), (700, 256), (2500, 300), (64, 80)])
def test_rows_of_many_keys(keys: int, k: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    rows = torch.randn(6, keys, generator=generator)
    rows[0] = rows[0].sort().values  # neighbours alike, and so in groups of their own
    rows[1] = rows[1].bfloat16().float()
    rows[2, : keys // 2] = -torch.inf
    rows[3] *= 1e38  # up to both infinities
    rows[4] = 0.0
    rows[4, ::2] = -0.0
    rows[5, 1::2] = rows[5, : keys // 2]
    assert_top(rows, k)


def test_nan_spoils_its_own_row_only() -> None:
    rows = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    rows[1, ::3] = torch.nan
    scores, ids = top(rows, 9)
    for row in (0, 2):
        assert (scores[row].tolist(), ids[row].tolist()) == by_sorting(rows[row].tolist(), 9)
    assert ((ids[1] >= -1) & (ids[1] < 200)).all()
