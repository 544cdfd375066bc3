"""Exact answers, kept beside a trace for later runs."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from retrace.analyze.exact.reference import Reference
from retrace.analyze.storage.npz import Arrays, read_arrays, write_arrays
from retrace.analyze.storage.provenance import code_digest
from retrace.analyze.units.unit import Block, Unit
from retrace.traces import Location, beside

log = logging.getLogger("retrace")

KEPT_RANKS = 128
"""Ranks kept for later runs, so that a larger budget does not repeat the pass."""


def exact_answers(trace: Location) -> Path | None:
    """The folder, beside a trace on a local disk, where its exact answers are kept."""
    return beside(trace, "exact")


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

    @property
    def ranks(self) -> int:
        """How many ranks there is room for."""
        return int(self.ids.shape[-1])

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
