"""Anisotropic codes of keys in partitions, by ScaNN."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from retrace.analyze.indexes import answers, rows, silenced
from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.past import Past
from retrace.analyze.unit import HeadGroup

CODE_VALUES = 16


@dataclass(frozen=True, kw_only=True)
class ScaNN(SearchMethod):
    """Keys in leaves by their nearest centroid, scored there by codes that are truest along the key
    itself, and the best `rerank` times k in full; each query head searches for itself.

    Centroids and codes are fitted to the keys that are there when the index is built, and stay;
    later keys join the leaves. Too few keys for codes (16) are scored in full. Costs take leaves to
    be of one size.
    """

    source: ClassVar[str] = "arXiv:1908.10396 (ScaNN), section 3; google-research/scann"
    extra: ClassVar[str | None] = "scann"

    leaves: int = field(
        default=0, metadata={"help": "leaves; 0 takes the root of the keys", "least": 0}
    )
    search_leaves: int = field(default=8, metadata={"help": "leaves that a query searches"})
    block: int = field(
        default=2, metadata={"help": "channels of one code; 0: no codes", "least": 0}
    )
    threshold: float = field(
        default=0.2, metadata={"help": "of anisotropic loss, as a share of a key's norm"}
    )
    rerank: int = field(default=4, metadata={"help": "keys scored in full, over k"})
    iterations: int = field(default=12, metadata={"help": "steps of k-means for leaves and codes"})
    soar: float = field(
        default=0.0, metadata={"help": "weight of SOAR, which lists keys twice; 0: none"}
    )

    def build(self, past: Past) -> Any:
        """An index of the keys."""
        keys = rows(past.keys)
        leaves = min(len(keys), self.leaves or int(len(keys) ** 0.5))
        builder = self.library().scann_ops_pybind.builder(keys, 1, "dot_product")
        builder.set_n_training_threads(1)
        builder.tree(
            num_leaves=leaves,
            num_leaves_to_search=min(self.search_leaves, leaves),
            min_partition_size=1,
            training_iterations=self.iterations,
            soar_lambda=self.soar or None,
        )
        coded = bool(self.block) and len(keys) >= CODE_VALUES
        if coded:
            builder.score_ah(
                min(self.block, keys.shape[1]),
                anisotropic_quantization_threshold=self.threshold,
                training_iterations=self.iterations,
            ).reorder(self.rerank)
        else:
            builder.score_brute_force()
        with silenced(2):
            index = builder.build(docids=[str(i) for i in range(past.end)])
        return {"index": index, "leaves": leaves, "coded": coded, "keys": past.end, "scored": 0}

    def extend(self, state: Any, new: Past) -> Any:
        """Add the keys to the leaves of the nearest centroids."""
        names = [str(i) for i in range(new.start, new.end)]
        state["index"].upsert(names, rows(new.keys), batch_size=len(names))
        state["keys"] = new.end
        return state

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best k of the leaves searched, -1 where they hold fewer."""
        wanted = min(k, state["keys"])
        state["scored"] = min(wanted * self.rerank, state["keys"])
        found, scores = state["index"].searcher.search_batched(
            rows(queries),
            wanted,
            state["scored"],
            min(self.search_leaves, state["leaves"]),
            False,
            0,
        )
        # Where leaves hold fewer, the library repeats its first key with no score.
        return answers(np.where(np.isfinite(scores), found.astype(np.int64), -1), queries)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids, the codes of the leaves that each head of the group searches, and the keys
        that are scored in full."""
        rules = group.rules
        searched = state["keys"] * min(1.0, self.search_leaves / state["leaves"])
        if not state["coded"]:
            each, full = float(group.key_bytes), 0.0
        else:
            each, full = -(-rules.key_dim // self.block) / 2, min(state["scored"], searched)
        heads = (searched * each + full * group.key_bytes) * rules.group
        return float(state["leaves"] * group.key_bytes + heads)
