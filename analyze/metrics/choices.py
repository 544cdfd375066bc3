"""What blocks of queries choose together: what that saves, what it costs, and what is better."""

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.metrics.measure import ExactBlock
from retrace.analyze.metrics.moments import Array, Moments
from retrace.analyze.units.selection import BlockChoice, Selection


def choice_moments(
    exact: ExactBlock, selection: Selection, choice: BlockChoice, points: list[int], first: Tensor
) -> dict[str, Moments]:
    """Moments (points, group) by metric of level `block`, over the queries that count.

    A ratio is one of sums: each query weighs as much as the keys that it sees, and their number is
    the count.

    Args:
        exact: the exact answers for the block of queries.
        selection: what they attend.
        choice: what that comes from, for whole blocks of them.
        points: indices into `selection.ks` of the budgets asked for.
        first: the first position that counts for each budget (budgets,).
    """
    block, rules = exact.block, exact.block.unit.group.rules
    pairs = block.visible_count.double()
    listed = (selection.ids >= 0).sum(dim=-1)
    attended = torch.minimum(selection.attended[points], listed)
    shape = attended.shape
    costs = choice.operations.to(pairs.device) / (pairs * (rules.key_dim + rules.value_dim))
    recall = block_recall(exact, choice)
    counted = block.positions >= first.to(pairs.device)[points, None]
    counted = counted[:, None].expand(shape)
    every = {
        "compute_ratio": (attended / pairs, pairs),
        "choice_ratio": (costs.expand(shape), pairs),
        "block_recall": (recall.expand(shape), torch.ones_like(pairs)),
    }
    return {
        metric: _weighted(values, (counted * weights).expand(shape))
        for metric, (values, weights) in every.items()
    }


def block_recall(exact: ExactBlock, choice: BlockChoice) -> Tensor:
    """Share of the units of largest attention mass, as many as each block of queries chose, that it
    did choose: (group, queries) float64, the same for all queries of a block."""
    mass = _unit_masses(exact, choice)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    count = choice.chosen.sum(dim=-1, keepdim=True)
    best = torch.arange(order.shape[-1], device=order.device) < count
    hits = (choice.chosen.gather(-1, order) & best).sum(dim=-1)
    recall = hits.double() / count[..., 0].clamp(min=1)
    return recall.repeat_interleave(choice.rows, dim=1)[:, : len(exact.block.positions)]


def _unit_masses(exact: ExactBlock, choice: BlockChoice) -> Tensor:
    """Exact attention mass of each block of queries on each unit (group, blocks, units)."""
    keys = exact.key_masses(choice.rows)
    units = choice.chosen.shape[-1]
    padded = torch.nn.functional.pad(keys, (0, units * choice.size - keys.shape[-1]))
    masses: Tensor = padded.view(*keys.shape[:2], units, choice.size).sum(dim=-1)
    return masses


def _weighted(values: Tensor, weights: Tensor) -> Moments:
    """Moments over the last axis of values (..., samples), of so much weight each."""
    count = weights.sum(dim=-1)
    mean = (values * weights).sum(dim=-1) / count.clamp(min=1)
    squares = (weights * (values - mean[..., None]).square()).sum(dim=-1)
    parts: list[Array] = [part.double().cpu().numpy() for part in (count, mean, squares)]
    return Moments(*(np.ascontiguousarray(part) for part in parts))
