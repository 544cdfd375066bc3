"""Watching a model that other code runs: every forward pass, whose sequences it reads, and what its
attention sees."""

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.capture.attention.interface import AttentionCall
from retrace.capture.attention.passes import (
    Pass,
    Row,
    added_choices,
    added_tensors,
    attends_as_ruled,
)
from retrace.capture.attention.recorder import AttentionLayer, ComparedMasks
from retrace.capture.checks.trace import sampled_positions
from retrace.capture.model.likelihood import BLOCK_ELEMENTS
from retrace.capture.model.logits import CACHES
from retrace.capture.recording.decode import end_tokens
from retrace.capture.recording.spool import Spool
from retrace.traces import PHASES, RetraceError, to_torch
from retrace.traces.queries import QuerySelection

CHECKED_PASSES = 4
"""Passes of the first sequence whose attention output is kept at some positions, to be compared
with what the trace gives."""
DEQUANTISED = 0.5
"""How far a key that a quantised cache gives back may be from itself, relative to its norm. Another
sequence's is farther."""


@dataclass
class LiveSequence:
    """What is known of a sequence besides its queries, keys and values."""

    tokens: list[int] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    """One less than tokens, NaN where there were no logits."""
    queries: list[int] = field(default_factory=list)
    """Positions whose queries were kept so far."""
    ended: bool = False
    """Whether the model ended it, and what follows in its row of a batch is padding."""

    prompt: int | None = None
    """Positions before the first that was generated; None where none was."""
    passes: int = 0
    """Forward passes that added to it, or were broken off."""


@dataclass(frozen=True)
class _Gain:
    """What a pass adds to the sequence of one row."""

    positions: npt.NDArray[np.int32]
    kept: npt.NDArray[np.int32]
    """Of these, those whose queries the trace may come to hold."""
    sampled: npt.NDArray[np.int32]
    """Of those, the ones whose attention output is compared afterwards."""


@dataclass
class _Running:
    """A forward pass that is not finished."""

    one: Pass
    gains: list[_Gain]
    """Row by row."""
    tokens: npt.NDArray[np.int64]
    """(batch, columns of the pass)."""
    keep_logits: Any
    cache: Any
    new: bool
    recorded: set[int] = field(default_factory=set)
    outputs: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)
    masks: ComparedMasks = field(default_factory=ComparedMasks)

    @property
    def quantised(self) -> bool:
        """Whether its cache gives back other keys than it was given."""
        return _is_quantised(self.cache)


class LivePasses:
    """Follows the forward passes of a model by its hooks, and observes its attention calls.

    A pass without a cache, or with an empty one, begins a sequence for each row of its batch; one
    with a cache goes on with the sequences whose cache it is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[int, AttentionLayer],
        recorded: Sequence[int],
        selection: QuerySelection,
        spool: Spool,
    ) -> None:
        """`layers` are all that the model has; those `recorded` are kept."""
        self._model = model
        self._layers = {layer.module: layer for layer in layers.values()}
        self._recorded = frozenset(recorded)
        self._selection = selection
        self._spool = spool
        self._signature = inspect.signature(model.forward)
        self._caches: weakref.WeakKeyDictionary[Any, list[Row]] = weakref.WeakKeyDictionary()
        self._running: _Running | None = None
        self._pending: dict[int, Tensor] = {}
        self._last_keys: dict[int, Tensor] = {}
        own = [index for index, layer in layers.items() if layer.rules.kv_source is None]
        self._followed = max(own)
        self._ends = end_tokens(model)
        self._pads = _pad_tokens(model) | self._ends
        self.sequences: dict[int, LiveSequence] = {}
        self.shifted = False
        """Whether positions were told to the model that are not those in the sequence."""
        self.caches: set[str] = set()
        """Classes of the caches that it went on with."""
        self.outputs: dict[int, list[npt.NDArray[np.float64]]] = {}
        """Attention output (queries, heads, value channels) of the first sequence, by layer, at
        the sampled positions."""
        self.sampled: list[int] = []

    @property
    def layers(self) -> dict[int, AttentionLayer]:
        """All layers of the model, by index."""
        return {layer.index: layer for layer in self._layers.values()}

    def tensor(self, sequence: int, layer: int, name: str) -> Tensor:
        """A sequence's query, key or value (heads, positions, channels) as far as it has come."""
        return to_torch(self._spool.read(sequence, layer, name))

    def hooks(self) -> list[Any]:
        """Attach to the model; each has a `remove`."""
        before = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = self._model.register_forward_hook(self._end, with_kwargs=True)
        return [before, after]

    def _begin(self, module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.give_up()
        given = self._signature.bind_partial(*inputs, **options).arguments
        given |= given.pop("kwargs", {})
        ids = given.get("input_ids")
        if ids is None:
            raise RetraceError(
                "The model is given embeddings in place of token ids, which a trace has to hold: "
                "hand over input_ids."
            )
        tokens = ids.detach().cpu().numpy()
        cache = next((given[n] for n in CACHES if given.get(n) is not None), None)
        before = 0 if cache is None else _columns(cache)
        rows = self._rows_of(cache, before, len(tokens))
        mask = _told(given.get("attention_mask"), before, tokens.shape)
        new = rows is None
        if rows is None:
            first = max(self.sequences, default=-1) + 1
            rows = [Row(first + i, np.empty(0, bool)) for i in range(len(tokens))]
            self.sequences |= {row.sequence: LiveSequence() for row in rows}
        else:
            self.caches.add(type(cache).__name__)
        rows = [self._grown(row, mask[i], tokens[i], len(rows)) for i, row in enumerate(rows)]
        one = Pass(before, tokens.shape[1], rows)
        exact = before == 0 or not _is_quantised(cache)
        gains = [self._gain(row, one.positions(row), exact) for row in rows]
        self._running = _Running(one, gains, tokens, given.get("logits_to_keep"), cache, new)
        self._note_positions(one, given.get("position_ids"))

    def _rows_of(self, cache: Any, before: int, batch: int) -> list[Row] | None:
        """The rows that a cache was filled with; None where it is empty."""
        if before == 0:
            return None
        rows = self._caches.get(cache)
        if rows is None:
            raise RetraceError(
                f"The model goes on with a {type(cache).__name__} that was not filled under this "
                "recording (or is a copy): let the recording begin before the cache does."
            )
        if len(rows) != batch or len(rows[0].real) != before:
            raise RetraceError(
                f"The {type(cache).__name__} was filled with {len(rows)} sequences of "
                f"{len(rows[0].real)} positions, and now has {batch} of {before}: what is cropped, "
                "repeated or chosen from in between (assisted decoding, beams) cannot be recorded."
            )
        return rows

    def _grown(self, row: Row, told: npt.NDArray[np.bool_], tokens: Any, batch: int) -> Row:
        """A row with the columns of this pass, as its mask (columns,) tells them."""
        known = self.sequences[row.sequence]
        real = told[len(row.real) :].copy()
        if len(row.real) and len(tokens) == 1 and batch > 1:
            # `generate` goes on with padding in rows that have ended, and attends to it.
            last = known.tokens[-1] if known.tokens else None
            generated = bool(known.phases) and known.phases[-1] == PHASES["generated"]
            known.ended |= generated and last in self._ends and int(tokens[0]) in self._pads
            if known.ended:
                real[:] = False
        return Row(row.sequence, np.concatenate([row.real, real]))

    def _note_positions(self, one: Pass, told: Any) -> None:
        columns = np.arange(one.before, one.before + one.count)
        positions = None
        if isinstance(told, Tensor):
            positions = told.detach().reshape(-1, *told.shape[-2:])[0].cpu().numpy()
        for place, row in enumerate(one.rows):
            own = columns if positions is None else positions[place if len(positions) > 1 else 0]
            self.shifted |= not np.array_equal(own[one.added(row)], one.positions(row))

    def __call__(self, call: AttentionCall) -> None:
        """Keep what a call adds to its layer."""
        layer = self._layers.get(call.module)
        if layer is None:
            return
        if self._running is None:
            raise RetraceError(
                f"{call.path} is called outside a forward pass of {type(self._model).__name__}: "
                "record the model that the code calls."
            )
        running = self._running
        if layer.index in running.recorded:
            raise RetraceError(f"{call.path} called attention twice in one forward pass.")
        running.recorded.add(layer.index)
        self._check(call, layer, running)
        one = running.one
        for place, (row, gain) in enumerate(zip(one.rows, running.gains, strict=True)):
            if layer.index == self._followed:
                self._follow(call, running, place)
            positions, kept = gain.positions, gain.kept
            if layer.index not in self._recorded or not len(positions):
                continue
            query, key, value, output = added_tensors(call, one, place)
            selected = added_choices(call, one, place)
            if len(kept) < len(positions):
                chosen = torch.from_numpy(kept - positions[0]).long().to(query.device)
                query = query[:, chosen]
                selected = None if selected is None else selected[:, chosen]
            tensors = {"query": query, "key": key, "value": value}
            if selected is not None and layer.rules.indexer is not None:
                width = layer.rules.indexer.kept - selected.shape[-1]
                tensors["selected"] = torch.nn.functional.pad(selected, (0, width), value=-1)
            for name, tensor in tensors.items():
                self._spool.append(row.sequence, layer.index, name, tensor)
            if len(gain.sampled):
                some = torch.from_numpy(gain.sampled - positions[0]).long().to(output.device)
                running.outputs[layer.index] = output[some].detach().cpu().double().numpy()

    def _check(self, call: AttentionCall, layer: AttentionLayer, running: _Running) -> None:
        """Refuse a call that follows other rules than those that the trace states."""
        rules = layer.rules
        scale = call.arguments.get("scaling")
        what = None
        if scale is not None and float(scale) != rules.scale:
            what = "another scale"
        elif call.query.dtype != layer.dtype:
            what = f"another type ({str(call.query.dtype).removeprefix('torch.')})"
        elif not running.masks.fit(call, rules, lambda: attends_as_ruled(call, running.one, rules)):
            what = "other keys in sight"
        if what is not None:
            raise RetraceError(
                f"{call.path} has {what} in this pass than by the rules of its layer (sequence "
                f"{running.one.rows[0].sequence}, from column {running.one.before} on): masks of "
                "one's own, packed sequences and autocast cannot be recorded."
            )

    def _follow(self, call: AttentionCall, running: _Running, place: int) -> None:
        """Refuse a cache whose row is no longer that of the sequence, by the key before this pass,
        which depends on all tokens so far."""
        one = running.one
        row = one.rows[place]
        used, first = one.slots(call.key.shape[-2])
        before = np.flatnonzero(row.real[: one.before])
        if len(before) and before[-1] >= first:
            found = call.key[place, :, int(before[-1]) - first]
            expected = self._last_keys[row.sequence]
            if not torch.equal(found, expected):
                apart = float((found - expected).norm() / expected.norm())
                if not (running.quantised and apart < DEQUANTISED):
                    raise RetraceError(
                        f"The cache's row {place} no longer holds sequence {row.sequence}: what "
                        "changes rows in between (beams, editing of the cache) cannot be recorded."
                    )
        added = one.added(row)
        if len(added):
            slot = used - one.count + int(added[-1])
            self._last_keys[row.sequence] = call.key[place, :, slot].detach().clone()

    def _gain(self, row: Row, positions: npt.NDArray[np.int32], exact: bool) -> _Gain:
        """What a pass adds at these positions (tokens,) to the sequence of a row; unless its keys
        are the `exact` ones there is nothing to compare."""
        none = np.empty(0, np.int32)
        if not len(positions):
            return _Gain(positions, none, none)
        known = self.sequences[row.sequence]
        first, end = int(positions[0]), int(positions[-1]) + 1
        kept = self._selection.candidates(first, end, known.prompt)
        known.passes += 1
        if row.sequence or not exact or not len(kept) or known.passes > CHECKED_PASSES:
            return _Gain(positions, kept, none)
        return _Gain(positions, kept, sampled_positions(kept, self.layers))

    def _end(
        self, module: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        running = self._running
        if running is None:
            return
        missing = sorted(self._recorded - running.recorded)
        if missing:
            raise RetraceError(
                f"Layer {missing[0]} was not called in a forward pass: this model, or this way to "
                "run it, cannot be recorded."
            )
        one = running.one
        phase = PHASES["generated" if one.before and one.count == 1 else "context"]
        logits = output.get("logits") if isinstance(output, Mapping) else None
        for place, (row, gain) in enumerate(zip(one.rows, running.gains, strict=True)):
            columns = one.added(row)
            if not len(columns):
                continue
            known = self.sequences[row.sequence]
            self.sampled += gain.sampled.tolist()
            tokens = running.tokens[place, columns]
            given = None if logits is None else logits[place].detach()
            self._note_likelihoods(row.sequence, tokens, columns, given, one.count, running)
            known.tokens += tokens.tolist()
            known.phases += [phase] * len(tokens)
            known.queries += gain.kept.tolist()
            if known.prompt is None and phase == PHASES["generated"]:
                known.prompt = int(gain.positions[0])
        for index, found in running.outputs.items():
            self.outputs.setdefault(index, []).append(found)
        cache = running.cache
        for name in CACHES:
            handed_out = output.get(name) if isinstance(output, Mapping) else None
            cache = cache if handed_out is None else handed_out
        if cache is not None and _columns(cache) == one.before + one.count:
            try:
                self._caches[cache] = list(one.rows)
            except TypeError as error:
                raise RetraceError(
                    f"The model's cache is a {type(cache).__name__}, which cannot be followed: "
                    "use one of transformers' Cache classes."
                ) from error
        self._running = None

    def _note_likelihoods(
        self,
        sequence: int,
        tokens: npt.NDArray[np.int64],
        columns: npt.NDArray[np.intp],
        logits: Tensor | None,
        count: int,
        running: _Running,
    ) -> None:
        """-log p of each token that a sequence gains, where the logits before it were given."""
        known = self.sequences[sequence]
        if not isinstance(running.keep_logits, int | None):
            logits = None  # some rows of it, in whatever order
        first = count if logits is None else count - len(logits)
        nll = np.full(len(tokens), np.nan, np.float32)  # of each token, by the logits before it
        waiting = self._pending.pop(sequence, None)
        if waiting is not None and known.tokens:
            nll[0] = _cross_entropy(waiting[None], tokens[:1])[0]
        if logits is not None:
            there = np.flatnonzero(columns[:-1] >= first)
            rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
            for start in range(0, len(there), rows):
                some = there[start : start + rows]
                chosen = torch.from_numpy(columns[some] - first).to(logits.device)
                nll[some + 1] = _cross_entropy(logits[chosen], tokens[some + 1])
            if columns[-1] >= first:
                self._pending[sequence] = logits[int(columns[-1]) - first].clone()
        known.nll += nll[0 if known.tokens else 1 :].tolist()

    def give_up(self) -> None:
        """Forget a pass that was broken off, and the sequences that it began."""
        running, self._running = self._running, None
        if running is None:
            return
        for row in running.one.rows:
            known = self.sequences[row.sequence]
            if running.new:
                self._spool.forget(row.sequence)
                del self.sequences[row.sequence]
                continue
            for layer in self._recorded:
                for name in ("query", "selected"):
                    self._spool.cut(row.sequence, layer, name, len(known.queries))
                for name in ("key", "value"):
                    self._spool.cut(row.sequence, layer, name, len(known.tokens))
        if running.cache is not None and not running.new:
            self._caches.pop(running.cache, None)  # some layers of it have grown


def _is_quantised(cache: Any) -> bool:
    return "Quantized" in type(cache).__name__


def _columns(cache: Any) -> int:
    """Columns that a cache holds."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        raise RetraceError(
            f"The model goes on with a {type(cache).__name__}, which cannot be followed: use one "
            "of transformers' Cache classes."
        )
    return int(length())


def _told(mask: Any, before: int, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which columns (batch, columns) an attention mask, as it is handed to a model, says are no
    padding; all of them without one."""
    batch, count = shape
    columns = before + count
    told = np.ones((batch, columns), bool)
    if isinstance(mask, Mapping):  # one for each kind of layer
        whole = mask.get("full_attention")
        mask = next(iter(mask.values()), None) if whole is None else whole
    if not isinstance(mask, Tensor):
        return told
    if mask.dim() == 2:
        known = mask[:, :columns].detach().cpu().numpy() != 0
        told[:, : known.shape[1]] = known
    elif mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[-1] >= columns:
        # Who sees itself is no padding; whether that is so is found by every layer's own mask.
        own = torch.diagonal(mask[:, 0], before, dim1=-2, dim2=-1)[:, :count]
        told[:, before : before + own.shape[1]] = own.detach().cpu().numpy()
    return told


def _pad_tokens(model: Any) -> set[int]:
    """The tokens that fill up a batch."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    pads = {getattr(config, "pad_token_id", None) for config in configs}
    return {pad for pad in pads if isinstance(pad, int)}


def _cross_entropy(logits: Tensor, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """-log p (tokens,) of tokens by logits (tokens, vocabulary)."""
    targets = torch.from_numpy(tokens).to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    found: npt.NDArray[np.float32] = losses.cpu().numpy()
    return found
