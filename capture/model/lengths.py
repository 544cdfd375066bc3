"""How many positions a model reads, and what its rotary embedding makes of a sequence's length.

Some rotary embeddings have other frequencies in a longer sequence: those of the kind `longrope`
take one set up to the original length and another beyond it, those of the kind `dynamic` have
frequencies of their own for each length beyond it. transformers chooses them for a whole forward
pass, by its last position.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

CHANGES_WITH_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on how long the sequence is."""


@dataclass(frozen=True)
class _Rotary:
    """The parameters of one rotary embedding of a configuration."""

    kind: str
    factor: float | None
    original: int | None
    """The length before it is scaled; None where the configuration does not say."""


def longest_context(config: Any) -> int | None:
    """Most positions that a model of this configuration (of text) was made for or is scaled to;
    None where it does not say.

    That is `max_position_embeddings`, or the factor of its rotary embedding times the length
    before scaling where that is more: configurations differ in which of the two they state. A
    table of learned positions ends where it ends.
    """
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    scaled = [
        int(one.factor * one.original)
        for one in _rotaries(config)
        if one.factor is not None and one.original is not None
    ]
    return max([most, *scaled])


@dataclass(frozen=True)
class LengthDependence:
    """Where a model's rotary frequencies begin to depend on how long the sequence is."""

    dynamic: int | None = None
    """Longest sequence with frequencies that are not its own alone; None: all."""
    longrope: tuple[int, ...] = ()
    """Lengths beyond which there are other frequencies."""

    @classmethod
    def of(cls, config: Any) -> "LengthDependence":
        """That of a configuration (of text)."""
        dynamic, longrope = None, set()
        for one in _rotaries(config):
            if "dynamic" in one.kind:
                dynamic = getattr(config, "max_position_embeddings", None)
            elif one.kind == "longrope" and one.original is not None:
                longrope.add(one.original)
        return cls(dynamic, tuple(sorted(longrope)))

    def frequencies(self, length: int) -> tuple[int, ...]:
        """Equal for two lengths whose sequences have the same frequencies."""
        own = length if self.dynamic is not None and length > self.dynamic else 0
        return own, *(int(length > original) for original in self.longrope)

    def change(self, start: int, end: int) -> int | None:
        """The first length after which frequencies change while a sequence of `start` positions
        grows to `end`; None where they do not."""
        found = [original for original in self.longrope if start <= original < end]
        if self.dynamic is not None and end > self.dynamic and end > start:
            found.append(max(start, self.dynamic))
        return min(found, default=None)


def forget_lengths(model: Any) -> None:
    """Rotary embeddings forget the longest sequence so far: those of the kind `dynamic` would keep
    its frequencies for the next, which has others when it is read first."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds if isinstance(kinds, Mapping) else {"": kinds}
        for layer_type, kind in named.items():
            if not isinstance(kind, str) or "dynamic" not in kind:
                continue
            prefix = f"{layer_type}_" if layer_type else ""
            first = getattr(module, f"{prefix}original_inv_freq", None)
            if first is None:
                continue  # code that a model brings along may keep none
            setattr(module, f"{prefix}inv_freq", first.to(getattr(module, f"{prefix}inv_freq")))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rotaries(config: Any) -> Iterator[_Rotary]:
    """The rotary embeddings of a configuration, if its models have any."""
    parameters = _parameters(config)
    kinds = [part for part in parameters.values() if isinstance(part, Mapping)]
    most = getattr(config, "max_position_embeddings", None)
    for part in kinds or [parameters]:
        kind = part.get("rope_type") or part.get("type")
        if not isinstance(kind, str) or kind == "default":
            continue
        original = part.get("original_max_position_embeddings")
        if original is None:
            original = getattr(config, "original_max_position_embeddings", None)
        if original is None and not kinds:
            # Where kinds of layers differ, the model was made so, for as much as it states.
            original = most
        factor = part.get("factor")
        yield _Rotary(
            kind,
            float(factor) if isinstance(factor, int | float) else None,
            original if isinstance(original, int) else None,
        )


def _parameters(config: Any) -> Mapping[str, Any]:
    """What the configuration says of rotary embeddings, by kind of layer where they differ.

    Any configuration keeps what a config.json states; only those that declare it make use of it.
    """
    declared = inspect.signature(type(config).__init__).parameters
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if name in declared and isinstance(found, Mapping):
            return found
    return {}
