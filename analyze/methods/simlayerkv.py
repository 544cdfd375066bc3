"""SimLayerKV: layers whose last query attends to sinks and recent keys see no others."""

from dataclasses import dataclass, field
from typing import ClassVar

from retrace.analyze.methods.policy import StreamingPolicy
from retrace.analyze.units.past import Past
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class SimLayerKV(StreamingPolicy):
    """A layer streams if its last query, on average over all heads, attends to its first `sink` and
    last `recent` keys with more than `threshold` in sum. `of` answers the other layers, all keys by
    default.

    Judged at the end of the past, as kvpress does at the end of a prompt; the authors' code for
    decoding does so with the first query after it. Under the protocol `all` every rebuilding judges
    anew. A past of no more than `sink` and `recent` keys does not stream. The threshold is that for
    Llama 3; the authors take 0.65 for Llama 2 and 0.85 for Qwen.
    """

    source: ClassVar[str] = "arXiv:2410.13846 (SimLayerKV), section 3; sail-sg/SimLayerKV"
    fitted: ClassVar[bool] = True

    threshold: float = field(
        default=0.9, metadata={"help": "attention above which a layer streams"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise RetraceError(f"threshold={self.threshold}: expected a share between 0 and 1.")

    def streams(self, past: Past) -> bool:
        """Whether the layer is lazy."""
        if len(past.keys) <= self.sink + self.recent:
            return False
        attention = past.layer_attention(slice(-1, None)).mean(dim=(0, 1, 2))
        mass = attention[: self.sink].sum() + attention[-self.recent :].sum()
        return float(mass) > self.threshold
