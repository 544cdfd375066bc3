"""The k largest scores of each row, in order, ties to the lower position."""

import torch
from torch import Tensor

from retrace.analyze.units import kernels

GROUP = 16
"""Most scores that share one maximum when the bound is looked for."""


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (..., keys), descending, ties to the lower key.

    `torch.topk` leaves the order of ties open and sorts far more than it must: on a CPU a compiled
    loop over the rows takes its place, on a GPU a kernel.

    Returns:
        scores (..., k) and key ids (..., k) int64; -inf and -1 where a row has fewer than k finite
        scores. Rows must hold no NaN.
    """
    *lead, keys = scores.shape
    if k == 0:
        return scores[..., :0], torch.empty(*lead, 0, dtype=torch.int64, device=scores.device)
    rows = scores.reshape(-1, keys)
    if kernels.usable(rows) and rows.dtype == torch.float32:
        from retrace.analyze.exact.kernels.select import fits, select

        if fits(k):
            ids, right = select(rows, k)
            if not right.all():
                ids[~right] = plain_top(rows[~right], k)[1]
            best = rows.gather(-1, ids.clamp(min=0)).masked_fill_(ids < 0, -torch.inf)
            return best.reshape(*lead, k), ids.reshape(*lead, k)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        from retrace.analyze.exact.compiled_top_k import largest

        best, ids = largest(rows, k)
    else:
        best, ids = plain_top(rows, k)
    return best.reshape(*lead, k), ids.reshape(*lead, k)


def plain_top(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (rows, keys), as `top` has them.

    The k-th largest maximum over disjoint groups of keys bounds the k-th largest score from below,
    since each of those k groups holds a score that reaches it. Only the few scores that reach the
    bound are sorted; they are met in ascending order, so that a stable sort settles ties.
    """
    keys = rows.shape[1]
    # The least finite number keeps -inf, which means "not visible", out of the candidates.
    bound = _bound(rows, min(k, keys)).clamp_(min=torch.finfo(rows.dtype).min)
    flat = (rows >= bound).reshape(-1).nonzero().squeeze(-1)
    row = flat // keys
    starts = torch.searchsorted(row, torch.arange(rows.shape[0] + 1, device=rows.device))
    width = max(int(starts.diff().max()) if flat.numel() else 0, k)
    # Candidates of a row side by side, as if the rows were all as wide as the widest.
    place = torch.arange(flat.shape[0], device=rows.device) + (row * width - starts[row])
    candidates = rows.new_full((rows.shape[0], width), -torch.inf)
    ids = torch.full((rows.shape[0], width), -1, dtype=torch.int64, device=rows.device)
    candidates.view(-1)[place] = rows.reshape(-1)[flat]
    ids.view(-1)[place] = flat - row * keys
    candidates, order = torch.sort(candidates, dim=-1, descending=True, stable=True)
    return candidates[:, :k], ids.gather(-1, order[:, :k])


def _bound(rows: Tensor, k: int) -> Tensor:
    """A bound (rows, 1) that at least k scores of each row reach, or all of them do."""
    count, keys = rows.shape
    size = min(GROUP, keys // (2 * k))
    if size < 2:
        return torch.topk(rows, k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    groups = keys // size
    # A group's members are far apart, since neighbouring keys often score alike.
    maxima = rows[:, : groups * size].reshape(count, size, groups).amax(dim=1)
    # The last few keys join the first groups; where they outnumber the groups, some join none.
    rest = rows[:, groups * size :][:, :groups]
    torch.maximum(maxima[:, : rest.shape[1]], rest, out=maxima[:, : rest.shape[1]])
    return torch.topk(maxima, k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
