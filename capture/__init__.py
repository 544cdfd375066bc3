"""Capture: run a causal language model over text and store what its attention saw, as a trace."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retrace.capture.settings import CaptureSettings

if TYPE_CHECKING:
    from retrace.capture.evaluation import Evaluation, evaluate
    from retrace.capture.ranks import Ranks
    from retrace.capture.record import Progress
    from retrace.capture.run import capture
    from retrace.capture.task_evaluation import TaskEvaluation, evaluate_tasks

_MODULES = {
    "Evaluation": "retrace.capture.evaluation",
    "Progress": "retrace.capture.record",
    "Ranks": "retrace.capture.ranks",
    "TaskEvaluation": "retrace.capture.task_evaluation",
    "capture": "retrace.capture.run",
    "evaluate": "retrace.capture.evaluation",
    "evaluate_tasks": "retrace.capture.task_evaluation",
}
__all__ = [
    "CaptureSettings",
    "Evaluation",
    "Progress",
    "Ranks",
    "TaskEvaluation",
    "capture",
    "evaluate",
    "evaluate_tasks",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; a help page must not wait for them.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
