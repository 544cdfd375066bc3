"""Replay of retrieval-based attention methods against a trace, without its model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrace.analyze.budget import Budget
    from retrace.analyze.calibration import calibrate
    from retrace.analyze.choosing import recommend
    from retrace.analyze.estimation import estimate
    from retrace.analyze.forecast import Estimate
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

_MODULES = {
    "METRICS": "retrace.analyze.results",
    "AttendMethod": "retrace.analyze.methods.base",
    "Budget": "retrace.analyze.budget",
    "Estimate": "retrace.analyze.forecast",
    "EvictionMethod": "retrace.analyze.methods.base",
    "HeadGroup": "retrace.analyze.unit",
    "Keep": "retrace.analyze.keep",
    "Method": "retrace.analyze.methods.base",
    "Past": "retrace.analyze.past",
    "Recommendation": "retrace.analyze.recommendation",
    "Results": "retrace.analyze.results",
    "ScoreMethod": "retrace.analyze.methods.base",
    "SearchMethod": "retrace.analyze.methods.base",
    "analyze": "retrace.analyze.run",
    "calibrate": "retrace.analyze.calibration",
    "estimate": "retrace.analyze.estimation",
    "merge": "retrace.analyze.merging",
    "method_class": "retrace.analyze.methods.registry",
    "method_names": "retrace.analyze.methods.registry",
    "parse_spec": "retrace.analyze.methods.registry",
    "parse_specs": "retrace.analyze.methods.registry",
    "recommend": "retrace.analyze.choosing",
}
__all__ = [
    "METRICS",
    "AttendMethod",
    "Budget",
    "Estimate",
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
    "estimate",
    "merge",
    "method_class",
    "method_names",
    "parse_spec",
    "parse_specs",
    "recommend",
]


def __getattr__(name: str) -> Any:
    # What lists or completes methods must not wait for all that replays them.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
