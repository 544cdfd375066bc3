"""Every metric: what it is called, what it says, and where its figures stand.

Tables, plots, the report, recommendations, docs/metrics.md and the compiled loops take it from
here: a further metric is an entry, and the code that computes it (`retrace.analyze.metrics.measure`
for any device, `retrace.analyze.metrics.compiled` for a CPU).
"""

from dataclasses import dataclass
from typing import Literal

Level = Literal["budget", "point", "median", "block", "marked"]


@dataclass(frozen=True)
class Metric:
    """What a metric is."""

    name: str
    """In tables, files and on the command line."""
    title: str
    """In headings."""
    axis: str
    """On axes of plots."""
    description: str
    """In a few words."""
    definition: str
    """In Markdown, with the symbols that the README introduces."""
    level: Level
    """`budget`: measured at every budget on the way to the largest, and so has curves; `point`: at
    the budgets asked for; `median`: of another metric's queries, and so has no mean over them;
    `block`: at the budgets asked for, where blocks of queries choose together (`prefill:B`);
    `marked`: at the budgets asked for, of queries that see keys of a marked span."""
    better: Literal[1, 0, -1]
    """1 where more is better, -1 where less is; 0 where it is the trace's, not the method's."""
    most: float | None = None
    """What it can come to at the most; None of it is below 0."""
    full: float = 1.0
    """What full attention comes to."""
    every_query: bool = True
    """Whether it is of all queries that count, so that two methods are compared on the same."""
    bucketed: bool = False
    """Whether it is told apart by position and by distance."""
    tailed: bool = False
    """Whether its percentiles over queries are kept, and its worst query."""
    by_layer: bool = False
    """Whether there is a picture of it over layers."""
    swept: bool = False
    """Whether it is drawn over the values of a swept parameter."""
    interval: bool = False
    """Whether a summary shows it with its 95 % interval."""
    in_summary: bool = False
    """Whether a summary shows it, which has to fit eighty columns."""
    target: bool = False
    """Whether a recommendation can be asked for it."""


ALL = (
    Metric(
        "recall",
        "Recall",
        "recall@k",
        "share of the exact top k keys that the method returned among its k best",
        r"\|R_k ∩ T_k\| / min(k, \|V(i)\|), of R_k at most its k best-ranked keys, in "
        r"the method's own order: kept keys (sinks, then the newest first), then its "
        r"best keys, pages or clusters, the keys of one in ascending position",
        "budget",
        better=1,
        most=1.0,
        bucketed=True,
        tailed=True,
        by_layer=True,
        swept=True,
        interval=True,
        in_summary=True,
        target=True,
    ),
    Metric(
        "attention_fraction",
        "Attention fraction",
        "share of attention mass",
        "attention mass on the keys attended",
        "sum of p over R_k",
        "budget",
        better=1,
        most=1.0,
        bucketed=True,
        tailed=True,
        swept=True,
        interval=True,
        in_summary=True,
        target=True,
    ),
    Metric(
        "exact_attention_fraction",
        "Exact attention fraction",
        "share of attention mass",
        "attention mass on the exact top k keys",
        "sum of p over T_k",
        "budget",
        better=0,
        most=1.0,
    ),
    Metric(
        "attended_recall",
        "Attended recall",
        "recall of all attended",
        "share of the exact top k keys among all that the method attended",
        r"\|R_k ∩ T_k\| / min(k, \|V(i)\|), of R_k all keys, however many more than k "
        r"were attended",
        "budget",
        better=1,
        most=1.0,
    ),
    Metric(
        "candidate_recall",
        "Candidate recall",
        "candidate recall@k",
        "recall over the keys that did not have to be kept anyway",
        "`recall` over the keys that the method does not keep anyway (sinks, recent ones)",
        "budget",
        better=1,
        most=1.0,
        every_query=False,
    ),
    Metric(
        "top1_hit",
        "Top-1 hit",
        "best key attended",
        "share of queries whose best key is among those attended",
        "whether the key of largest score is in R_k",
        "budget",
        better=1,
        most=1.0,
        by_layer=True,
    ),
    Metric(
        "error_norm",
        "Error norm",
        "||o - o'|| / ||o||",
        "||o - o'|| / ||o||: relative error of the attention output",
        "‖o - o'‖ / ‖o‖, where o' is what the method outputs: by default the softmax over R_k",
        "point",
        better=-1,
        full=0.0,
        bucketed=True,
        tailed=True,
        by_layer=True,
        swept=True,
        interval=True,
        in_summary=True,
        target=True,
    ),
    Metric(
        "error_norm_median",
        "Error norm median",
        "median of ||o - o'|| / ||o||",
        "median over queries of error_norm, whose mean a few queries can make; to 0.8 % of it",
        "the median of `error_norm` over queries, to 0.8 % of it, in the column `mean`:"
        " a few queries can make the mean",
        "median",
        better=-1,
        full=0.0,
        every_query=False,
        in_summary=True,
    ),
    Metric(
        "density",
        "Density",
        "keys attended / keys visible",
        "keys attended over keys visible",
        "keys actually attended / keys visible",
        "point",
        better=-1,
        most=1.0,
        in_summary=True,
    ),
    Metric(
        "bytes_ratio",
        "Bytes ratio",
        "bytes read / bytes of full attention",
        "bytes read over those of full attention",
        "bytes read (index, projections, keys, values) / bytes of all keys and values, "
        "in bfloat16 whatever the trace holds; where heads share one cache of latent vectors, of "
        "those that any head of the layer attends / of all, beside every head's index",
        "point",
        better=-1,
        swept=True,
        in_summary=True,
        target=True,
    ),
    Metric(
        "compute_ratio",
        "Compute ratio",
        "pairs computed / pairs of full attention",
        "pairs of a query and a key that are computed, over those of full attention",
        "under `prefill:B`: pairs of a query and a key it sees that are computed / all of them, "
        "over all queries that count, whose number of pairs is the count",
        "block",
        better=-1,
        most=1.0,
        every_query=False,
        in_summary=True,
    ),
    Metric(
        "block_recall",
        "Block recall",
        "recall of the best blocks",
        "share of the blocks of most attention mass among as many that were chosen",
        "under `prefill:B`: of the blocks of keys that hold the most attention mass of a block of "
        "queries, as many as were chosen for it, the share that were",
        "block",
        better=1,
        most=1.0,
        every_query=False,
        in_summary=True,
    ),
    Metric(
        "choice_ratio",
        "Choice ratio",
        "operations to choose / operations of full attention",
        "multiply-adds that choosing took, over those of full attention",
        "under `prefill:B`: multiply-adds of the matrix products that choose blocks / those of "
        "full attention (one for each channel of a key and of a value of each pair), counted as "
        "`compute_ratio` is; sorting, sums and softmaxes are not counted",
        "block",
        better=-1,
        every_query=False,
    ),
    Metric(
        "evidence_recall",
        "Evidence recall",
        "share of the evidence's keys attended",
        "share of the marked keys that the query sees which the method attended",
        r"of prompts with a marked span (`--evidence`): \|R_k ∩ E(i)\| / \|E(i)\|, E(i) being the "
        "keys of the span that the query sees; not of queries that see none",
        "marked",
        better=1,
        most=1.0,
        every_query=False,
        in_summary=True,
    ),
    Metric(
        "evidence_mass",
        "Evidence mass",
        "share of the evidence's attention kept",
        "share of exact attention to the marked keys that is on those attended",
        "sum of p over R_k ∩ E(i) / sum of p over E(i), likewise",
        "marked",
        better=1,
        most=1.0,
        every_query=False,
        in_summary=True,
    ),
    Metric(
        "evidence_attention",
        "Evidence attention",
        "share of attention mass",
        "attention mass on the marked keys, whatever the method",
        "sum of p over E(i): how much of `evidence_mass` there is to lose",
        "marked",
        better=0,
        most=1.0,
        every_query=False,
    ),
)
BY_NAME = {metric.name: metric for metric in ALL}
METRICS: dict[str, str] = {metric.name: metric.description for metric in ALL}
"""What is measured, by name."""
MEDIAN = "error_norm_median"
"""Its rows in tables hold the median in the column `mean`."""


def _names(*metrics: Metric) -> tuple[str, ...]:
    return tuple(metric.name for metric in metrics)


AT_ALL = _names(*(metric for metric in ALL if metric.level == "budget"))
"""Measured at every budget on the way to the largest."""
AT_POINTS = _names(*(metric for metric in ALL if metric.level == "point"))
"""Measured at the budgets asked for."""
AT_BLOCKS = _names(*(metric for metric in ALL if metric.level == "block"))
"""Measured at the budgets asked for, where blocks of queries choose together."""
AT_MARKED = _names(*(metric for metric in ALL if metric.level == "marked"))
"""Measured at the budgets asked for, of queries that see keys of a marked span."""
BUCKETED = _names(*(metric for metric in ALL if metric.bucketed))
"""Those whose means are kept bucket by bucket."""
TAILED = _names(*(metric for metric in ALL if metric.tailed))
"""Those whose percentiles and worst queries are kept."""
BY_LAYER = _names(*(metric for metric in ALL if metric.by_layer))
COMPARED = _names(*(metric for metric in ALL if metric.every_query))
"""Means over all queries, so that two methods are compared on the same ones."""
SWEPT = _names(*(metric for metric in ALL if metric.swept))
SUMMARY = _names(*(metric for metric in ALL if metric.in_summary))
WITH_INTERVAL = _names(*(metric for metric in ALL if metric.interval))
TARGETS = _names(*(metric for metric in ALL if metric.target))


def table() -> str:
    """Every metric and its definition, as the README has them."""
    lines = [f"| `{metric.name}` | {metric.definition} |" for metric in ALL]
    return "\n".join(["| metric | definition |", "|---|---|", *lines])
