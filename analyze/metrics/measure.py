"""How far a selection is from exact attention: query by query, and in moments over queries."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from retrace.analyze.exact.reference import Reference
from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.possible import ROUNDING, most_of
from retrace.analyze.metrics.registry import BUCKETED, TAILED
from retrace.analyze.metrics.tails import EveryQuery, Tails
from retrace.analyze.units.constants import constant
from retrace.analyze.units.selection import ALL_READ, Selection, where
from retrace.analyze.units.unit import Block, Unit
from retrace.traces import RetraceError

GATHERED = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Numbers held at once when outputs are computed: values of listed keys, and their weights."""


@dataclass(frozen=True)
class Measured:
    """The metrics of a block's queries, each (budgets, group, queries), by name."""

    ks: tuple[int, ...]
    at_all: dict[str, Tensor]
    """At every budget of the selection."""
    at_points: dict[str, Tensor]
    """At the budgets asked for."""


class ExactBlock:
    """What every selection for a block is compared with."""

    def __init__(self, block: Block, reference: Reference, buckets: Tensor) -> None:
        """`buckets` are those of the block's queries, as `buckets_of` has them (axes, queries)."""
        self.block = block
        self.reference = reference
        self.buckets = buckets
        self.no_rank = reference.ids.shape[-1]
        self._key_masses: dict[int, Tensor] = {}
        self._within: tuple[ExactBlock, slice] | None = None
        """The block of which this one is a part, with as many ranks, and which of its rows."""

    def selection(self, ks: tuple[int, ...]) -> Selection:
        """What exact attention over the k keys of largest score attends."""
        block = self.block
        return Selection(
            ks,
            self.reference.ids[..., : ks[-1]],
            constant(ks, block.positions.device)[:, None, None],
            aux_bytes=block.visible_count * block.unit.group.key_bytes,
            attended_bytes=block.unit.group.value_bytes,
            unread=ALL_READ,
        )

    @cached_property
    def best_log_probabilities(self) -> Tensor:
        """log of the exact probability of each of the best keys (group, queries, ranks) float64."""
        return self.log_probabilities(self.reference.ids)

    @cached_property
    def best_probabilities(self) -> Tensor:
        """Exact probability of each of the best keys (group, queries, ranks) float64."""
        return self.best_log_probabilities.exp()

    @cached_property
    def fractions(self) -> Tensor:
        """Attention mass on the exact top 0, 1, ... keys (group, queries, ranks + 1) float64."""
        return prefixes(self.best_probabilities)

    @cached_property
    def own_buckets(self) -> Tensor:
        """`buckets`, where the block is."""
        return self.buckets.to(self.block.positions.device)

    @cached_property
    def rank_table(self) -> Tensor:
        """Exact rank of every key (group, queries, keys) int16 or int32; `no_rank` beyond those
        known. For devices that look up faster than they search."""
        if self._within is not None:
            whole, rows = self._within
            return whole.rank_table[:, rows]
        ids, end = self.reference.ids, self.block.end
        kind = torch.int16 if self.no_rank <= torch.iinfo(torch.int16).max else torch.int32
        shape = (*ids.shape[:2], end + 1)  # the id -1 has the last place
        table = torch.full(shape, self.no_rank, dtype=kind, device=ids.device)
        ranks = torch.arange(self.no_rank, dtype=kind, device=ids.device)
        table.scatter_(-1, torch.where(ids < 0, end, ids), ranks.expand(ids.shape))
        return table[..., :end]

    def key_masses(self, rows: int) -> Tensor:
        """Attention mass on each key (group, blocks, keys) of blocks of so many queries together,
        the last of which may be shorter; computed once."""
        if rows not in self._key_masses:
            log_normalizer = self.reference.log_normalizer.float()[..., None]
            scores, count = self.block.scores, len(self.block.positions)
            blocks = [slice(start, start + rows) for start in range(0, count, rows)]
            parts = [(scores[:, b] - log_normalizer[:, b]).exp().sum(dim=1) for b in blocks]
            self._key_masses[rows] = torch.stack(parts, dim=1)
        return self._key_masses[rows]

    @property
    def is_possible(self) -> bool:
        """Whether the best keys hold no more than all of the attention, the others no more than as
        much each as the last of the best, and none a larger share than one before it."""
        shares, mass = self.best_probabilities, self.fractions[..., -1]
        others = (self.block.visible_count - self.no_rank).clamp(min=0) * shares[..., -1]
        sink_mass = log_sink_mass(self.block.unit, self.reference.log_normalizer).exp()
        right = (mass <= 1 + ROUNDING) & (mass + others + sink_mass >= 1 - 10 * ROUNDING)
        return bool(right.all()) and bool((shares.diff(dim=-1) <= ROUNDING).all())

    def rows(self, rows: slice, ranks: int | None = None) -> "ExactBlock":
        """Some of the block's queries: with so many of their best keys at most, or with all, whose
        probabilities are then computed once for all parts."""
        if ranks is None and rows == slice(0, len(self.block.positions)):
            return self
        part = ExactBlock(
            self.block.part(rows), self.reference.part(rows, ranks), self.buckets[:, rows]
        )
        if ranks is None:
            for name in (
                "best_log_probabilities",
                "best_probabilities",
                "fractions",
                "own_buckets",
            ):
                part.__dict__[name] = getattr(self, name)[:, rows]
            part._within = self, rows
        return part

    @cached_property
    def _best_in_order(self) -> tuple[Tensor, Tensor]:
        """The best keys of each query (group, queries, ranks) in ascending order, and the rank of
        each, so that a list finds its ranks without a table of all keys."""
        # The id -1 stands behind all keys.
        ids = torch.where(self.reference.ids < 0, self.block.end, self.reference.ids)
        return ids.sort(dim=-1)

    def ranks(self, ids: Tensor) -> Tensor:
        """Exact rank of each key (group, queries, any); `no_rank` beyond those known."""
        best, rank = self._best_in_order
        ids = ids.expand(len(best), -1, -1).contiguous()
        place = torch.searchsorted(best, ids).clamp(max=self.no_rank - 1)
        return torch.where(best.gather(-1, place) == ids, rank.gather(-1, place), self.no_rank)

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """log of the exact probability of each key (group, queries, any) float64; -inf for the id
        -1."""
        return self.block.scores_at(ids) - self.reference.log_normalizer[..., None]


class Tallied(NamedTuple):
    """Moments over the queries of a block that count."""

    at_all: dict[str, Moments]
    """By metric, at every budget of the selection (budgets, group)."""
    at_points: dict[str, Moments]
    """By metric, at those asked for (points, group)."""
    by_bucket: dict[str, Moments]
    """By axis, of the queries in each bucket (buckets, points, metrics of `BUCKETED`, group)."""
    tails: Tails | EveryQuery
    """Of what every query comes to (points, metrics of `TAILED`, group)."""


def plain_tally(
    exact: ExactBlock, selection: Selection, points: list[int], first: Tensor
) -> Tallied:
    """Moments over the queries that count, from the metrics of every query: what `tally` gives.

    Args:
        exact: the exact answers for the block.
        selection: what the method attends.
        points: indices into `selection.ks` of the budgets that want an output and a cost.
        first: the first position that counts for each budget (budgets,), never falling.
    """
    measured = measure(exact, selection, points)
    block = exact.block
    counted = (exact.block.positions >= first.to(selection.ids.device)[:, None])[:, None]
    for figures, mask in ((measured.at_all, counted), (measured.at_points, counted[points])):
        for metric, values in figures.items():
            wrong = mask & ~((values >= 0) & (values <= most_of(metric)))
            if metric == "candidate_recall":  # of nothing to find there is none
                wrong &= ~values.isnan()
            if bool(wrong.any()):
                at, head, row = wrong.nonzero()[0].tolist()
                raise refused(metric, float(values[at, head, row]), block, head, row)
    asked = {metric: values[points] for metric, values in measured.at_all.items()}
    asked |= measured.at_points
    told = torch.stack([asked[metric] for metric in BUCKETED], dim=1)
    at_all, at_points = (
        Moments.of(torch.stack(list(values.values())), mask)
        for values, mask in ((measured.at_all, counted), (measured.at_points, counted[points]))
    )
    every = torch.stack([asked[metric] for metric in TAILED], dim=1).float()
    every = every.masked_fill(~counted[points][:, None], torch.nan)
    buckets = exact.own_buckets
    size = int(buckets.max()) + 1
    return Tallied(
        {metric: at_all.take(i) for i, metric in enumerate(measured.at_all)},
        {metric: at_points.take(i) for i, metric in enumerate(measured.at_points)},
        {
            axis: Moments.of_buckets(told, counted[points][:, None], bucket, size)
            for axis, bucket in zip(AXES, buckets, strict=True)
        },
        EveryQuery(every.cpu().numpy(), block.positions.cpu().numpy(), block.unit.group.sequence),
    )


def refused(metric: str, number: float, block: Block, head: int, row: int) -> RetraceError:
    words = metric.replace("_", " ")
    return RetraceError(
        f"came to a figure that cannot be, {words} of {number:.6g} at {where(block, head, row)}."
    )


def measure(exact: ExactBlock, selection: Selection, points: list[int]) -> Measured:
    """All metrics of one selection.

    Args:
        exact: the exact answers for the block.
        selection: what the method attends.
        points: indices into `selection.ks` of the budgets that want an output and a cost.
    """
    block, ids = exact.block, selection.ids
    ks = torch.tensor(selection.ks, device=ids.device)
    logs = exact.log_probabilities(ids)
    listed = ids >= 0
    most = torch.minimum(ks[:, None], block.visible_count)[:, None]
    every = replace(selection, extra_keys=ids.shape[-1])  # none that is attended is cut off
    at_all = {
        "recall": _hits(exact, selection, listed) / most,
        "attended_recall": _hits(exact, every, listed) / most,
        "attention_fraction": at_each_budget(prefixes(logs.exp()), selection.attended),
        "exact_attention_fraction": exact.fractions[..., ks].movedim(-1, 0),
        "top1_hit": at_each_budget(prefixes((exact.ranks(ids) == 0).double()), selection.attended),
    }
    if selection.anything_given:
        best = exact.reference.ids[..., : selection.ks[-1]]
        ranks = torch.arange(best.shape[-1], device=ids.device)
        start = torch.searchsorted(ks, ranks, right=True).expand(best.shape)
        wanted = _at_each(start, selection.given_from(best), best >= 0, len(ks))
        hits = _hits(exact, selection, listed, selection.given_from(ids))
        # NaN, and so not counted, where nothing had to be found.
        at_all["candidate_recall"] = hits / wanted.masked_fill(wanted == 0, torch.nan)
    attended = torch.minimum(selection.attended[points], listed.sum(dim=-1))
    union = union_of_heads(block, selection, attended)
    return Measured(
        selection.ks,
        at_all,
        {
            "error_norm": _error_norms(exact, selection, logs, points),
            "density": attended / block.visible_count,
            "bytes_ratio": bytes_ratio(block, selection, union),
        },
    )


def prefixes(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... values of the last axis."""
    return torch.nn.functional.pad(values.cumsum(dim=-1), (1, 0))


def at_each_budget(sums: Tensor, attended: Tensor) -> Tensor:
    """Prefix sums (group, queries, listed + 1) at the places that each budget reaches
    (budgets, group or 1, queries or 1): (budgets, group, queries)."""
    attended = attended.clamp(max=sums.shape[-1] - 1).movedim(0, -1)
    if attended.shape[:2] == (1, 1):
        return sums[..., attended.flatten()].movedim(-1, 0)
    return sums.gather(-1, attended.expand(*sums.shape[:2], -1)).movedim(-1, 0)


def _hits(
    exact: ExactBlock, selection: Selection, counted: Tensor, until: Tensor | None = None
) -> Tensor:
    """|R_k n T_k| at every budget (budgets, group, queries), over the listed keys that count, each
    before some budget.

    The j-th listed key of exact rank r is a hit at budget k when it is attended there, is among
    the k best-ranked, and r < k: so from some budget on, and counting them is a cumulative sum.
    """
    ks = torch.tensor(selection.ks, device=counted.device)
    reach = torch.minimum(selection.attended, ks[:, None, None] + selection.extra_keys)
    from_rank = torch.searchsorted(ks, exact.ranks(selection.ids), right=True)
    first_budget = torch.maximum(_first_budget(reach, counted.shape[-1]), from_rank)
    return _at_each(first_budget, until, counted, len(ks))


def _at_each(start: Tensor, until: Tensor | None, counted: Tensor, budgets: int) -> Tensor:
    """How many keys (group, queries, any) count at each budget (budgets, group, queries): from
    `start` to before `until`."""
    tally = torch.zeros(*counted.shape[:2], budgets + 1, device=counted.device)
    tally.scatter_add_(-1, start, counted.to(tally.dtype))
    if until is not None:
        tally.scatter_add_(-1, torch.maximum(start, until), -counted.to(tally.dtype))
    return tally[..., :-1].cumsum(dim=-1).movedim(-1, 0)


def _first_budget(reach: Tensor, listed: int) -> Tensor:
    """The first budget that reaches each place of a list (group or 1, queries or 1, listed), for
    the places reached by each budget (budgets, group or 1, queries or 1), which never fall; the
    number of budgets where none does."""
    reach = reach.movedim(0, -1).contiguous()
    places = torch.arange(listed, device=reach.device).repeat(*reach.shape[:2], 1)
    return torch.searchsorted(reach, places, right=True)


def _error_norms(
    exact: ExactBlock, selection: Selection, logs: Tensor, points: list[int]
) -> Tensor:
    """||o - o'|| / ||o|| at the budgets that `points` name (points, group, queries)."""
    reference = exact.reference
    if selection.output is not None:
        return error_norm(reference.output, selection.output)[points]
    output = outputs(exact.block, selection, logs, reference.log_normalizer, points)
    return error_norm(reference.output, output)


def outputs(
    block: Block, selection: Selection, logs: Tensor, log_normalizer: Tensor, points: list[int]
) -> Tensor:
    """Softmax over the attended keys, renormalised or not, times their values
    (points, group, queries, value channels); nothing attended gives zeros.

    Args:
        block: the queries.
        selection: what they attend; its own `output` is not looked at.
        logs: score less `log_normalizer` of each listed key, like its ids, float64.
        log_normalizer: (group, queries) float64, of all visible keys where the output is to be
            divided by their sum, otherwise any.
        points: indices into `selection.ks`.
    """
    ids, attended = selection.ids, selection.attended[points].movedim(0, -1)[..., None]
    width = min(int(attended.max()), ids.shape[-1])
    ids, logs = ids[..., :width].clamp(min=0), logs[..., None, :width]
    attended = attended.expand(-1, ids.shape[1], -1, -1)
    sink_mass = log_sink_mass(block.unit, log_normalizer)[..., None, None]
    places = torch.arange(width, device=ids.device)
    values, parts = block.unit.values, []
    for rows in _row_slices(ids, values.shape[1] + 2 * len(points)):
        weights = logs[:, rows].masked_fill(places >= attended[:, rows], -torch.inf)
        if not selection.true_denominator:
            # As logs, since the probabilities of what was selected may all be tiny.
            total = torch.logaddexp(weights.logsumexp(dim=-1, keepdim=True), sink_mass[:, rows])
            weights = weights - total.masked_fill(total.isneginf(), 0.0)
        # (group, queries, points, listed) @ (group, queries, listed, value channels)
        parts.append(weights.exp().to(values.dtype) @ values[ids[:, rows]])
    output = torch.cat(parts, dim=1)
    if selection.estimates is not None:
        # SparQ Attention (arXiv:2312.04985), eq. 7: the mean value stands for the mass left out.
        share = at_each_budget(prefixes(selection.estimates), selection.attended[points])
        share = share.movedim(0, -1)[..., None].to(output.dtype)
        fill = block.unit.mean_values[block.positions][:, None]
        output = share * output + (1 - share) * fill
    return output.movedim(2, 0)


def _row_slices(ids: Tensor, numbers: int) -> list[slice]:
    """Slices of the queries, so small that so many numbers for each listed id are within bounds."""
    group, rows, listed = ids.shape
    step = max(1, GATHERED[ids.device.type] // max(1, group * listed * numbers))
    return [slice(start, start + step) for start in range(0, rows, step)]


def error_norm(exact: Tensor, output: Tensor) -> Tensor:
    """||o - o'|| / ||o|| over the value channels."""
    # float64, in which no square overflows or vanishes.
    norm = torch.linalg.vector_norm(exact, dim=-1, dtype=torch.float64)
    error = torch.linalg.vector_norm(exact - output, dim=-1, dtype=torch.float64)
    return torch.where(error == 0, 0.0, error / norm)


def log_sink_mass(unit: Unit, log_normalizer: Tensor) -> Tensor:
    """log of the share (group, queries) float64 of the softmax's denominator that no key has."""
    if unit.sinks is None:
        return torch.full_like(log_normalizer, -torch.inf)
    return unit.sinks.double()[:, None] - log_normalizer


def bytes_ratio(block: Block, selection: Selection, union: Tensor) -> Tensor:
    """Bytes read for the whole group over those of full attention (points, group, queries), the
    same for every head: keys and values are read once for all heads that attend them. `union`
    (points, queries) has how many keys any of them attends. Where all heads of a layer share one
    cache, `retrace.analyze.metrics.shared_cache` counts anew."""
    group = block.unit.group
    full = group.key_bytes + group.value_bytes
    each = full if selection.attended_bytes is None else selection.attended_bytes
    read = union * each + selection.aux_bytes
    return (read / (block.visible_count * full))[:, None].expand(-1, group.rules.group, -1)


def union_of_heads(block: Block, selection: Selection, attended: Tensor) -> Tensor:
    """Distinct keys that any head of the group attends (points, queries)."""
    ids = selection.ids
    heads, rows, listed = ids.shape
    if heads == 1:
        return attended[:, 0]
    first_point = _first_budget(attended, listed).expand(heads, rows, -1)
    # Of the heads that list a key, the one that attends it at the smallest budget counts it: the
    # first of equal keys, in order of keys and then of budgets and heads.
    owner = first_point * heads + torch.arange(heads, device=ids.device)[:, None, None]
    claims = (len(attended) + 1) * heads
    claimed = torch.where(ids < 0, block.end, ids) * claims + owner
    claimed = claimed.movedim(0, 1).reshape(rows, -1).sort(dim=-1).values
    key = claimed // claims
    counted = key < block.end
    counted[:, 1:] &= key[:, 1:] != key[:, :-1]
    points = len(attended)
    tally = torch.zeros(rows, points + 1, dtype=torch.int64, device=ids.device)
    tally.scatter_add_(-1, claimed % claims // heads, counted.to(torch.int64))
    return tally[:, :points].cumsum(dim=-1).movedim(-1, 0)
