"""A calibration in a file of its own, which other traces of the same model are analyzed with."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.methods.specs import MethodSpec
from retrace.analyze.replay.approximation import model_weights, transformers_release
from retrace.analyze.replay.calibration import is_like, learned_parameters
from retrace.analyze.selection.states import Calibration
from retrace.analyze.storage.npz import READ_BYTES, Arrays, arrays_in, write_arrays
from retrace.traces import LayerRules, RetraceError, Trace, to_numpy
from retrace.traces.storage.regular import open_regular

FORMAT = 1
"""Of the file: an .npz of arrays `<layer>.<kv head>.<name>`, with a JSON of facts as bytes."""
FACTS = "facts"
RULES = ("heads", "kv_heads", "key_dim", "value_dim", "scale", "softcap", "window", "chunk")
"""Of a layer's rules, those that what is learnt depends on."""
BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What comes of reading what retrace did not write."""


@dataclass(frozen=True)
class GivenCalibration:
    """What a method learnt of some layers of a model, as a file has it."""

    path: Path
    digest: str
    """Names the file's content: 32 hex digits."""
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Method, parameters, model, layers and the sequences that it was learnt from."""
    arrays: Arrays = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file that anybody may have written, in no more memory than it has bytes.

        Raises:
            RetraceError: it is not there, or is no calibration of this format.
        """
        path = Path(path)
        try:
            with open_regular(path) as file:
                content = hashlib.sha256()
                while read := file.read(READ_BYTES):
                    content.update(read)
                digest = content.hexdigest()[:32]
                arrays = arrays_in(file, os.fstat(file.fileno()).st_size)
            facts = json.loads(({} if arrays is None else arrays).pop(FACTS).tobytes())
            known = facts["format"]
            given = cls(path, digest, facts, arrays or {})
            if known == FORMAT:
                given._check_facts()
        except FileNotFoundError as error:
            raise RetraceError(f"There is no calibration {path}.") from error
        except BROKEN as error:
            raise RetraceError(
                f"{path} is no calibration: `retrace calibrate TRACE METHOD --out FILE` writes one."
            ) from error
        if known != FORMAT:
            raise RetraceError(
                f"{path} is a calibration of format {str(known)[:20]}, and this retrace reads "
                f"{FORMAT}: learn it anew, or install the retrace that wrote it."
            )
        return given

    def of(self, trace: Trace, spec: MethodSpec, layers: Sequence[int]) -> Calibration:
        """What a method has learnt of these layers of a trace.

        Raises:
            RetraceError: it is another method's or model's, or lacks a layer.
        """
        self.check_method(spec)
        self._check_model(trace)
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        for layer in layers:
            rules = trace.layer(layer).rules
            self._check_layer(layer, rules)
            like = spec.method.learned_like(rules, len(trace.layers))
            at = self._first_layer(trace) if spec.method.learns == "model" else layer
            for kv_head in range(rules.kv_heads):
                own = self._own(at, kv_head if spec.method.learns == "kv head" else 0)
                if not own or not is_like(own, like):
                    raise RetraceError(
                        f"{self.path} does not hold what {spec} learns of layer {layer}, kv head "
                        f"{kv_head}: learn it anew with `retrace calibrate`."
                    )
                found[layer, kv_head] = own
        return found

    def check_method(self, spec: MethodSpec) -> None:
        """Refuse a method that has learnt something else."""
        learnt = {"method": spec.name, "parameters": learned_parameters(spec)}
        if {name: self.facts[name] for name in learnt} != learnt:
            raise RetraceError(
                f"{spec} does not fit {self.path}, which holds what {self.facts['spec']} learnt: "
                "leave out the one or the other."
            )

    def check_sequences(self, trace: Trace, sequences: Sequence[int]) -> None:
        """Refuse to evaluate a method on what it was learnt from."""
        same = [s for s in sequences if trace.digest(s) in self.facts["learnt_from"]]
        if same:
            raise RetraceError(
                f"{self.path} was learnt from sequence {', '.join(map(str, same))} of "
                f"{trace.path}, which would be evaluated: leave it out, so that sequences are held "
                "out, or take another trace."
            )

    def _check_facts(self) -> None:
        """Refuse facts of other types than retrace writes.

        Raises:
            ValueError: there are some.
        """
        kinds = {
            "method": str,
            "spec": str,
            "parameters": dict,
            "model": dict,
            "trace_layers": list,
            "layers": dict,
            "learnt_from": list,
        }
        if not all(isinstance(self.facts[name], kind) for name, kind in kinds.items()):
            raise ValueError("its facts are of other types")
        if not all(isinstance(rules, dict) for rules in self.facts["layers"].values()):
            raise ValueError("its layers have no rules")
        if not all(np.isfinite(array).all() for array in self.arrays.values()):
            raise ValueError("it holds numbers that are not finite")

    def _check_model(self, trace: Trace) -> None:
        ours, theirs = _model(trace), self.facts["model"]
        known = ours["weights"] is not None and theirs.get("weights") is not None
        # Another release may lay the same weights out otherwise.
        if known and ours["transformers"] == theirs.get("transformers"):
            same = ours["weights"] == theirs["weights"]
        else:
            same = ours["pretrained"] == theirs.get("pretrained")
        if not same:
            raise RetraceError(
                f"{self.path} was learnt from {str(theirs.get('pretrained'))[:80]}, another model "
                f"than {ours['pretrained']} of {trace.path}: calibrate on a trace of that."
            )

    def _check_layer(self, layer: int, rules: LayerRules) -> None:
        known = self.facts["layers"].get(str(layer))
        if known is None:
            raise RetraceError(
                f"{self.path} holds nothing of layer {layer}, only of "
                f"{', '.join(self.facts['layers'])}: choose among these with --layers."
            )
        if known != _rules(rules):
            other = [name for name in RULES if known.get(name) != getattr(rules, name)]
            raise RetraceError(
                f"{self.path} was learnt where layer {layer} has another {' and '.join(other)}: "
                "calibrate on a trace of the same model."
            )

    def _first_layer(self, trace: Trace) -> int:
        """The layer that what is learnt of a whole model stands under."""
        if self.facts["trace_layers"] != list(trace.layers):
            raise RetraceError(
                f"{self.path} was learnt of all layers of a trace together, and {trace.path} has "
                "others: calibrate on a trace with the same layers."
            )
        return trace.layers[0]

    def _own(self, layer: int, kv_head: int) -> dict[str, Tensor]:
        start = f"{layer}.{kv_head}."
        return {
            name.removeprefix(start): torch.from_numpy(array)
            for name, array in self.arrays.items()
            if name.startswith(start)
        }


def write_calibration(
    path: Path, trace: Trace, spec: MethodSpec, sequences: Sequence[int], learned: Calibration
) -> None:
    """Write what a method learnt of a trace, by layer and kv head, as one file.

    Raises:
        OSError: it cannot be written.
    """
    layers = sorted({layer for layer, _ in learned})
    kept: Calibration = learned
    if spec.method.learns == "model":
        kept = {(trace.layers[0], 0): learned[layers[0], 0]}
    elif spec.method.learns == "layer":
        kept = {at: own for at, own in learned.items() if at[1] == 0}
    facts = {
        "format": FORMAT,
        "retrace": version("retrace-attention"),
        "method": spec.name,
        "spec": str(spec),
        "parameters": learned_parameters(spec),
        "all_parameters": spec.parameters,
        "model": _model(trace),
        "trace_layers": list(trace.layers),
        "layers": {str(i): _rules(trace.layer(i).rules) for i in layers},
        "learnt_from": [trace.digest(s) for s in sequences],
    }
    arrays = {
        f"{layer}.{kv_head}.{name}": to_numpy(tensor)
        for (layer, kv_head), own in kept.items()
        for name, tensor in own.items()
    }
    encoded = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    write_arrays(path, {FACTS: encoded, **arrays})


def _rules(rules: LayerRules) -> dict[str, Any]:
    return {name: getattr(rules, name) for name in RULES}


def _model(trace: Trace) -> dict[str, str | None]:
    model = trace.attributes.get("model")
    name = model.get("pretrained") if isinstance(model, Mapping) else None
    return {
        "pretrained": name if isinstance(name, str) else None,
        "weights": model_weights(trace),
        "transformers": transformers_release(trace),
    }
