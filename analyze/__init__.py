"""Replay of retrieval-based attention methods against a trace, without its model."""

from retrace.analyze.budget import Budget
from retrace.analyze.calibration import calibrate
from retrace.analyze.choosing import recommend
from retrace.analyze.keep import Keep
from retrace.analyze.merging import merge
from retrace.analyze.methods.base import (
    AttendMethod,
    EvictionMethod,
    Method,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.methods.registry import method_class, method_names, parse_spec, parse_specs
from retrace.analyze.past import Past
from retrace.analyze.recommendation import Recommendation
from retrace.analyze.results import METRICS, Results
from retrace.analyze.run import analyze
from retrace.analyze.unit import HeadGroup

__all__ = [
    "METRICS",
    "AttendMethod",
    "Budget",
    "EvictionMethod",
    "HeadGroup",
    "Keep",
    "Method",
    "Past",
    "Recommendation",
    "Results",
    "ScoreMethod",
    "SearchMethod",
    "analyze",
    "calibrate",
    "merge",
    "method_class",
    "method_names",
    "parse_spec",
    "parse_specs",
    "recommend",
]
