"""Bytes shared out over all kv heads, for a target of their mean: see `allocation`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from retrace.analyze.recommendation.allocation import Array, path
from retrace.analyze.recommendation.bounds import upper_bounds
from retrace.analyze.recommendation.recommendation import GROUP, SETTING, Target
from retrace.traces import RetraceError


def choose_together(
    tried: pd.DataFrame,
    target: Target,
    choose: Sequence[int],
    verify: Sequence[int],
    weights: Mapping[int, float],
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The setting of each kv head (layer, kv_head): method, topk, chosen, bytes_ratio.

    The mean over all query heads meets the target by the bound that it keeps on other sequences,
    at the least bytes of the model; or its error norm is least, within a bound on bytes.

    Args:
        tried: rows of sequences, with their kv_head.
        target: what is asked for.
        choose: the sequences that choose.
        verify: those that the bound is for.
        weights: by layer, bytes of one position of one kv head.

    Returns:
        The choice, and what is known of it: the `bound` of the target's metric; and `least`, the
        bytes ratio, or error norm, that no other choice of these settings is below, as far as the
        bound is in proportion to the mean.

    Raises:
        RetraceError: no choice meets the target, but full attention everywhere.
    """
    budgeted = target.metric == "bytes_ratio"
    metric = "error_norm" if budgeted else target.metric
    each, counts = _each(tried, choose)
    _, new_counts = _each(tried, verify)
    sizes = tried.drop_duplicates([*GROUP, "head"]).groupby(GROUP)["head"].count()
    total = sum(weights[layer] for layer, _ in sizes.index)
    reads, losses, settings = [], [], []
    for at, own in each.groupby(GROUP):
        ratio = own["bytes_ratio"].to_numpy(np.float64)
        lost = own[metric].to_numpy(np.float64)
        lost = lost if budgeted else target.loss(lost).clip(min=0)
        cheaper = ratio @ counts / counts.sum() < 1
        # Full attention, last, reads all and loses nothing.
        ratio = np.vstack([ratio[cheaper], np.ones(len(choose))])
        lost = np.vstack([lost[cheaper], np.zeros(len(choose))])
        reads.append(ratio * weights[at[0]] / total)
        losses.append(lost * sizes[at] / sizes.sum())
        settings.append([*own.index.droplevel(GROUP)[cheaper], ("dense", 0)])
    share = counts / counts.sum()
    found = path([read @ share for read in reads], [lost @ share for lost in losses])

    def bound(count: int, parts: list[Array]) -> float:
        """That of a sum over heads after so many steps, on other sequences."""
        options = found.options(count)
        by_sequence = sum(part[i] for part, i in zip(parts, options, strict=True))
        return float(upper_bounds(np.array([by_sequence]), counts[None], new_counts[None])[0])

    if budgeted:
        count = found.most(lambda steps: bound(steps, reads) <= target.value)
        if count < 0:
            raise RetraceError(
                f"Nothing tried meets {target} for the whole model: the least that it reads is "
                f"{found.reads[0]:.4g} (bound {bound(0, reads):.4g}). Ask for less, or try other "
                "methods or budgets with --method and --topk."
            )
        reached, least = bound(count, reads), found.least_loss(target.value)
    else:
        limit = float(target.loss(target.value))
        # From there on always: of few sequences a bound may be small by chance.
        count = found.enough(lambda steps: bound(steps, losses) <= limit)
        reached, least = target.loss(bound(count, losses)), found.reads[count]
        if (kept := bound(count, losses)) > 0:
            least = min(least, found.least_read(found.losses[count] * limit / kept))
    options = found.options(count)
    chosen = [own[i] for own, i in zip(settings, options, strict=True)]
    if all(method == "dense" for method, _ in chosen):
        raise RetraceError(
            f"Nothing tried meets {target} for the whole model but full attention: ask for less, "
            "try other methods or budgets with --method and --topk, or capture more sequences."
        )
    choice = pd.DataFrame(chosen, sizes.index, columns=SETTING)
    choice["chosen"] = choice["method"] != "dense"
    choice["bytes_ratio"] = [
        float(read[i] @ share * total / weights[layer])
        for (layer, _), read, i in zip(sizes.index, reads, options, strict=True)
    ]
    return choice, {"bound": float(reached), "least": float(least)}


def _each(tried: pd.DataFrame, sequences: Sequence[int]) -> tuple[Any, Array]:
    """Figures (layer, kv_head, method, topk) by metric and sequence, means over the query heads of
    a kv head; and how many queries each sequence has, which are the same for all."""
    rows = tried[tried["sequence"].isin(list(sequences))]
    table = rows.pivot_table("mean", [*GROUP, *SETTING], ["metric", "sequence"], "mean", sort=True)
    counts = rows.groupby("sequence")["count"].max().reindex(list(sequences))
    return table, counts.to_numpy(np.float64)
