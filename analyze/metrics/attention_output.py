"""The output of attention over the keys that a method selects."""

from collections.abc import Sequence

from torch import Tensor

from retrace.analyze.exact.reference import exact_pass, refuse_unheld
from retrace.analyze.metrics.measure import outputs
from retrace.analyze.units.attention import log_normalizer
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block


def attention_output(
    block: Block,
    selection: Selection,
    points: Sequence[int],
    valued: tuple[Block, Selection] | None = None,
) -> Tensor:
    """Softmax over the attended keys of a block's queries, renormalised or not, times their values
    (points, group, queries, value channels).

    Args:
        block: the queries.
        selection: what they attend; its own `output` is not looked at.
        points: indices into `selection.ks`.
        valued: where the values are found otherwise than the keys: the block of a unit that has
            them, and the selection by their places there.
    """
    scores = block.scores_at(selection.ids)
    if selection.true_denominator:
        exact = exact_pass(block, 1)
        refuse_unheld(block, exact)
        normalizer = exact.log_normalizer
    else:
        # Any does; where nothing is attended nothing is divided.
        normalizer = log_normalizer(scores, block.unit.sinks)
        normalizer = normalizer.masked_fill(normalizer.isneginf(), 0.0)
    logs = scores - normalizer[..., None]
    return outputs(*(valued or (block, selection)), logs, normalizer, [*points])
