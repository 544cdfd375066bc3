"""Standing between a model and its attention function, by way of transformers' own registry.

Every model that follows transformers' attention interface calls
`function(module, query, key, value, mask, **arguments)` with queries and keys after position
encoding and kv heads not repeated. A function and a mask builder registered under one name of our
own see each call; the attention itself stays the model's stock implementation.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrace.capture.attention.rules import check_arguments
from retrace.capture.attention.selected import CHOICES, folded, only_selected, selected_keys
from retrace.traces import RetraceError

# Names that contain "sdpa", "flash" or "flex" are treated specially by transformers.
NAME = "retrace_recorder"
EAGER_ELEMENTS = 1 << 28
"""Scores that the plain implementation, which holds them all, is given at once."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention module, with its output."""

    path: str
    module: torch.nn.Module
    query: Tensor
    """(batch, heads, positions, channels), after position encoding."""
    key: Tensor
    """(batch, kv_heads, positions, channels), after position encoding."""
    value: Tensor
    """(batch, kv_heads, positions, value channels)."""
    mask: Tensor | None
    """Who sees whom, bool (batch or 1, heads or 1, positions, positions); None is causal."""
    arguments: Mapping[str, Any]
    output: Tensor
    """(batch, positions, heads, value channels)."""
    selected: Tensor | None = None
    """Ids (batch, 1 or kv_heads, positions, kept) int32 of the keys that a natively sparse model
    attends to, -1 where there are fewer; the mask says what it might have chosen from."""


Observer = Callable[[AttentionCall], None]
Answer = Callable[[AttentionCall], Tensor]
"""What stands in for exact attention: the output (batch, positions, heads, value channels)."""


@dataclass(frozen=True)
class _Interception:
    stock: str
    paths: dict[torch.nn.Module, str]
    observer: Observer
    answer: Answer | None


_current: ContextVar[_Interception] = ContextVar("retrace_interception")
_of_all_threads: list[_Interception] = []
"""Those in force, for threads that one's own code starts: they inherit no context."""


@contextlib.contextmanager
def observed_attention(
    model: Any, observer: Observer, answer: Answer | None = None
) -> Iterator[None]:
    """Within this context `observer` sees every attention call of the model, which goes on with
    what `answer` gives for it, if there is such a thing.

    Raises:
        RetraceError: the model's attention does not go through the interface.
    """
    stock = implementations(model.config)
    AttentionInterface.register(NAME, _attention)
    # Without a mask builder of the same name there would be no masks, and windows would be lost.
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    paths = {module: path for path, module in model.named_modules()}
    interception = _Interception(stock[""], paths, observer, answer)
    token = _current.set(interception)
    _of_all_threads.append(interception)
    try:
        try:
            model.set_attn_implementation(NAME)
        except ValueError as error:
            raise unrecordable(model) from error
        # Models with attention code of their own keep it without a word.
        if model.config.get_text_config()._attn_implementation != NAME:
            raise unrecordable(model)
        yield
    finally:
        model.set_attn_implementation(stock)
        _of_all_threads.remove(interception)
        _current.reset(token)


def implementations(config: Any, otherwise: str | None = None) -> dict[str, Any]:
    """Which attention a configuration has, under "", and those within it have, by name: what
    `set_attn_implementation` takes to set them again.

    Each has its own: that of a tower for sound, say, may refuse what the language model has.
    """
    own = config._attn_implementation or otherwise
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inside = {name: implementations(part, own) for name, part in parts.items() if part is not None}
    return {"": own, **inside}


@contextlib.contextmanager
def exact_attention() -> Iterator[None]:
    """Within `observed_attention`: calls are neither seen nor answered, and exact."""
    token = _current.set(replace(_current.get(), observer=lambda call: None, answer=None))
    try:
        yield
    finally:
        _current.reset(token)


def unrecordable(model: Any) -> RetraceError:
    """The refusal of a model none of whose attention can be seen."""
    return RetraceError(
        f"{model.config.model_type} models have no attention that can be recorded: "
        f"{type(model).__name__} does not use transformers' attention interface."
    )


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the model calls: its stock attention, observed."""
    mask = attention_mask  # some models pass it by that name
    interception = _current.get(None)
    if interception is None or module not in interception.paths:
        interception = next(one for one in reversed(_of_all_threads) if module in one.paths)
    path = interception.paths[module]
    check_arguments(path, arguments)
    shape = query.shape[-2], key.shape[-2]
    chosen_by_mask = folded(module)
    if chosen_by_mask and mask is not None and mask.dtype != torch.bool:
        mask = mask == 0  # what is not chosen is at the type's minimum
    if mask is not None and mask.dtype != torch.bool:
        raise RetraceError(
            f"{path} adds a {str(mask.dtype).removeprefix('torch.')} mask to its scores, which a "
            "trace cannot describe: this model cannot be captured."
        )
    selected = selected_keys(path, module, mask, arguments, shape)
    arguments = {k: v for k, v in arguments.items() if k not in CHOICES}
    seen = mask
    if selected is not None:
        seen = only_selected(mask, selected, query.shape[1], shape[1])
        mask = None if chosen_by_mask else mask
    # The fused kernels know neither softcaps nor sinks; these they ignore without a word.
    plain = any(arguments.get(name) is not None for name in ("softcap", "s_aux"))
    if plain or interception.stock == "eager":
        output = _eager(path, module, query, key, value, seen, arguments)
    else:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output, _ = sdpa(module, query, key, value, seen, **arguments)
    call = AttentionCall(path, module, query, key, value, mask, arguments, output, selected)
    if interception.answer is not None:
        call = replace(call, output=interception.answer(call))
    interception.observer(call)
    return call.output, None


def _eager(
    path: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    arguments: Mapping[str, Any],
) -> Tensor:
    """The model's own plain implementation (batch, positions, heads, value channels).

    It runs block by block of queries, so that memory does not grow with their square.
    """
    function = _eager_function(path, module)
    batch, heads, queries, _ = query.shape
    keys = key.shape[-2]
    rows = max(1, EAGER_ELEMENTS // (batch * heads * keys))
    key_positions = torch.arange(keys, device=query.device)
    outputs = []
    for block in torch.split(torch.arange(queries, device=query.device), rows):
        part = slice(int(block[0]), int(block[-1]) + 1)
        # As the fused kernels have it: several queries begin at the first key, one sees them all.
        causal = key_positions <= block[:, None] + (keys - 1 if queries == 1 else 0)
        seen = causal if mask is None else mask[:, :, part]
        hidden = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        hidden = hidden.masked_fill(~seen, torch.finfo(query.dtype).min)
        hidden = hidden if mask is not None else hidden[None, None]
        output, _ = function(module, query[:, :, part], key, value, hidden, **arguments)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _eager_function(path: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            found: Callable[..., tuple[Tensor, Tensor]] = function
            return found
    raise RetraceError(
        f"{path} has softcaps or sinks, and {type(module).__module__} has no plain attention that "
        "computes them: this model cannot be captured."
    )
