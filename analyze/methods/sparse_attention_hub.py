"""Maskers of sparse-attention-hub, replayed."""

import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    merged,
    part,
    visible_logits,
)
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError

Configured = tuple[str, dict[str, str]]

BY_POSITION = ("SinkMasker", "LocalMasker", "RandomSamplingMasker")
"""Maskers that look at no key."""
BY_HEAD = ("HashAttentionTopKMasker", "DoubleSparsityTopKMasker")
"""Maskers with weights for each query head of a layer."""


@dataclass(frozen=True, kw_only=True)
class SparseAttentionHub(AttendMethod):
    """What maskers of sparse-attention-hub, one after another, leave a query to attend.

    `maskers` are classes of the framework with the parameters of their configurations, joined by
    `+` as a `ResearchAttentionConfig` lists them: `OracleTopK:heavy_size=k`. The value `k` is the
    budget, and `heavy_size` is k where it is left out: sinks, recent and sampled keys come besides,
    and a list without `k` attends the same at every budget. A fraction is one of the visible keys.

    Each query is masked alone, as the first after a prefill of the keys that it sees: maskers meet
    no later key, and keep nothing from query to query. A key that was drawn with a probability
    counts by its inverse. What a masker takes over all heads (the largest norm in `MagicPig`) it
    takes over one kv head. Costs are not the framework's: one that looks at keys reads all.
    """

    source: ClassVar[str] = "xAlg-ai/sparse-attention-hub 0.1"
    extra: ClassVar[str | None] = "sparse_attention_hub"
    install: ClassVar[str | None] = (
        "pip install ray seaborn && "
        "pip install --no-deps git+https://github.com/xAlg-ai/sparse-attention-hub"
    )

    maskers: str = field(
        default="SinkMasker:sink_size=128+LocalMasker:window_size=128+OracleTopK",
        metadata={"help": "classes, as Name:parameter=value:parameter=value, joined by +"},
    )
    seed: int = field(default=0, metadata={"help": "of the random numbers", "least": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._configured()

    def build(self, past: Past) -> Any:
        """The past, and the maskers of each budget as they are made."""
        return past, {}

    def attend(
        self, state: Any, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over the keys in the mask, by the inverse of their probability, and these."""
        past, made = state
        if k not in made:
            made[k] = self._make(k)
        logits = visible_logits(past, queries, positions)
        chances = torch.zeros_like(logits)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # the framework's, of its own slow paths
            for row, position in enumerate(positions.tolist()):
                first = past.group.rules.first_visible(position)
                chance = self._mask(made[k], past, queries[:, row], first, position)
                chances[:, row, first : position + 1] = chance
        attended = logits.masked_fill(chances == 0, -torch.inf)
        weighted = attended - torch.where(chances == 0, 1.0, chances).log()
        values = past.values[: logits.shape[-1]]
        # A mask has no order, but what is drawn is less sure than the rest.
        ids = attended_ids(chances > 0, chances)
        return merged([part(weighted, values)], past.unit.sinks), ids

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """All keys, if any masker looks at them."""
        return keys * group.key_bytes if self._reads_keys else 0.0

    def reads_cache(self, state: Any, group: HeadGroup) -> bool:
        """If any masker looks at keys."""
        return self._reads_keys

    def attended_bytes(self, group: HeadGroup) -> float:
        """A value, and its key if no masker has read it."""
        return group.value_bytes + (0 if self._reads_keys else group.key_bytes)

    @property
    def _reads_keys(self) -> bool:
        return any(name not in BY_POSITION for name, _ in self._configured())

    def _mask(
        self, maskers: list[Any], past: Past, queries: Tensor, first: int, position: int
    ) -> Tensor:
        """The chance of each key from `first` to `position` to be attended (group, keys), 0 where
        it is not, for scaled queries (group, channels) of one position."""
        rules, unit = past.group.rules, past.unit
        by_head = any(type(masker).__name__ in BY_HEAD for masker in maskers)
        heads = rules.kv_heads if by_head else 1
        own = past.group.kv_head if by_head else 0
        # Maskers with weights by head meet this kv head in the place of every other.
        given = {
            "keys": unit.keys[None, None, first : position + 1].expand(-1, heads, -1, -1),
            "queries": (queries / rules.scale).repeat(heads, 1)[None, :, None],
            "values": unit.values[None, None, first : position + 1].expand(-1, heads, -1, -1),
        }
        group = past.group
        place = (self.seed, group.layer, group.sequence, group.kv_head, position)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        shape = (1, len(queries) * heads, 1, position + 1 - first)
        mask_class = self.library("sparse_attention_hub.sparse_attention").Mask
        mask = mask_class.create_empty_mask(shape, dtype=queries.dtype, device=queries.device)
        seen: dict[Any, Any] = {}
        for masker in maskers:
            before = mask
            mask = masker.add_mask(
                **given,
                attention_mask=None,
                scaling=rules.scale,
                dropout=0.0,
                sparse_meta_data=seen,
                previous_mask=before,
                layer_idx=past.group.layer,
            )
            if mask is before and not mask.is_full_mask():
                raise RetraceError(
                    f"{type(masker).__name__} of sparse-attention-hub masks nothing."
                )
        dense: Tensor = mask.get_dense_mask()
        return dense[0].view(heads, len(queries), -1)[own]

    def _make(self, k: int) -> list[Any]:
        """The maskers for a budget of k keys.

        Raises:
            RetraceError: there is no such masker or parameter, or a bad value.
        """
        kinds = self._kinds()
        configs = []
        for name, given in self._configured():
            if name not in kinds:
                raise RetraceError(f"There is no masker {name!r}: expected {', '.join(kinds)}.")
            listed = fields(kinds[name])
            known = [f.name for f in listed if f.name != "search_space"]
            if any(f.name == "heavy_size" and f.default is MISSING for f in listed):
                given = {"heavy_size": "k", **given}
            if unknown := given.keys() - set(known):
                raise RetraceError(f"{name} has no {min(unknown)!r}: it has {', '.join(known)}.")
            try:
                configs.append(kinds[name](**{n: _value(text, k) for n, text in given.items()}))
            except (TypeError, ValueError) as error:
                raise RetraceError(f"{name}: {error}.") from error
        library = self.library("sparse_attention_hub.sparse_attention")
        try:
            config = library.ResearchAttentionConfig(masker_configs=configs)
            made = library.ResearchAttention.create_from_config(config)
        except (AssertionError, OSError, ValueError) as error:
            raise RetraceError(f"{self.maskers}: {error}.") from error
        return list(made.maskers)

    def _kinds(self) -> dict[str, Any]:
        """The class of configuration of each masker."""
        inside = "sparse_attention_hub.sparse_attention.research_attention.maskers"
        registry = self.library(f"{inside}.base").MaskerRegistry.get_all_registered_types()
        return {masker.__name__: config for config, masker in registry.items()}

    def _configured(self) -> list[Configured]:
        """The maskers named, and their parameters as they are written."""
        listed = []
        for text in self.maskers.split("+"):
            name, *parameters = text.split(":")
            pairs = [parameter.partition("=") for parameter in parameters]
            if not name or not all(key and value for key, _, value in pairs):
                raise RetraceError(f"maskers: {text!r} is not of the form Name:parameter=value.")
            listed.append((name, {key: value for key, _, value in pairs}))
        return listed


def _value(text: str, k: int) -> Any:
    """A parameter as the framework takes it: the budget, a number, true or false, or text."""
    if text in ("k", "true", "false"):
        return k if text == "k" else text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
