"""Moments of all metrics, by whatever is fastest where the block is."""

import torch
from torch import Tensor

from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.metrics.choices import choice_moments
from retrace.analyze.metrics.measure import (
    ExactBlock,
    Tallied,
    at_each_budget,
    error_norm,
    log_sink_mass,
    plain_tally,
    prefixes,
    refused,
)
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.possible import most_of
from retrace.analyze.metrics.registry import AT_ALL, AT_POINTS
from retrace.analyze.metrics.tails import EveryQuery
from retrace.analyze.units import kernels
from retrace.analyze.units.selection import Selection


def tally(exact: ExactBlock, selection: Selection, points: list[int], first: Tensor) -> Tallied:
    """Moments over the queries that count, as `plain_tally` defines them.

    On a CPU a compiled loop walks each list once for all metrics and budgets, on a GPU kernels do.

    Args:
        exact: the exact answers for the block.
        selection: what the method attends.
        points: indices into `selection.ks` of the budgets that want an output and a cost.
        first: the first position that counts for each budget (budgets,), never falling.
    """
    found = _tally(exact, selection, points, first)
    if selection.choice is not None:
        more = choice_moments(exact, selection, selection.choice, points, first)
        found.at_points.update(more)
    return found


def _tally(exact: ExactBlock, selection: Selection, points: list[int], first: Tensor) -> Tallied:
    """The same, less what blocks of queries chose together."""
    if selection.ids.device.type == "cpu":
        return _compiled_tally(exact, selection, points, first)
    if kernels.usable(selection.ids):
        from retrace.analyze.metrics.kernels.tally import tally as kernels_tally

        return kernels_tally(exact, selection, points, first)
    return plain_tally(exact, selection, points, first)


def _compiled_tally(
    exact: ExactBlock, selection: Selection, points: list[int], first: Tensor
) -> Tallied:
    from retrace.analyze.metrics import compiled

    block, reference, unit = exact.block, exact.reference, exact.block.unit
    ks, attended = torch.tensor(selection.ks), selection.attended
    # Of the types that they have when there are any: the loop is compiled for each set of types.
    errors, share = torch.zeros(2, 0, 1, 1, dtype=torch.float64)
    fill = torch.zeros(0, 1)
    if selection.output is not None:
        errors = error_norm(reference.output, selection.output)[points]
    if selection.estimates is not None:
        share = at_each_budget(prefixes(selection.estimates.double()), attended[points])
        fill = unit.mean_values[block.positions]
    counted = block.positions[:, None] >= first
    full = unit.group.key_bytes + unit.group.value_bytes
    summed = compiled.moments(
        compiled.Asked(
            ks,
            torch.tensor(points),
            counted.sum(dim=-1),
            counted[:, points].sum(dim=-1),
            exact.buckets,
            block.visible_count,
        ),
        compiled.Listed(
            selection.ids,
            attended.movedim(0, -1),
            torch.as_tensor(selection.extra_keys).reshape(-1),
            selection.sink,
            _first_given(selection).T,
        ),
        compiled.Exactly(
            reference.ids,
            compiled.first_budgets(ks, reference.ids.shape[-1]),
            exact.best_log_probabilities,
            exact.best_probabilities,
            exact.fractions,
            reference.output,
            block.queries,
            unit.keys,
            unit.values,
            reference.log_normalizer,
            unit.group.rules.scale,
            unit.group.rules.softcap or 0.0,
        ),
        compiled.Answered(
            not selection.true_denominator,
            log_sink_mass(unit, reference.log_normalizer),
            share,
            fill,
            errors,
            float(full if selection.attended_bytes is None else selection.attended_bytes),
            float(full),
            torch.as_tensor(selection.aux_bytes).double().expand(len(block.positions)),
        ),
        tuple(map(most_of, (*AT_ALL, *AT_POINTS))),
    )
    if (wrong := summed.refused) is not None:
        metric, number, head, row = wrong
        raise refused(metric, number, block, head, row)
    at_all, at_points = (
        {metric: Moments(*part[:, i].transpose(1, 2, 0)) for i, metric in enumerate(names)}
        for names, part in ((AT_ALL, summed.at_all), (AT_POINTS, summed.at_points))
    )
    if not selection.anything_given:
        del at_all["candidate_recall"]
    # (buckets, group, metrics, 3, points) of each axis
    parts = summed.by_bucket.transpose(0, 4, 1, 5, 3, 2)
    by_bucket = {axis: Moments(*part) for axis, part in zip(AXES, parts, strict=True)}
    tails = EveryQuery(summed.every_query, block.positions.numpy(), unit.group.sequence)
    return Tallied(at_all, at_points, by_bucket, tails)


def _first_given(selection: Selection) -> Tensor:
    """The first position (budgets or 1, queries) from which keys did not have to be found; nothing
    if none."""
    if selection.first_given is None:
        return torch.empty(0, 0, dtype=torch.int64)
    return selection.first_given
