"""The small arrays of a trace: what it holds of each sequence besides queries, keys and values."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces.errors import DamageError, RetraceError
from retrace.traces.marks import check_names, decoded_marks
from retrace.traces.schema import PHASES
from retrace.traces.storage.arrays import Rows, Stored, Tensors

ROWS_AT_ONCE = 512
"""Rows of the small arrays that are asked for together."""
Row = npt.NDArray[Any] | DamageError | None
"""What a small array holds of a sequence, what is wrong with it, or that there is nothing."""


class SequenceArrays:
    """What a trace says of its sequences, checked when it is read.

    Whatever reads raises `DamageError` where something is not as it was written.
    """

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self._small: dict[str, Rows] = {}  # opened once: each costs a read

    @cached_property
    def planned(self) -> int:
        """How many sequences the capture set out to record."""
        return len(self._lengths)  # which there is for each, whatever the metadata say

    @cached_property
    def bundle(self) -> int:
        """How many consecutive sequences share each shard; the last bundle may have fewer."""
        return self._rows("done", "bool", (self.planned,)).bundle

    @cached_property
    def most_positions(self) -> int:
        """Positions of the longest sequence that was planned."""
        return self._rows("tokens", "int32", (self.planned, None)).shape[1]

    @cached_property
    def most_queries(self) -> int:
        """Queries of the sequence with the most that were planned."""
        return self._rows("query_positions", "int32", (self.planned, None)).shape[1]

    def finished(self, sequence: int) -> bool:
        """Whether a sequence is completely written."""
        done = self._done[sequence]
        if isinstance(done, DamageError):
            raise done
        return done is not None and bool(done)

    def length(self, sequence: int) -> int:
        """Positions of a sequence, padding excluded."""
        length = self._there(self._lengths[sequence], "length", sequence)
        if not 1 <= int(length) <= self.most_positions:
            raise self.stored.damage(
                "length", f"{length} is not from 1 to {self.most_positions}", sequence
            )
        return int(length)

    def tokens(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids (positions,)."""
        tokens = self._row("tokens", "int32", sequence)[: self.length(sequence)]
        if tokens.min() < 0:
            raise self.stored.damage("tokens", f"{tokens.min()} is no token's id", sequence)
        return tokens

    def nll(self, sequence: int) -> npt.NDArray[np.float32]:
        """Negative log-likelihood of the next token (positions,); NaN at the last position."""
        return self._figures("nll", sequence)

    def kl(self, sequence: int) -> npt.NDArray[np.float32] | None:
        """Kullback-Leibler divergence (positions,) of the next token's distribution from the exact
        model's, in nats, of a run with a method in the loop; None for other traces."""
        return self._figures("kl", sequence) if self.has("kl") else None

    def query_positions(self, sequence: int) -> npt.NDArray[np.int32]:
        """Positions (queries,) of the queries that were kept, ascending."""
        row = self._there(self._query_positions[sequence], "query_positions", sequence)
        kept = np.asarray(row[row >= 0])
        ascend = len(kept) > 0 and bool((np.diff(kept) > 0).all())
        if not ascend or kept[-1] >= self.length(sequence) or (row[len(kept) :] >= 0).any():
            raise self.stored.damage(
                "query_positions", "they are not ascending positions of the sequence", sequence
            )
        return kept

    def phase(self, sequence: int) -> npt.NDArray[np.int8]:
        """What each position is (positions,), as a code in `PHASES`."""
        if not self.has("phase"):  # made before there was such an array
            return np.zeros(self.length(sequence), np.int8)
        phase = self._row("phase", "int8", sequence)[: self.length(sequence)]
        if not np.isin(phase, list(PHASES.values())).all():
            raise self.stored.damage("phase", "its codes are not all phases", sequence)
        return phase

    def marks(self, sequence: int) -> dict[str, tuple[range, ...]]:
        """Named spans of positions, such as the evidence that answers a question, by name: those of
        one name ascending and apart from each other; none where the capture marked nothing."""
        if not self.has("marks"):
            return {}
        names = self.mark_names
        (row,) = self._rows("marks", "int32", (self.planned, None, 3)).read([sequence])
        rows = self._there(row, "marks", sequence)
        try:
            return decoded_marks(rows, names, self.length(sequence))
        except DamageError:
            raise
        except RetraceError as error:
            raise self.stored.damage("marks", str(error).rstrip("."), sequence) from error

    @cached_property
    def mark_names(self) -> tuple[str, ...]:
        """The names of all marks of the trace's sequences."""
        if not self.has("marks"):
            return ()
        attributes = (self.stored.metadata("marks") or {}).get("attributes")
        names = attributes.get("names") if isinstance(attributes, dict) else None
        if not isinstance(names, list) or not names:
            raise self.stored.damage("marks", "its attributes name no marks")
        try:
            check_names(names)
        except RetraceError as error:
            raise self.stored.damage("marks", str(error).rstrip(".")) from error
        return tuple(names)

    def has(self, name: str) -> bool:
        """Whether there is an array that not every trace has: `phase`, `marks` or `kl`."""
        return name in self._names

    def check_small_arrays(self) -> None:
        """Refuse a trace of which some array of rows is not as the others say."""
        each = (self.planned, self.most_positions)
        for name, dtype in (("nll", "float32"), ("kl", "float32"), ("phase", "int8")):
            if name == "nll" or self.has(name):
                self._check_bundle(self._rows(name, dtype, each))
        if self.has("marks"):
            self._check_bundle(self._rows("marks", "int32", (self.planned, None, 3)))
            _ = self.mark_names  # which raises where they are none
        for name in ("tokens", "query_positions"):
            self._check_bundle(self._rows(name, "int32", (self.planned, None)))
        self._check_bundle(self._rows("length", "int32", (None,)))

    def _check_bundle(self, array: Rows | Tensors) -> None:
        if array.bundle != self.bundle:
            raise array.damage(
                f"its chunks hold {array.bundle} sequences, those of done {self.bundle}"
            )

    @cached_property
    def _names(self) -> frozenset[str]:
        optional = ("phase", "marks", "kl")
        return frozenset(name for name in optional if self.stored.metadata(name) is not None)

    @cached_property
    def _lengths(self) -> list[Row]:
        return self._all("length", "int32", (None,), throughout=True)

    @cached_property
    def _done(self) -> list[Row]:
        return self._all("done", "bool", (self.planned,))

    @cached_property
    def _query_positions(self) -> list[Row]:
        return self._all("query_positions", "int32", (self.planned, None))

    def _rows(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> Rows:
        if name not in self._small:
            self._small[name] = Rows(self.stored, name, np.dtype(dtype), shape)
        return self._small[name]

    def _row(self, name: str, dtype: str, sequence: int) -> npt.NDArray[Any]:
        rows = self._rows(name, dtype, (self.planned, self.most_positions))
        return self._there(rows.read([sequence])[0], name, sequence)

    def _figures(self, name: str, sequence: int) -> npt.NDArray[np.float32]:
        rows = self._rows(name, "float32", (self.planned, self.most_positions))
        (row,) = rows.read([sequence])
        length = self.length(sequence)
        if row is None and length == 1:  # zarr-python does not write what is NaN all over
            return np.full(1, np.nan, np.float32)
        return self._there(row, name, sequence)[:length]

    def _there(self, row: Row, name: str, sequence: int) -> npt.NDArray[Any]:
        if isinstance(row, DamageError):
            raise row
        if row is None:
            raise self.stored.damage(name, "missing: there is no chunk of it", sequence)
        return row

    def _all(
        self, name: str, dtype: str, shape: tuple[int | None, ...], throughout: bool = False
    ) -> list[Row]:
        """Every sequence's row. There is no end to what metadata may claim: where there must be
        some `throughout`, it is not believed further than there are any."""
        rows = self._rows(name, dtype, shape)
        read: list[Row] = []
        for start in range(0, rows.shape[0], ROWS_AT_ONCE):
            some = rows.read(range(start, min(start + ROWS_AT_ONCE, rows.shape[0])))
            if throughout and all(row is None for row in some):
                raise rows.damage(f"it has no chunk from sequence {start} on, of {rows.shape[0]}")
            read += some
        return read
