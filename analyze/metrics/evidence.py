"""What a selection holds of the keys that a trace marks, such as the evidence of a question."""

from collections.abc import Sequence

import torch
from torch import Tensor

from retrace.analyze.metrics.measure import ExactBlock
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.units.attention import score
from retrace.analyze.units.selection import Selection


class MarkedKeys:
    """The marked keys that some queries see, and what exact attention pays each."""

    def __init__(self, exact: ExactBlock, spans: Sequence[range]) -> None:
        """`spans` of positions, one at least, ascend and are apart from each other."""
        block = exact.block
        self._positions = block.positions
        self._end = block.end
        inside = [torch.arange(s.start, s.stop) for s in spans]
        ids = torch.cat(inside).to(block.positions.device)
        self.ids = ids[ids < block.end]
        """(marked,) of those that any of the queries sees."""
        if not len(self.ids):
            return
        unit = block.unit
        self._seen = block.sees(self.ids[None])
        """Which of them each query sees (queries, marked)."""
        # In float64, and as shares of the largest: what is paid may be very little.
        scores = score(block.queries.double(), unit.keys[self.ids].double(), unit.group.rules)
        scores = scores.masked_fill(~self._seen, -torch.inf)
        total = scores.logsumexp(dim=-1)
        self._mass = (total - exact.reference.log_normalizer).exp()
        """What all of them are paid together (group, queries)."""
        self._shares = (scores - total.masked_fill(total.isneginf(), 0.0)[..., None]).exp()
        """What each has of that (group, queries, marked)."""

    def moments(
        self, selection: Selection, rows: slice, points: list[int], first: Tensor
    ) -> dict[str, Moments]:
        """Moments (points, group) by metric of level `marked`, over the queries that count and see
        a marked key; nothing where no query sees one.

        Args:
            selection: what some of the queries attend.
            rows: which these are.
            points: indices into `selection.ks` of the budgets asked for.
            first: the first position that counts for each budget (budgets,).
        """
        if not len(self.ids):
            return {}
        seen, shares, mass = self._seen[rows], self._shares[:, rows], self._mass[:, rows]
        places, count = self._places(selection.ids), seen.sum(dim=-1)
        recalls, kept_masses = [], []
        for attended in selection.attended[points].clamp(max=selection.ids.shape[-1]):
            kept = places < attended[..., None]
            recalls.append(kept.sum(dim=-1) / count.double())
            kept_masses.append((shares * kept).sum(dim=-1))
        every = {
            "evidence_recall": torch.stack(recalls),
            "evidence_mass": torch.stack(kept_masses),
            "evidence_attention": mass.expand(len(points), *mass.shape),
        }
        positions = self._positions[rows]
        counted = positions >= first.to(positions.device)[points, None]
        counted = (counted & (count > 0))[:, None]
        return {name: Moments.of(values, counted) for name, values in every.items()}

    def _places(self, ids: Tensor) -> Tensor:
        """The place of each marked key in lists (group, queries, listed): (group, queries, marked),
        their length where a list has it not."""
        marked, listed = len(self.ids), ids.shape[-1]
        # All others share one place more, whatever is written there.
        number = torch.full((self._end + 1,), marked, device=ids.device)
        number[self.ids] = torch.arange(marked, device=ids.device)
        places = torch.full((*ids.shape[:2], marked + 1), listed, device=ids.device)
        at = torch.arange(listed, device=ids.device).expand(ids.shape)
        places.scatter_(-1, number[torch.where(ids < 0, self._end, ids)], at)
        return places[..., :marked]
