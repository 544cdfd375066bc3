"""The exact answers that every method is measured against, computed once and kept."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze import kernels
from retrace.analyze.archives import Arrays, read_arrays, write_arrays
from retrace.analyze.attention import score, scores_at, visible
from retrace.analyze.provenance import code_digest
from retrace.analyze.selection import where
from retrace.analyze.top import top
from retrace.analyze.unit import Block, Unit, scores_at_once
from retrace.traces import LayerRules, RetraceError

log = logging.getLogger("retrace")

KEPT_RANKS = 128
"""Ranks kept for later runs, so that a larger budget does not repeat the pass."""
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
        from retrace.analyze.kernels.exact import exact

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
    from retrace.analyze.kernels.exact import fits

    return fits(block, ranks)


class ReferenceStore:
    """Exact answers on disk, one file per layer and sequence, beside the trace.

    A file holds the answers of all queries of a layer and sequence and is named after the
    sequence's digest, so that it can't be taken for another capture's. It says which code they come
    from, too, so that none outlives a change of the exact pass.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        # Here, so that workers need not look: of 64 hex digits, 32 bytes.
        digest = "" if folder is None else code_digest(__name__)
        self._code = np.frombuffer(bytes.fromhex(digest), np.uint8)

    def holds(self, digest: str, layer: int) -> bool:
        """Whether there are answers for a layer of a sequence."""
        if self._folder is None:
            return False
        return self._is_of_now(read_arrays(self._path(digest, layer), {"code"}) or {})

    @property
    def active(self) -> bool:
        """Whether answers are kept at all."""
        return self._folder is not None

    def load(self, digest: str, layer: int, unit: Unit, ranks: int) -> "KeptReferences | None":
        """The answers for the layer and sequence that `unit` is of, if there are any with at least
        `ranks` ranks, or as many as there are keys."""
        if self._folder is None:
            return None
        arrays = read_arrays(self._path(digest, layer))
        if arrays is None or not self._is_of_now(arrays):
            return None  # not there, damaged, or of other code: computed anew
        del arrays["code"]
        if arrays.keys() != {"ids", "log_normalizer", "output"}:
            return None
        kept = KeptReferences(**arrays)
        return kept if kept.answers(unit, ranks) else None

    def save(self, digest: str, layer: int, references: "KeptReferences") -> None:
        """Keep the answers for a layer of a sequence, if there are some to every query, and room
        and leave to write."""
        if self._folder is not None and references.are_figures:
            arrays = {"code": self._code, **vars(references)}
            try:
                write_arrays(self._path(digest, layer), arrays, flush=False)
            except OSError as error:
                _not_kept(self._folder, error.strerror)

    def _is_of_now(self, arrays: Arrays) -> bool:
        return np.array_equal(arrays.get("code", np.empty(0)), self._code)

    def _path(self, digest: str, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / digest / f"{layer}.npz"


@dataclass(frozen=True)
class KeptReferences:
    """Exact answers of all queries and heads of a layer and sequence, as arrays."""

    ids: npt.NDArray[np.uint16 | np.int32]
    """(heads, queries, ranks); the largest value of the type where a query sees fewer keys."""
    log_normalizer: npt.NDArray[np.float64]
    """(heads, queries)"""
    output: npt.NDArray[np.float32]
    """(heads, queries, value channels)"""

    @classmethod
    def allocate(cls, unit: Unit, ranks: int) -> "KeptReferences":
        """Room for all units of the layer and sequence that `unit` is of."""
        rules, queries, keys = unit.group.rules, len(unit.positions), len(unit.keys)
        kind: type[np.uint16] | type[np.int32] = np.uint16 if keys < 1 << 16 else np.int32
        return cls(
            np.empty((rules.heads, queries, min(ranks, keys)), kind),
            np.empty((rules.heads, queries), np.float64),
            np.empty((rules.heads, queries, rules.value_dim), np.float32),
        )

    def answers(self, unit: Unit, ranks: int) -> bool:
        """Whether these are answers of the layer and sequence that `unit` is of, with at least so
        many ranks, or as many as there are keys."""
        rules, keys = unit.group.rules, len(unit.keys)
        each = (rules.heads, len(unit.positions))
        kind = np.uint16 if keys < 1 << 16 else np.int32
        return (
            self.ids.dtype == kind
            and self.log_normalizer.dtype == np.float64  # float32 in earlier versions
            and self.output.dtype == np.float32
            and self.ids.ndim == 3
            and self.ids.shape[:2] == self.log_normalizer.shape == each
            and self.output.shape == (*each, rules.value_dim)
            and self.ids.shape[-1] >= min(ranks, keys)
            and all(_are_keys(ids, keys) for ids in self.ids)
            and self.are_figures
        )

    @property
    def are_figures(self) -> bool:
        """Whether all numbers are finite."""
        return bool(np.isfinite(self.log_normalizer).all() and np.isfinite(self.output).all())

    def put(self, block: Block, reference: Reference) -> None:
        """Keep a block's answers."""
        at = (self._heads(block), block.rows)
        ranks = self.ids.shape[-1]
        none = np.iinfo(self.ids.dtype).max
        ids = reference.ids[..., :ranks]
        self.ids[at] = ids.masked_fill(ids < 0, none).cpu().numpy()
        self.log_normalizer[at] = reference.log_normalizer.cpu().numpy()
        self.output[at] = reference.output.cpu().numpy()

    def get(self, block: Block, ranks: int) -> Reference:
        """A block's answers."""
        at = (self._heads(block), block.rows)
        device = block.queries.device
        ids = torch.from_numpy(self.ids[at][..., :ranks].astype(np.int64)).to(device)
        missing = ids == np.iinfo(self.ids.dtype).max
        short = ranks - ids.shape[-1]
        return Reference(
            torch.nn.functional.pad(ids.masked_fill(missing, -1), (0, max(short, 0)), value=-1),
            torch.from_numpy(self.log_normalizer[at]).to(device),
            torch.from_numpy(self.output[at]).to(device),
        )

    @staticmethod
    def _heads(block: Block) -> slice:
        group = block.unit.group
        return slice(group.kv_head * group.rules.group, (group.kv_head + 1) * group.rules.group)


@lru_cache
def _not_kept(folder: Path, cause: str | None) -> None:
    """Say so, once: the next layer and sequence will fare no better."""
    log.warning("Exact answers are not kept in %s for later runs: %s.", folder, cause)


def _are_keys(ids: npt.NDArray[np.uint16 | np.int32], keys: int) -> bool:
    """Whether all of them are keys, or none."""
    none = np.iinfo(ids.dtype).max
    return bool((((ids >= 0) & (ids < keys)) | (ids == none)).all())
