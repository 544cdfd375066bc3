"""Trying methods before any time is spent: whether they can run on a trace, and may."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from retrace.analyze.methods.base import BlockMethod, EvictionMethod, ScoreMethod
from retrace.analyze.methods.hooks import naming
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.specs import MethodSpec
from retrace.analyze.replay.plan import Replayed
from retrace.analyze.replay.settings import Settings
from retrace.analyze.selection.block_causality import check_blocks
from retrace.analyze.selection.causality import check_causality
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, Neighbours, Unit, load_units, make_units
from retrace.traces import LayerRules, RetraceError, Trace

log = logging.getLogger("retrace")

SHORT = 64
"""Positions of a layer that stands for another."""


def able_to_learn(
    trace: Trace, specs: Sequence[MethodSpec], optional: Collection[str]
) -> list[MethodSpec]:
    """The methods less those that have no sequences to learn from, which a warning names.

    Raises:
        RetraceError: one of them is not optional.
    """
    if len(trace.sequences) > 1:
        return list(specs)
    able = []
    for spec in specs:
        line = (
            f"{spec} learns from sequences that it is not evaluated on, and {trace.path} has only "
            f"{len(trace.sequences)} finished: capture more."
        )
        if not spec.method.calibrated:
            able.append(spec)
        elif str(spec) in optional:
            log.warning("Left out: %s", line)
        else:
            raise RetraceError(line)
    return able


def able_to_answer(
    specs: Sequence[MethodSpec], protocol: Protocol, optional: Collection[str]
) -> list[MethodSpec]:
    """The methods that answer what a protocol asks: whole blocks of queries, or one by one. Those
    that are optional are left out otherwise.

    Raises:
        RetraceError: another does not.
    """
    able = []
    for spec in specs:
        try:
            check_answers(spec, protocol)
        except RetraceError as error:
            if str(spec) not in optional:
                raise
            log.info("Left out: %s", error)
        else:
            able.append(spec)
    return able


def check_answers(spec: MethodSpec, protocol: Protocol) -> None:
    """Refuse a method that does not answer what a protocol asks.

    Raises:
        RetraceError: it answers whole blocks of queries and is asked one by one, or the other way.
    """
    if len(spec.each) > 1 or spec.each[0] is not spec:
        for one in spec.each:
            check_answers(one, protocol)
        return
    by_blocks = isinstance(spec.method, BlockMethod)
    keep = getattr(spec.method, "keep", None)
    evicts = protocol.evict is not None and isinstance(spec.method, EvictionMethod)
    if isinstance(keep, Keep) and keep.prompt and not evicts:
        raise RetraceError(
            f"{spec} keeps the prompt, which there is only for methods that evict, and where they "
            "do so while a model decodes: give --protocol decode:R:from=P."
        )
    if not evicts and getattr(spec.method, "merge", "none") != "none":
        raise RetraceError(
            f"{spec} merges what it drops into what it keeps, which it does only where it drops "
            "keys while a model decodes: give --protocol decode:R:from=P."
        )
    if by_blocks and protocol.block is None:
        raise RetraceError(
            f"{spec} chooses keys for whole blocks of queries, and the protocol {protocol} asks "
            "query by query: give --protocol prefill:B, such as prefill:128."
        )
    if not by_blocks and protocol.block is not None:
        pooled = isinstance(spec.method, ScoreMethod)
        cure = f"blocks:of={spec.name} pools its scores" if pooled else "choose one of level block"
        raise RetraceError(
            f"{spec} answers query by query, and the protocol {protocol} asks for whole blocks of "
            f"queries: {cure}, or give another --protocol."
        )
    if isinstance(spec.method, BlockMethod) and (protocol.block or 0) % spec.method.block:
        raise RetraceError(
            f"{spec} chooses blocks of {spec.method.block} keys, and the protocol {protocol} does "
            "not have whole ones in a block of queries: give a multiple, or another block=..."
        )


class Trials:
    """Tries methods on the longest sequence of a run: on a layer of each kind; and those that look
    at other heads or layers in every layer, which made-up tensors stand for."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._sequence = max(settings.sequences, key=settings.trace.length)
        self._units: dict[tuple[int, ...], list[Unit]] = {}

    def check(self, method: Replayed) -> None:
        """Refuse a method that cannot run, or that sees what it must not; of a plan all of them."""
        for one in method.each(self._settings.trace.length(self._sequence)):
            layers = method.spec.layers_of(one.spec, self._settings.layers)
            if layers:
                with naming(one.spec) if one is not method else nullcontext():
                    self._check(one, layers)

    def _check(self, method: Replayed, layers: tuple[int, ...]) -> None:
        """The same of a method that is used in these layers."""
        if layers not in self._units:
            self._units[layers] = [*self._read(layers)]
        units = self._units[layers]
        asked = set()
        try:
            for unit in units:
                assert unit.neighbours is not None
                unit.neighbours.asked.clear()
                self._check_unit(method, unit)
                asked |= unit.neighbours.asked
        except RetraceError:
            self._units.clear()  # whatever it did to them
            raise
        if asked or method.spec.method.across_layers:
            self._check_layers(method, layers)

    def _read(self, layers: tuple[int, ...]) -> Iterator[Unit]:
        """The first kv head of the first layer of each kind."""
        known = set()
        for index in layers:
            layer = self._settings.trace.layer(index)
            if kind_of(layer.rules) not in known:
                known.add(kind_of(layer.rules))
                yield next(load_units(layer, self._sequence, self._device))

    def _check_unit(self, method: Replayed, unit: Unit) -> None:
        # The largest too: the more keys, the more of them are at the edge of a choice.
        counting, budgets = self._settings.counting, sorted({method.topk[0], method.topk[-1]})
        if isinstance(method.spec.method, BlockMethod):
            own, learnt = method.spec.method, method.calibration
            return check_blocks(own, unit, counting.protocol, budgets, learnt, method.spec.anew)
        check_causality(
            method.spec.method,
            unit,
            counting.protocol,
            budgets,
            counting.first(budgets[0], len(unit.keys)),
            method.calibration,
            method.spec.anew,
        )

    def _check_layers(self, method: Replayed, layers: tuple[int, ...]) -> None:
        """Ask for one query in every layer."""
        for index in layers:
            unit, protocol = self._stand_in(index), self._settings.counting.protocol
            rows = slice(SHORT - 1, SHORT)
            if protocol.block is None:
                protocol = Protocol()
            else:  # the last block
                rows = slice((SHORT - 1) // protocol.block * protocol.block, SHORT)
            block = Block(unit, rows)
            states = States(method.spec.method, unit, protocol, method.calibration)
            try:
                with naming(f"in layer {index}"):
                    for served in states.serve(block):
                        select(method.spec.method, served, block, [method.topk[0]])
            except RetraceError:
                if index == layers[0]:
                    return  # real tensors were no hindrance there: these tell nothing
                raise

    def _stand_in(self, index: int) -> Unit:
        """The first kv head of a short layer of the same rules, among others like the trace's."""
        trace = self._settings.trace
        positions = torch.arange(SHORT, device=self._device)

        def read(layer: int, neighbours: Neighbours | None = None) -> Iterator[Unit]:
            rules = trace.layer(layer).rules
            generator = torch.Generator().manual_seed(layer)
            queries, keys, values = (
                torch.randn(heads, SHORT, channels, generator=generator).to(self._device)
                for heads, channels in (
                    (rules.heads, rules.key_dim),
                    (rules.kv_heads, rules.key_dim),
                    (rules.kv_heads, rules.value_dim),
                )
            )
            tensors = queries, keys, values
            chosen = None
            if rules.indexer is not None:  # each query chooses its own key
                own = positions[None, :, None].int()
                chosen = own.expand(rules.indexer.groups, -1, -1)
            return make_units(
                layer, self._sequence, rules, tensors, positions, neighbours, chosen=chosen
            )

        return next(read(index, Neighbours(trace.layers, read, trace.natively_sparse)))


def kind_of(rules: LayerRules) -> tuple[Any, ...]:
    """What methods may make a difference by."""
    return (
        rules.heads,
        rules.kv_heads,
        rules.key_dim,
        rules.value_dim,
        rules.window,
        rules.chunk,
        rules.softcap is None,
        rules.sinks is None,
        rules.rotation is None,
        rules.indexer is None,
    )
