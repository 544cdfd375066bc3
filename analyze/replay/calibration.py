"""What methods learn from sequences that they are not evaluated on, kept beside the trace."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod, LearnedLike, Method
from retrace.analyze.methods.hooks import calling, naming
from retrace.analyze.methods.specs import MethodSpec
from retrace.analyze.selection.states import Calibration
from retrace.analyze.storage.npz import read_arrays, write_arrays
from retrace.analyze.storage.provenance import code_digest
from retrace.analyze.units.past import Past, last_of
from retrace.analyze.units.unit import Neighbours, intact
from retrace.analyze.workers.retry import finished
from retrace.analyze.workers.start import threads
from retrace.traces import RetraceError, Trace, beside, to_numpy

log = logging.getLogger("retrace")

Learned = tuple[dict[str, Tensor], ...]
"""What a method's `calibrate` gave for every kv head of a layer, on the CPU."""


def calibrations(trace: Trace) -> Path | None:
    """The folder, beside a trace on a local disk, where calibrations are kept."""
    return beside(trace.path, "calibration")


def calibration(
    trace: Trace,
    spec: MethodSpec,
    sequences: tuple[int, ...],
    layers: tuple[int, ...],
    device: torch.device,
    keep: bool,
    pool: Executor | None = None,
    again: bool = False,
) -> Calibration:
    """What a method learns of these layers, by the workers of the pool or threads; nothing where it
    needs no calibration. With `again` nothing that is on disk is taken for it."""
    if not spec.method.calibrated:
        return {}
    if pool is None:
        with threads(device) as pool:
            return calibration(trace, spec, sequences, layers, device, keep, pool, again)
    once = trace.layers[:1] if spec.method.learns == "model" else layers
    calls = {i: partial(learned, trace, spec, sequences, i, device, keep, again) for i in once}
    found: dict[int, Learned] = {}
    for layer, heads in finished(pool, calls):
        if isinstance(heads, BrokenExecutor):
            raise heads
        found[layer] = heads
    if spec.method.learns == "model":
        (everywhere, *_) = found[once[0]]
        found = {i: (everywhere,) * trace.layer(i).rules.kv_heads for i in layers}
    return {
        (layer, kv_head): arrays for layer in layers for kv_head, arrays in enumerate(found[layer])
    }


def learned(
    trace: Trace,
    spec: MethodSpec,
    sequences: tuple[int, ...],
    layer: int,
    device: torch.device,
    keep: bool = True,
    again: bool = False,
) -> Learned:
    """What a method learns of one layer from some sequences, from disk if it is there. The device
    learns; what it learns is on the CPU, since a worker's device may not be there elsewhere."""
    # Of code that nobody can look at, what was learnt may not be what it would learn now.
    folder = calibrations(trace) if keep and spec.code.digest is not None else None
    file = None if folder is None else folder / calibration_name(trace, spec, sequences, layer)
    kv_heads = trace.layer(layer).rules.kv_heads
    # What is learned of all together is learned, and kept, once.
    once = kv_heads if spec.method.learns == "kv head" else 1
    found = None if file is None or again else _load(file, once)
    like = spec.method.learned_like(trace.layer(layer).rules, len(trace.layers))
    if found is not None and all(is_like(own, like) for own in found):
        return found * (kv_heads // once)
    neighbours = [Neighbours.of_trace(trace, sequence, device) for sequence in sequences]
    arrays = []
    for kv_head in range(once):
        units = [n.units(layer)[kv_head] for n in neighbours]
        pasts = [
            Past(replace(unit, neighbours=n), 0, len(unit.keys))
            for unit, n in zip(units, neighbours, strict=True)
        ]
        with torch.inference_mode(False), naming(spec), intact(*(past.unit for past in pasts)):
            arrays.append(_calibrated(spec.method, pasts))
    if file is not None:
        _save(file, arrays)
    return tuple(arrays) * (kv_heads // once)


def _calibrated(method: Method, pasts: Sequence[Past]) -> dict[str, Tensor]:
    """What a method learns of one kv head, on the CPU."""

    with calling("calibrate()", lambda: last_of(pasts[0])):
        given = method.calibrate(pasts)
    if not isinstance(given, Mapping) or not all(isinstance(t, Tensor) for t in given.values()):
        raise RetraceError(
            f"calibrate() gave no mapping of names to tensors at {last_of(pasts[0])}."
        )
    # A copy, or it would keep what it is a part of.
    return {str(name): tensor.detach().cpu().clone() for name, tensor in given.items()}


def keep_learned(*given: Any) -> None:
    """`learned` for its file: workers need not send back what they have written."""
    learned(*given)


def calibration_name(trace: Trace, spec: MethodSpec, sequences: Sequence[int], layer: int) -> str:
    """A file's name, which follows from all that its content does: the sequences as recorded, the
    method and its own parameters, the layer. How it selects afterwards does not matter."""
    method = type(spec.method)
    facts = {
        "retrace": version("retrace-attention"),
        "method": [method.__module__, method.__qualname__, spec.code.digest],
        "learning": code_digest("retrace.analyze.replay.calibration"),
        "parameters": learned_parameters(spec),
        "sequences": [trace.digest(sequence) for sequence in sequences],
        "layer": layer,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return f"{digest}.npz"


def learned_parameters(spec: MethodSpec) -> dict[str, Any]:
    """The parameters that what a method learns follows from: not how it selects afterwards."""
    afterwards = {f.name for f in fields(EvictionMethod)}
    return {k: v for k, v in spec.parameters.items() if k not in afterwards}


def _load(file: Path, kv_heads: int) -> Learned | None:
    arrays = read_arrays(file)
    if arrays is None:
        return None  # not there, or damaged: computed anew
    found: Learned = tuple({} for _ in range(kv_heads))
    for name, array in arrays.items():
        kv_head, _, own = name.partition(".")
        if not kv_head.isdecimal() or int(kv_head) >= kv_heads:
            return None
        found[int(kv_head)][own] = torch.from_numpy(array)
    return found


def is_like(own: dict[str, Tensor], like: LearnedLike | None) -> bool:
    """Whether this is what a method learns, as far as the method says."""
    if like is None:
        return True
    return own.keys() == like.keys() and all(
        own[name].dtype == dtype
        and own[name].ndim == len(sizes)
        and all(size in (None, n) for size, n in zip(sizes, own[name].shape, strict=True))
        for name, (dtype, sizes) in like.items()
    )


def _save(file: Path, learned: Sequence[dict[str, Tensor]]) -> None:
    arrays = {
        f"{kv_head}.{name}": to_numpy(tensor)
        for kv_head, own in enumerate(learned)
        for name, tensor in own.items()
    }
    try:
        write_arrays(file, arrays)
    except OSError as error:
        log.warning("The calibration is not kept for later runs: %s.", error)
