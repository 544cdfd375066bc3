"""The rules of a layer, read off the call that a model makes to its attention function."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.units.attention import visible
from retrace.analyze.units.costs import SERVING_ITEMSIZE
from retrace.capture.attention.selected import CHOICES, index_bytes, most_selected
from retrace.traces import Indexer, LayerRules, RetraceError

HARMLESS = frozenset(
    {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids"}
    | {"use_cache", "cache_position", "position_embeddings", "return_dict", "logits_to_keep"}
)
"""Arguments that rules cover, or that do not change what attention computes."""
BLOCK_ELEMENTS = 1 << 26
"""Elements of a mask that are compared at once."""


def check_arguments(path: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a call with arguments that change the result in a way that no rule describes."""
    for name, value in arguments.items():
        # Flags ask for further outputs; they do not change this one.
        if name not in HARMLESS | CHOICES and value is not None and not isinstance(value, bool):
            raise RetraceError(
                f"{path} calls attention with {name!r}, which a trace cannot describe: "
                "this model cannot be captured."
            )
    if arguments.get("dropout"):
        raise RetraceError(f"{path} drops out attention weights though the model is evaluated.")


def read_rules(
    path: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    arguments: Mapping[str, Any],
    selected: Tensor | None = None,
) -> LayerRules:
    """The rules of a call.

    Args:
        path: of the attention module inside the model.
        module: the attention module.
        query: (batch, heads, positions, channels).
        key: (batch, kv_heads, positions, channels).
        value: (batch, kv_heads, positions, value channels).
        mask: who sees whom, bool (batch or 1, heads or 1, positions, positions); None is causal.
        arguments: the other arguments of the call, by name.
        selected: (batch, 1 or kv_heads, positions, kept) of a natively sparse model.

    Raises:
        RetraceError: what the call computes is not described by the rules of a layer.
    """
    if getattr(module, "compressor", None) is not None:
        raise RetraceError(
            f"{path} attends to compressed keys, which are no token's: this model cannot be "
            "captured."
        )
    if query.shape[-2] != key.shape[-2]:
        raise RetraceError(
            f"{path} attends from {query.shape[-2]} queries to {key.shape[-2]} keys, not to its "
            "own sequence: this model cannot be captured."
        )
    causal = arguments.get("is_causal")
    if mask is None and not (getattr(module, "is_causal", True) if causal is None else causal):
        raise RetraceError(f"{path} is not causal: only causal language models can be captured.")
    window, chunk = _fit_mask(path, mask, query.shape[-2], arguments.get("sliding_window"))
    scaling, sinks = arguments.get("scaling"), arguments.get("s_aux")
    return LayerRules(
        module=path,
        heads=query.shape[1],
        kv_heads=key.shape[1],
        key_dim=key.shape[-1],
        value_dim=value.shape[-1],
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        window=window,
        chunk=chunk,
        softcap=None if arguments.get("softcap") is None else float(arguments["softcap"]),
        sinks=None if sinks is None else tuple(sinks.detach().flatten().cpu().double().tolist()),
        cached_bytes=_cached_bytes(module),
        indexer=None if selected is None else _indexer(module, selected),
    )


def _indexer(module: torch.nn.Module, selected: Tensor) -> Indexer:
    """How a layer chooses its keys; whose choice it is, if another's, is found by all layers."""
    return Indexer(
        kept=most_selected(module),
        groups=selected.shape[1],
        bytes_per_key=index_bytes(module, SERVING_ITEMSIZE),
    )


def _cached_bytes(module: torch.nn.Module) -> int | None:
    """What latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) caches of a token: the
    latent vector and the rotated part of the key, for all heads together. None of other attention.

    All its families name the two alike. They are asked of the module, not of the configuration:
    hybrids have other attention beside, and layers without a rotated part.
    """
    latent = getattr(module, "kv_lora_rank", None)
    rotated = getattr(module, "qk_rope_head_dim", None)
    if not isinstance(latent, int) or not isinstance(rotated, int) or latent < 1:
        return None
    return (latent + rotated) * SERVING_ITEMSIZE


def mask_fits(mask: Tensor | None, length: int, rules: LayerRules) -> bool:
    """Whether a mask hides exactly what the rules hide in a sequence of `length` positions."""
    if mask is None:
        return all(extent is None or extent >= length for extent in (rules.window, rules.chunk))
    positions = torch.arange(length, device=mask.device)
    return hides_as_ruled(mask, positions, positions, rules)


def hides_as_ruled(mask: Tensor, queries: Tensor, keys: Tensor, rules: LayerRules) -> bool:
    """Whether a mask, bool (any, any, queries, keys), hides exactly what the rules hide from
    queries at these positions (queries,), of keys at these (keys,)."""
    rows = max(1, BLOCK_ELEMENTS // (mask.shape[0] * mask.shape[1] * max(1, len(keys))))
    parts = zip(torch.split(queries, rows), torch.split(mask, rows, dim=2), strict=True)
    return all(bool((part == visible(block, keys, rules)).all()) for block, part in parts)


def _fit_mask(
    path: str, mask: Tensor | None, length: int, window: int | None
) -> tuple[int | None, int | None]:
    """(window, chunk) that the mask shows; the window that was passed must agree with it."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape[-2:] != (length, length)):
        raise RetraceError(
            f"{path} adds a {str(mask.dtype).removeprefix('torch.')} mask {tuple(mask.shape)} to "
            "its scores, which a trace cannot describe: this model cannot be captured."
        )
    candidate: tuple[int | None, int | None]
    if window is not None:
        candidate = (window, None)
    elif mask is None:
        candidate = (None, None)
    else:
        candidate = _guess(mask)
    shape = LayerRules(path, 1, 1, 1, 1, 1.0, window=candidate[0], chunk=candidate[1])
    if not mask_fits(mask, length, shape):
        said = "no window or chunk" if window is None else f"not the window of {window} it names"
        raise RetraceError(
            f"{path} hides keys by a mask that is {said}: this model cannot be captured."
        )
    return candidate


def _guess(mask: Tensor) -> tuple[int | None, int | None]:
    """The (window, chunk) that a mask would have, judged by the first query that misses a key."""
    first = mask[0, 0].contiguous().view(torch.uint8).argmax(-1)
    misses = torch.nonzero(first)
    if not len(misses):
        return None, None
    row = int(misses[0])
    # With a window it misses one key; with chunks it is the first of its own.
    return (row, None) if int(first[row]) == 1 else (None, row)
