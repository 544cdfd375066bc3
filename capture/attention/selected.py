"""The keys that a natively sparse model chooses for each query, by an indexer of its own.

They reach the attention call in one of three ways: as ids of keys (`indices`: DeepSeek-V3.2 and
what follows it), as blocks of keys for each kv head (`block_indices`: MiniMax-M3), or folded into
the mask (GLM-5.3, Qwen4-Exp).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retrace.traces import RetraceError

CHOICES = frozenset({"indices", "block_indices"})
"""Arguments of a call that name what it attends to."""


def has_indexer(module: torch.nn.Module) -> bool:
    """Whether an attention module chooses its keys, or takes over the choice of an earlier one."""
    return getattr(module, "indexer", None) is not None or bool(getattr(module, "skip_topk", False))


def folded(module: torch.nn.Module) -> bool:
    """Whether the mask of a module's calls holds its choice, since it hands over no ids."""
    pooled = getattr(getattr(module, "config", None), "index_kpool", None) is not None
    ratio = hasattr(getattr(module, "indexer", None), "compress_ratio")
    return has_indexer(module) and (pooled or ratio)


def selected_keys(
    path: str,
    module: torch.nn.Module,
    mask: Tensor | None,
    arguments: Mapping[str, Any],
    shape: tuple[int, int],
) -> Tensor | None:
    """Ids (batch, 1 or kv_heads, queries, kept) of the keys that a call attends to, int32, each
    once, in the model's own order where it has one; -1 where there are fewer, at the end. None for
    a layer that attends to all.

    Args:
        path: of the attention module inside the model.
        module: the attention module.
        mask: who sees whom, bool (batch or 1, heads or 1, queries, keys); None is causal.
        arguments: the other arguments of the call, by name.
        shape: how many queries and keys there are.
    """
    queries, keys = shape
    indices, blocks = arguments.get("indices"), arguments.get("block_indices")
    if indices is not None:
        ids = indices[:, None].long()
    elif blocks is not None:
        size = _block_size(path, module)
        inside = torch.arange(size, device=blocks.device)
        ids = (blocks.long()[..., None] * size + inside).masked_fill(blocks[..., None] < 0, -1)
        ids = ids.flatten(-2)
    elif mask is not None and folded(module):
        return _true_places(path, mask[:, :1])
    else:
        return None
    ids = ids.masked_fill(ids >= keys, -1)
    if mask is None:
        # Several queries begin at the first key, one sees them all.
        last = torch.arange(queries, device=ids.device) + (keys - 1 if queries == 1 else 0)
        seen = ids <= last[:, None]
    else:
        seen = mask[:, :1].expand(*ids.shape[:2], *shape).gather(-1, ids.clamp(min=0))
    return _packed(ids.masked_fill(~seen, -1)).int()


def only_selected(mask: Tensor | None, selected: Tensor, heads: int, keys: int) -> Tensor:
    """The mask, bool (batch or 1, heads or 1, queries, keys), less all that is not selected."""
    batch, groups, queries, _ = selected.shape
    ids = selected.long()
    chosen = torch.zeros((batch, groups, queries, keys + 1), dtype=torch.bool, device=ids.device)
    chosen = chosen.scatter(-1, ids.masked_fill(ids < 0, keys), True)[..., :keys]
    if groups > 1:
        chosen = chosen.repeat_interleave(heads // groups, dim=1)
    return chosen if mask is None else mask & chosen  # what is selected is seen


def joined_choices(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Choices of keys (batch, choices, any, kept), one after another; the fewer a query had to
    choose from, the fewer places it has. None where none was made."""
    made = [part for part in parts if part is not None]
    if not made:
        return None
    width = max(part.shape[-1] for part in made)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[-1]), value=-1) for part in made], dim=2)


def most_selected(module: torch.nn.Module) -> int:
    """How many keys a layer attends to at most, whatever the length; of one that takes over
    another's choice as its configuration says."""
    one: Any
    config: Any = getattr(module, "config", None)
    for one in (getattr(module, "indexer", None), config):
        if hasattr(one, "topk_blocks"):
            return int(one.topk_blocks * one.block_size)
        if hasattr(one, "token_budget"):
            return int(one.token_budget + one.compress_ratio - 1)
        if hasattr(one, "index_topk"):
            pool = getattr(one, "index_kpool", None) or getattr(config, "index_kpool", None) or 1
            return int(one.index_topk + pool - 1)
    raise RetraceError(
        f"{type(module).__name__} chooses its keys, and does not say how many at most: this model "
        "cannot be captured."
    )


def index_bytes(module: torch.nn.Module, itemsize: int) -> float:
    """Bytes that choosing reads of each cached token, at `itemsize` bytes a number: the indexer's
    keys, pooled where it scores pools; 0 where the choice is an earlier layer's."""
    indexer: Any = getattr(module, "indexer", None)
    if indexer is None:
        return 0.0
    channels = getattr(indexer, "head_dim", None) or indexer.index_head_dim
    pool = getattr(indexer, "index_kpool", None) or getattr(indexer, "compress_ratio", None) or 1
    return float(channels * itemsize / pool)


def _block_size(path: str, module: torch.nn.Module) -> int:
    indexer: Any = getattr(module, "indexer", None)
    for one in (indexer, getattr(module, "config", None)):
        size = getattr(one, "block_size", None) or getattr(one, "index_block_size", None)
        if isinstance(size, int):
            return size
    raise RetraceError(
        f"{path} chooses blocks of keys, and does not say of how many: this model cannot be "
        "captured."
    )


def _true_places(path: str, mask: Tensor) -> Tensor:
    """Where a mask (batch, 1, queries, keys) is true: ids (batch, 1, queries, most), ascending."""
    queries, keys = mask.shape[-2:]
    if queries == keys and bool(mask.triu(1).any()):
        raise RetraceError(f"{path} attends to later keys: this model cannot be captured.")
    most = int(mask.sum(-1).max())
    ids = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    return _packed(ids.masked_fill(~mask, -1))[..., :most].int()


def _packed(ids: Tensor) -> Tensor:
    """The same ids with what is -1 at the end."""
    order = (ids < 0).to(torch.uint8).sort(dim=-1, stable=True).indices
    return ids.gather(-1, order)
