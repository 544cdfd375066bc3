"""Replay of retrieval-based attention methods against a trace, without its model."""

from retrace.analyze.keep import Keep
from retrace.analyze.methods.base import (
    AttendMethod,
    HeadGroup,
    Method,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.methods.registry import method_class, method_names, parse_spec
from retrace.analyze.results import METRICS, Results
from retrace.analyze.run import analyze

__all__ = [
    "METRICS",
    "AttendMethod",
    "HeadGroup",
    "Keep",
    "Method",
    "Results",
    "ScoreMethod",
    "SearchMethod",
    "analyze",
    "method_class",
    "method_names",
    "parse_spec",
]
