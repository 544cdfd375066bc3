"""Every list once: what it hits, what mass it holds, and how far its output is off."""

import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.metrics.kernels.lists import Lists
from retrace.analyze.metrics.measure import ExactBlock
from retrace.analyze.metrics.registry import AT_ALL, AT_POINTS
from retrace.analyze.units.kernels.tiles import width

PLACES = 16
"""Places of a list that a program looks at together."""
RANKS = 64
"""Best keys that they are compared with together."""
COMPARED = 128
"""Best keys up to which they are compared with all: of more, each is looked up in a table."""
WARPS = 1
"""What a list needs is summed up within one: more of them would wait for each other."""


def walk(
    exact: ExactBlock, lists: Lists, at_all: Tensor, at_points: Tensor, attended: Tensor
) -> None:
    """Write the metrics of every query and head.

    Args:
        exact: the exact answers.
        lists: what is attended.
        at_all: (`AT_ALL`, budgets, group, queries) float32, for all but exact attention's fraction
            and, where nothing is given, recall of candidates.
        at_points: (`AT_POINTS`, points, group, queries) float32, for the error norm where the
            method gave no output of its own, and the density.
        attended: (points, group, queries) int32, for how many keys each query attends.
    """
    block, unit = exact.block, exact.block.unit
    group, rows, listed = lists.ids.shape
    keys, values = unit.narrow_keys, unit.narrow_values
    nothing = lists.ids  # in place of what there is none of, and never read
    given = nothing if lists.first_given is None else lists.first_given
    estimates = nothing if lists.estimates is None else lists.estimates
    looks_up = exact.no_rank > COMPARED
    table = exact.rank_table if looks_up else nothing
    _walk[rows, group](
        block.queries.contiguous(),
        keys,
        values,
        lists.ids,
        lists.attended,
        lists.ks,
        lists.from_rank,
        lists.points,
        lists.extra_keys,
        given,
        exact.reference.ids.contiguous(),
        table,
        exact.reference.log_normalizer.contiguous(),
        exact.reference.output.contiguous(),
        lists.log_sink_mass,
        estimates,
        lists.fill if lists.estimates is not None else nothing,
        block.visible_count,
        at_all,
        at_points,
        attended,
        rows,
        listed,
        len(lists.ks),
        len(lists.points),
        exact.reference.ids.shape[-1],
        *lists.ids.stride()[:2],
        *lists.attended.stride(),
        lists.extra_keys.stride(0) if len(lists.extra_keys) > 1 else 0,
        *(given.stride() if lists.first_given is not None else (0, 0)),
        *table.stride()[:2],
        lists.sink,
        unit.group.rules.scale,
        unit.group.rules.softcap or 0.0,
        RECALL=AT_ALL.index("recall"),
        FRACTION=AT_ALL.index("attention_fraction"),
        ATTENDED_RECALL=AT_ALL.index("attended_recall"),
        CANDIDATE_RECALL=AT_ALL.index("candidate_recall"),
        TOP1_HIT=AT_ALL.index("top1_hit"),
        ERROR_NORM=AT_POINTS.index("error_norm"),
        DENSITY=AT_POINTS.index("density"),
        KEY_DIM=keys.shape[1],
        KEY_WIDTH=width(keys.shape[1]),
        VALUE_DIM=values.shape[1],
        VALUE_WIDTH=width(values.shape[1]),
        BUDGETS=triton.next_power_of_2(len(lists.ks) + 1),
        PLACES=PLACES,
        RANKS=RANKS,
        CAPPED=unit.group.rules.softcap is not None,
        FROM=lists.first_given is not None,
        GIVEN=lists.anything_given,
        OUTPUT=lists.own_output is None,
        RENORMALISED=lists.renormalised,
        FILLED=lists.estimates is not None,
        LOOKS_UP=looks_up,
        num_warps=WARPS,
    )


@triton.jit
def _walk(
    queries,
    keys,
    values,
    ids,
    attended,
    ks,
    from_ranks,
    points,
    extra_keys,
    first_given,
    best,
    table,
    log_normalizer,
    output,
    log_sink_mass,
    estimates,
    fill,
    visible,
    at_all,
    at_points,
    reached,
    rows,
    listed,
    budgets,
    point_count,
    ranks,
    ids_head,
    ids_row,
    attended_budget,
    attended_head,
    attended_row,
    extra_row,
    given_budget,
    given_row,
    table_head,
    table_row,
    sink,
    scale,
    cap,
    RECALL: tl.constexpr,
    FRACTION: tl.constexpr,
    ATTENDED_RECALL: tl.constexpr,
    CANDIDATE_RECALL: tl.constexpr,
    TOP1_HIT: tl.constexpr,
    ERROR_NORM: tl.constexpr,
    DENSITY: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BUDGETS: tl.constexpr,
    PLACES: tl.constexpr,
    RANKS: tl.constexpr,
    CAPPED: tl.constexpr,
    FROM: tl.constexpr,
    GIVEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    RENORMALISED: tl.constexpr,
    FILLED: tl.constexpr,
    LOOKS_UP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1).to(tl.int64)
    place = head * rows + row
    budget = tl.arange(0, BUDGETS)
    asked = budget < budgets
    k = tl.load(ks + budget, mask=asked, other=0).to(tl.int32)
    attended += head * attended_head + row * attended_row
    # What there is no budget for reaches all places.
    reach = tl.load(attended + budget * attended_budget, mask=asked, other=listed).to(tl.int32)
    extra = tl.load(extra_keys + row * extra_row).to(tl.int32)
    limit = tl.where(asked, tl.minimum(reach, k + extra), listed)
    seen = tl.load(visible + row)
    if FROM:
        given = tl.load(first_given + budget * given_budget + row * given_row, mask=asked, other=0)
        given = given.to(tl.int32)
    ids += head * ids_head + row * ids_row
    best += place * ranks
    normalizer = tl.load(log_normalizer + place)
    channel = tl.arange(0, KEY_WIDTH)
    has_channel = channel < KEY_DIM
    query = tl.load(queries + place * KEY_DIM + channel, mask=has_channel, other=0.0)
    query = query.to(tl.float64)
    value_channel = tl.arange(0, VALUE_WIDTH)
    has_value = value_channel < VALUE_DIM
    exact = tl.load(output + place * VALUE_DIM + value_channel, mask=has_value, other=0.0)

    # How many keys begin to count at each budget; what never does is in the last bin.
    hits = tl.zeros([BUDGETS], tl.int32)
    attended_hits = tl.zeros([BUDGETS], tl.int32)
    candidate_hits = tl.zeros([BUDGETS], tl.int32)
    mass = tl.zeros([BUDGETS], tl.float64)
    mass_before = tl.zeros([], tl.float64)
    never: tl.constexpr = BUDGETS - 1
    best_place = tl.zeros([], tl.int32) + listed  # none
    count = tl.zeros([], tl.int32)
    # Sums are relative to the largest so far, since probabilities of what was selected may be tiny.
    largest = tl.full([], -1e300, tl.float64)
    total = tl.zeros([], tl.float64)
    share = tl.zeros([], tl.float64)
    sums = tl.zeros([VALUE_WIDTH], tl.float32)
    for point in range(point_count + 1):
        # After the points, what further budgets reach.
        at = tl.load(points + point, mask=point < point_count, other=budgets - 1)
        stop = tl.minimum(tl.load(attended + at * attended_budget), listed).to(tl.int32)
        before = tl.load(points + point - 1, mask=point > 0, other=0)
        start = tl.minimum(tl.load(attended + before * attended_budget), listed).to(tl.int32)
        start = tl.where(point > 0, start, 0)
        for first in range(start, stop, PLACES):
            here = first + tl.arange(0, PLACES)
            key = tl.load(ids + here, mask=here < stop, other=-1).to(tl.int32)
            there = key >= 0
            key_at = tl.maximum(key, 0).to(tl.int64)[:, None]
            key_row = tl.load(
                keys + key_at * KEY_DIM + channel[None, :],
                mask=there[:, None] & has_channel[None, :],
                other=0.0,
            )
            score = tl.sum(key_row.to(tl.float64) * query[None, :], 1) * scale
            if CAPPED:
                # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both ends.
                score = (1.0 - 2.0 / (1.0 + tl.exp(2.0 * score / cap))) * cap
            log = tl.where(there, score - normalizer, float("-inf"))
            if LOOKS_UP:
                known = table + head * table_head + row * table_row + key
                rank = tl.load(known, mask=there, other=0).to(tl.int32)
                rank = tl.where(there, rank, ranks)
            else:
                rank = tl.full([PLACES], 2147483647, tl.int32)
                for first_rank in range(0, ranks, RANKS):
                    which = first_rank + tl.arange(0, RANKS)
                    one = tl.load(best + which, mask=which < ranks, other=-2).to(tl.int32)
                    same = key[:, None] == one[None, :]
                    rank = tl.minimum(rank, tl.min(tl.where(same, which[None, :], 2147483647), 1))
            from_rank = tl.load(from_ranks + tl.minimum(rank, ranks))
            from_limit = tl.sum((limit[:, None] <= here[None, :]).to(tl.int32), 0)
            from_reach = tl.sum((reach[:, None] <= here[None, :]).to(tl.int32), 0)
            from_hit = tl.where(there, tl.maximum(from_rank, from_limit), never)
            hits += tl.histogram(from_hit, BUDGETS)
            from_attended = tl.where(there, tl.maximum(from_rank, from_reach), never)
            attended_hits += tl.histogram(from_attended, BUDGETS)
            if GIVEN:
                until = tl.where(key < sink, 0, never)
                if FROM:
                    until = tl.minimum(
                        until, tl.sum((key[None, :] < given[:, None]).to(tl.int32), 0)
                    )
                candidate_hits += tl.histogram(tl.where(from_hit < until, from_hit, never), BUDGETS)
                candidate_hits -= tl.histogram(tl.where(from_hit < until, until, never), BUDGETS)
            so_far = mass_before + tl.cumsum(tl.exp(log), 0)
            last = tl.minimum(reach - first, PLACES) - 1
            reached_here = tl.gather(so_far, tl.maximum(last, 0), 0)
            mass = tl.where(last >= 0, reached_here, mass)
            mass_before = tl.sum(tl.exp(log)) + mass_before
            best_place = tl.minimum(best_place, tl.min(tl.where(rank == 0, here, listed)))
            count += tl.sum(there.to(tl.int32))
            if FILLED:
                share += tl.sum(
                    tl.load(estimates + place * listed + here, mask=here < stop, other=0.0).to(
                        tl.float64
                    )
                )
            if OUTPUT:
                if point < point_count:
                    value = tl.load(
                        values + key_at * VALUE_DIM + value_channel[None, :],
                        mask=there[:, None] & has_value[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    above = tl.maximum(largest, tl.max(log))
                    fade = tl.exp(largest - above)
                    weight = tl.exp(log - above)
                    total = total * fade + tl.sum(weight)
                    sums = sums * fade.to(tl.float32) + tl.sum(
                        weight.to(tl.float32)[:, None] * value, 0
                    )
                    largest = above
        if point < point_count:
            to = heads * rows * point + place
            tl.store(reached + to, count)
            of_points = heads * rows * point_count
            tl.store(
                at_points + DENSITY * of_points + to, count.to(tl.float32) / seen.to(tl.float32)
            )
            if OUTPUT:
                if RENORMALISED:
                    whole = total + tl.exp(tl.load(log_sink_mass + place) - largest)
                    factor = 1.0 / tl.where(whole > 0.0, whole, 1.0)
                else:
                    factor = tl.exp(largest)
                if FILLED:
                    other = tl.load(
                        fill + row * VALUE_DIM + value_channel, mask=has_value, other=0.0
                    )
                    rest = exact - (share * factor).to(tl.float32) * sums
                    rest = (rest - (1.0 - share).to(tl.float32) * other).to(tl.float64)
                else:
                    rest = (exact - factor.to(tl.float32) * sums).to(tl.float64)
                error = tl.sum(rest * rest)
                norm = tl.sum(exact.to(tl.float64) * exact.to(tl.float64))
                error = tl.where(error == 0.0, 0.0, tl.sqrt(error / norm))
                tl.store(at_points + ERROR_NORM * of_points + to, error.to(tl.float32))

    to = at_all + (budget.to(tl.int64) * heads * rows + place)
    of_budgets = heads * rows * budgets
    most = tl.maximum(tl.minimum(k, seen), 1).to(tl.float32)
    tl.store(to + RECALL * of_budgets, tl.cumsum(hits, 0) / most, mask=asked)
    tl.store(to + ATTENDED_RECALL * of_budgets, tl.cumsum(attended_hits, 0) / most, mask=asked)
    tl.store(to + FRACTION * of_budgets, mass.to(tl.float32), mask=asked)
    tl.store(to + TOP1_HIT * of_budgets, (best_place < reach).to(tl.float32), mask=asked)
    if GIVEN:
        wanted = tl.zeros([BUDGETS], tl.int32)
        for first_rank in range(0, ranks, RANKS):
            which = first_rank + tl.arange(0, RANKS)
            one = tl.load(best + which, mask=which < ranks, other=-1).to(tl.int32)
            from_rank = tl.load(from_ranks + tl.minimum(which, ranks))
            until = tl.where(one < sink, 0, never)
            if FROM:
                until = tl.minimum(until, tl.sum((one[None, :] < given[:, None]).to(tl.int32), 0))
            counts = (one >= 0) & (from_rank < until)
            wanted += tl.histogram(tl.where(counts, from_rank, never), BUDGETS)
            wanted -= tl.histogram(tl.where(counts, until, never), BUDGETS)
        # Not counted where nothing had to be found.
        wanted = tl.cumsum(wanted, 0)
        share_found = tl.cumsum(candidate_hits, 0) / tl.maximum(wanted, 1).to(tl.float32)
        found = tl.where(wanted > 0, share_found, float("nan"))
        tl.store(to + CANDIDATE_RECALL * of_budgets, found, mask=asked)
