"""`retrace.analyze.metrics.measure.tally` on a GPU."""

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor

from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.metrics.kernels.lists import Lists
from retrace.analyze.metrics.kernels.sums import NONE, bucketed, histogram, moments
from retrace.analyze.metrics.kernels.unions import unions
from retrace.analyze.metrics.kernels.walk import walk
from retrace.analyze.metrics.measure import ExactBlock, Tallied, bytes_ratio, error_norm, refused
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.possible import most_of
from retrace.analyze.metrics.registry import AT_ALL, AT_POINTS, BUCKETED, BY_NAME, TAILED
from retrace.analyze.metrics.tails import Tails, odds_of_shares, worst_of
from retrace.analyze.units.constants import constant
from retrace.analyze.units.selection import Selection

FRACTION = AT_ALL.index("exact_attention_fraction")
CANDIDATE_RECALL = AT_ALL.index("candidate_recall")
ERROR_NORM = AT_POINTS.index("error_norm")
BYTES_RATIO = AT_POINTS.index("bytes_ratio")


def tally(exact: ExactBlock, selection: Selection, points: list[int], first: Tensor) -> Tallied:
    """Moments over the queries that count, as `plain_tally` defines them."""
    lists = Lists.of(exact, selection, points)
    block, budgets = exact.block, len(selection.ks)
    group, rows, _ = lists.ids.shape
    plan = _Streams.of(budgets, tuple(points), group, lists.ids.device)
    values = torch.empty((len(plan.metric), rows), device=lists.ids.device)
    split = len(AT_ALL) * budgets * group
    at_all = values[:split].view(len(AT_ALL), budgets, group, rows)
    at_points = values[split:].view(len(AT_POINTS), len(points), group, rows)
    attended, union = torch.empty(
        (2, len(points), group, rows), dtype=torch.int32, device=values.device
    )
    with torch.cuda.device_of(values):
        walk(exact, lists, at_all, at_points, attended)
        at_all[FRACTION] = exact.fractions[..., lists.ks].movedim(-1, 0)
        if not lists.anything_given:
            at_all[CANDIDATE_RECALL] = torch.nan
        if selection.output is not None:
            at_points[ERROR_NORM] = error_norm(exact.reference.output, selection.output[points])
        if group > 1:
            unions(lists, block.end, union)
        else:
            union = attended
        at_points[BYTES_RATIO] = bytes_ratio(block, selection, union.sum(dim=1))
        since = constant(tuple(first.tolist()), values.device)[plan.budget]
        summed, wrong = moments(values, block.positions, since, plan.limit)
        size = int(exact.buckets.max()) + 1
        by_bucket = bucketed(values, plan.told, block.positions, since, exact.own_buckets, size)
        every, start = values[plan.tails], since[plan.tails]
        every = every.masked_fill(block.positions < start[..., None], torch.nan)
        odds = odds_of_shares(every).view(-1, rows)
        bins = histogram(odds, block.positions, start.flatten())
        parts = wrong, summed, by_bucket, bins, *worst_of(every, block.positions)
        found = [t.to("cpu", non_blocking=True) for t in parts]
        if values.is_cuda:  # which is waited for once
            torch.cuda.current_stream().synchronize()
    wrong, summed, by_bucket, bins, worst, position = found
    place = int(wrong)
    if place != NONE:
        stream, row = divmod(place, rows)
        raise refused(plan.metric[stream], float(values[stream, row]), block, stream % group, row)
    # (3, metrics, budgets, group) and (axes, 3, buckets, points, `BUCKETED`, group)
    moved = summed.T.numpy()
    budgeted = moved[:, :split].reshape(3, len(AT_ALL), budgets, group)
    pointed = moved[:, split:].reshape(3, len(AT_POINTS), len(points), group)
    apart = by_bucket.permute(0, 3, 2, 1).numpy()
    apart = apart.reshape(*apart.shape[:3], len(points), len(BUCKETED), group)
    return Tallied(
        {
            metric: Moments(*budgeted[:, i])
            for i, metric in enumerate(AT_ALL)
            if i != CANDIDATE_RECALL or lists.anything_given
        },
        {metric: Moments(*pointed[:, i]) for i, metric in enumerate(AT_POINTS)},
        {axis: Moments(*of_axis) for axis, of_axis in zip(AXES, apart, strict=True)},
        Tails.of_parts(
            bins.view(*plan.tails.shape, -1).numpy(),
            worst.numpy(),
            position.numpy(),
            block.unit.group.sequence,
        ),
    )


@dataclass(frozen=True)
class _Streams:
    """What the rows of the numbers are of: `AT_ALL` at every budget and `AT_POINTS` at every point,
    head by head."""

    metric: tuple[str, ...]
    budget: Tensor
    """Index into the budgets (streams,) int64."""
    limit: Tensor
    """As `moments` has them."""
    told: Tensor
    """The streams that are told apart by bucket (points * `BUCKETED` * group,) int64."""
    tails: Tensor
    """Those of which every query's counts (points, `TAILED`, group) int64."""

    @classmethod
    @cache
    def of(cls, budgets: int, points: tuple[int, ...], group: int, device: torch.device) -> Self:
        """For so many budgets, those of them that are asked for, and so many heads."""
        asked = [(metric, b) for metric in AT_ALL for b in range(budgets)]
        asked += [(metric, b) for metric in AT_POINTS for b in points]
        places = torch.arange(len(asked) * group).view(len(asked), group)
        told = [asked.index((metric, b)) for b in points for metric in BUCKETED]
        tails = [[asked.index((metric, b)) for metric in TAILED] for b in points]
        metrics = tuple(metric for metric, _ in asked for _ in range(group))
        limits = [most_of(m) * (1 if BY_NAME[m].every_query else -1) for m in metrics]
        return cls(
            metrics,
            torch.tensor([b for _, b in asked for _ in range(group)], device=device),
            torch.tensor(limits).clamp(max=torch.finfo(torch.float32).max).to(device),
            places[told].flatten().to(device),
            places[torch.tensor(tails)].to(device),
        )
