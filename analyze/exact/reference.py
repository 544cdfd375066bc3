"""The exact answers that every method is measured against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.units import kernels
from retrace.analyze.units.attention import score, scores_at, visible
from retrace.analyze.units.selection import where
from retrace.analyze.units.unit import Block, scores_at_once
from retrace.traces import LayerRules, RetraceError

CORRECTED = 16
"""The best keys of each query, whose terms of the normalizer are exact. The rounding of the others
averages out: on a language model 2e-7 are left, where it was 5e-6."""
LARGEST_FLOAT32 = 256.0
"""Products of norms up to which rows are answered in float32; most models stay below 100. Scores
are off by about a third of 6e-8 times that, normalizers by far less than 1e-6."""
ROUNDING_FLOAT64 = 2.0**-51
"""What float64's rounding of a score is at most, in products of norms."""
TOLERANCE = 1e-6
"""How far an attention fraction may be off."""


@dataclass(frozen=True)
class Reference:
    """Exact attention of the queries of a block."""

    ids: Tensor
    """Keys of largest score (group, queries, ranks) int64, ties to the lower key; -1 where a query
    sees fewer."""
    log_normalizer: Tensor
    """log of the softmax's denominator (group, queries) float64; NaN where scores are so large that
    even float64 does not hold it."""
    output: Tensor
    """(group, queries, value channels)"""

    def part(self, rows: slice, ranks: int | None = None) -> "Reference":
        """The answers for some of the block's queries, with so many of the best keys at most."""
        return Reference(
            self.ids[:, rows, :ranks], self.log_normalizer[:, rows], self.output[:, rows]
        )


def exact_pass(block: Block, ranks: int) -> Reference:
    """Scores, best keys, normalizer and output of a block of queries, in one pass.

    The pass is in float32, whose rounding moves scores by a few millionths where they are of
    ordinary size. That would tell in attention fractions: the scores of listed keys are taken in
    float64, so that the largest terms of the normalizer are taken so as well. Rows of larger scores
    are answered in float64 altogether.
    """
    most = max(ranks, CORRECTED)
    if holds_no_scores(block, most):
        from retrace.analyze.exact.kernels.exact import exact

        ids, rounded, log_normalizer, output = exact(block, most)
    else:
        scores = block.scores
        rounded, ids = top(scores, most)
        largest = rounded[..., :1]
        weights = (scores - largest).exp_()
        total = weights.sum(dim=-1)
        if block.unit.sinks is not None:
            total += torch.exp(block.unit.sinks[:, None] - largest.squeeze(-1))
        output = (weights @ block.unit.values[: block.end]) / total[..., None]
        log_normalizer = largest.squeeze(-1).double() + total.double().log()
    first = slice(None, CORRECTED)
    log_normalizer = _corrected(block, ids[..., first], rounded[..., first], log_normalizer)
    found = Reference(ids[..., :ranks], log_normalizer, output)
    large = block.largest_products > LARGEST_FLOAT32
    if bool(large.any()):
        _answer_in_float64(found, block, large)
    return found


def _corrected(block: Block, ids: Tensor, rounded: Tensor, log_normalizer: Tensor) -> Tensor:
    """The log normalizer (group, queries) float64 with the exact terms of these keys
    (group, queries, any) in place of those of their `rounded` scores."""
    exact = torch.exp(block.scores_at(ids) - log_normalizer[..., None]).sum(dim=-1)
    summed = torch.exp(rounded.double() - log_normalizer[..., None]).sum(dim=-1)
    return log_normalizer + torch.log1p(exact - summed)


def _answer_in_float64(found: Reference, block: Block, rows: Tensor) -> None:
    """Put the answers of the rows that are marked (group, queries) in place of those there are."""
    rules, sinks, ranks = block.unit.group.rules, block.unit.sinks, found.ids.shape[-1]
    keys, values = (t[: block.end].double() for t in (block.unit.keys, block.unit.values))
    places = torch.arange(block.end, device=keys.device)
    step = max(1, scores_at_once(keys.device) // block.end)
    for head, row in (part.unbind(1) for part in torch.split(rows.nonzero(), step)):
        queries = block.queries[head, row]
        scores = score(queries.double(), keys, rules)
        scores.masked_fill_(~visible(block.positions[row], places, rules), -torch.inf)
        ids = top(scores, max(ranks, CORRECTED))[1]
        found.ids[head, row] = ids[:, :ranks]
        sink = None if sinks is None else sinks[head].double()
        weights = torch.exp(scores - _log_sum(scores, sink)[:, None])
        found.output[head, row] = (weights @ values).float()
        # A matrix of products and single ones differ in their last digits, which are large here.
        best = scores_at(queries[None], block.unit.keys, ids[None], rules)[0]
        rest = scores.scatter(-1, ids.clamp(min=0), -torch.inf)
        others = _log_sum(torch.cat([best[:, 1:], rest], dim=-1), sink)
        log_normalizer = torch.logaddexp(best[:, 0], others)
        off = ROUNDING_FLOAT64 * block.largest_products[head, row]
        held = _mass_moved(off, scores, weights, others - log_normalizer, rules) <= TOLERANCE
        found.log_normalizer[head, row] = log_normalizer.masked_fill(~held, torch.nan)


def _mass_moved(
    off: Tensor, scores: Tensor, weights: Tensor, log_rest: Tensor, rules: LayerRules
) -> Tensor:
    """How much attention mass any set of keys gains or loses at most (rows,) where products are off
    by as much as `off` (rows,): each key's weight (rows, keys) times how far its score is off, and
    none where all of the mass is on one key. `log_rest` (rows,) is the log of the mass beside it.
    """
    if rules.softcap is None:
        return torch.exp((2 * off).log() + 2 * off + log_rest)
    # Where scores are near the bound, products do not move them.
    moved = weights * (1 - (scores.clamp(min=-rules.softcap) / rules.softcap).square())
    total = moved.sum(dim=-1)
    others = total - moved.gather(-1, weights.argmax(dim=-1, keepdim=True)).squeeze(-1)
    return (off * (log_rest.exp() * total + others)).masked_fill(off > 1, torch.inf)


def _log_sum(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """log of the sum of exp(score) over keys (rows, keys), and of exp(sink) of each row."""
    total = scores.logsumexp(dim=-1)
    return total if sinks is None else torch.logaddexp(total, sinks)


def refuse_unheld(block: Block, reference: Reference) -> None:
    """Refuse a block with a query whose exact answers there are none of, naming the first."""
    if bool(reference.log_normalizer.isfinite().all()):
        return
    head, row = (~reference.log_normalizer.isfinite()).nonzero()[0].tolist()
    raise RetraceError(
        f"Scores at {where(block, head, row)} are as large as "
        f"{float(block.largest_products[head, row]):.2g}, where float64 is too coarse to tell "
        "attention from: look into how the model was captured, or choose among layers."
    )


def holds_no_scores(block: Block, ranks: int) -> bool:
    """Whether kernels that never hold a block's scores, however large it is, are to be had."""
    if not kernels.usable(block.queries):
        return False
    from retrace.analyze.exact.kernels.exact import fits

    return fits(block, ranks)
