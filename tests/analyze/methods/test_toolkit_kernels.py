"""What methods compute in kernels on a GPU, against the lines that stand for it on a CPU: on a GPU
where there is one, otherwise in Triton's interpreter on small tensors."""

import pytest
import torch

from retrace.analyze.methods.socket import _votes
from retrace.analyze.methods.toolkit import hashing, partial_attention, random_numbers, sampling

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")

from retrace.analyze.methods.toolkit.kernels.collisions import collisions  # noqa: E402
from retrace.analyze.methods.toolkit.kernels.draws import sampled_moments, smallest  # noqa: E402
from retrace.analyze.methods.toolkit.kernels.lists import append_marked  # noqa: E402
from retrace.analyze.methods.toolkit.kernels.random_numbers import uniform  # noqa: E402
from retrace.analyze.methods.toolkit.kernels.soft_votes import soft_votes  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_random_numbers() -> None:
    starts = torch.tensor([-(1 << 62) - 77, 3, (1 << 63) - 1])
    positions = torch.tensor([0, 5, 131071])
    for count in (1, 7, 1030):
        ours = uniform(starts.to(DEVICE), positions.to(DEVICE), count).cpu()
        assert torch.equal(ours, random_numbers.plain_uniform(starts, positions, count))


def test_collisions() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(5, (82, 9), generator=generator, dtype=torch.int32)
    keys = torch.randint(5, (9, 70), generator=generator, dtype=torch.int32)
    plain = hashing.plain_collisions(queries, keys)
    assert torch.equal(collisions(queries.to(DEVICE), keys.to(DEVICE)).cpu(), plain)
    assert torch.equal(hashing.collisions(queries.view(2, 41, 9), keys).view(82, 70), plain)


def test_soft_votes() -> None:
    soft = random(3, 2, 70, 5)
    total = torch.logaddexp(soft, -soft).sum(dim=-1)
    corners = hashing.signs(random(3, 150, 5, seed=1))
    positions = torch.arange(80, 150)
    ours = soft_votes(*(t.to(DEVICE) for t in (soft, total, corners, positions))).cpu()
    seen = torch.arange(150) <= positions[:, None]
    plain = _votes(soft, total, corners, positions)
    torch.testing.assert_close(ours[:, seen], plain[:, seen], rtol=2e-5, atol=1e-6)
    assert ours.isfinite().all()


@pytest.mark.parametrize("most_held", [0, 1 << 14])
@pytest.mark.parametrize("width", [1, 37, 1500])
def test_smallest_numbers_of_each_row(
    width: int, most_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrace.analyze.methods.toolkit.kernels.draws.MOST_HELD", most_held)
    numbers = random(2, 7, width).abs()
    numbers[0, 1:3] = (numbers[0, 1:3] * 3).round() / 3  # ties
    numbers[0, 4, width // 2 :] = torch.inf
    numbers[1, 5] = torch.inf
    numbers[1, 6] = 0.0
    counts = torch.arange(14).view(2, 7) * width // 12
    plain = sampling.smallest(numbers, counts)
    ours = smallest(numbers.flatten(0, 1).to(DEVICE), counts.flatten().to(DEVICE))
    assert torch.equal(ours.cpu().view_as(plain), plain)
    assert torch.equal(plain.sum(dim=-1), torch.minimum(counts, numbers.isfinite().sum(dim=-1)))
    order = numbers.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    assert torch.equal(plain, (order < counts[..., None]) & numbers.isfinite())


def test_moments_of_a_sample() -> None:
    logits = 3 * random(2, 5, 1100)
    logits[0, 0, 9:] = -torch.inf
    sampled, sure = random(2, 5, 1100, seed=1) > 0.5, random(2, 5, 1100, seed=2) > 1.0
    sampled[1, 2] = False
    largest = logits.amax(dim=-1)
    ours = sampled_moments(
        logits.flatten(0, 1).to(DEVICE),
        largest.flatten().to(DEVICE),
        sampled.flatten(0, 1).to(DEVICE),
        sure.flatten(0, 1).to(DEVICE),
    )
    for one, plain in zip(
        ours, sampling.sampled_moments(logits, largest, sampled, sure), strict=True
    ):
        torch.testing.assert_close(one.cpu().view_as(plain), plain, rtol=1e-12, atol=1e-15)


def test_marked_positions_follow_a_list() -> None:
    marks = random(2, 3, 1100) > 0.8
    marks[0, 1] = False
    ids = torch.tensor([[[7, 3, -1], [-1, -1, -1], [2, 1, 0]]]).expand(2, -1, -1).contiguous()
    plain = partial_attention.appended(ids, marks)
    for row, mine, listed in zip(
        marks.flatten(0, 1), ids.flatten(0, 1).tolist(), plain.flatten(0, 1).tolist(), strict=True
    ):
        wanted = [i for i in mine if i >= 0] + row.nonzero().flatten().tolist()
        assert listed == wanted + [-1] * (plain.shape[-1] - len(wanted))
    ours = torch.full((6, plain.shape[-1]), -1)
    ours[:, :3] = ids.flatten(0, 1)
    ours = ours.to(DEVICE)
    starts = (ids >= 0).sum(dim=-1).flatten()
    append_marked(ours, starts.to(DEVICE), marks.flatten(0, 1).to(DEVICE))
    assert torch.equal(ours.cpu().view_as(plain), plain)
