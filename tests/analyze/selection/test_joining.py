"""One list for all budgets, by a loop on a CPU, by PyTorch on other devices, and by a kernel."""

import pytest
import torch

from retrace.analyze.selection.joining import in_order_of_joining, joined_together

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Lists = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor, torch.Tensor]


def some_lists(seed: int, budgets: int, best: int, sink: int) -> Lists:
    """What is kept and ranked of queries at positions from 0 on, and room for some of it."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor([0, 1, 7, 30, 31])
    group, last = 2, 32
    ranked = torch.rand(group, len(positions), last, generator=generator).argsort(dim=-1)
    ranked = ranked[..., :best].masked_fill(ranked[..., :best] > positions[:, None], -1)
    recent = torch.randint(0, 6, (budgets,), generator=generator).sort().values
    first_given = positions - recent[:, None] + 1
    back = positions[:, None] - torch.arange(int(recent.max()))
    newest = back.masked_fill(back < max(sink, 0), -1)
    sinks = torch.arange(sink).expand(len(positions), -1)
    kept = torch.cat([sinks.masked_fill(sinks > positions[:, None], -1), newest], dim=-1)
    kept[torch.rand(kept.shape, generator=generator) < 0.1] = -1  # gone for good
    left = torch.randint(0, best + 2, (budgets, 1, len(positions)), generator=generator)
    return ranked, kept, sink, first_given, left.sort(dim=0).values, positions


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("budgets", "best", "sink"), [(1, 1, 1), (3, 9, 0), (7, 20, 2)])
def test_all_ways_give_the_same_list(seed: int, budgets: int, best: int, sink: int) -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton, which is not installed")
    from retrace.analyze.selection.kernels.joining import join

    lists = some_lists(seed, budgets, best, sink)
    ids, attended = in_order_of_joining(*lists)
    assert (attended.diff(dim=0) >= 0).all() and int(attended.max()) > 0
    on_device = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in lists]
    for ours, counts in (joined_together(*on_device), join(*on_device[:-1])):
        assert torch.equal(ours.cpu(), ids)
        assert torch.equal(counts.cpu(), attended)
