"""A trace's attributes in words. What another writer put there may have any form."""

from collections.abc import Mapping
from typing import Any


def model_name(attributes: Mapping[str, Any]) -> str:
    """The model as it was named to the capture."""
    model = attributes.get("model")
    if isinstance(model, Mapping):
        model = model.get("pretrained")
    return str(model or "unknown")


def task_names(attributes: Mapping[str, Any], *, sources: bool = False) -> str:
    """What the model read, with the data sets or files if `sources`."""
    task = attributes.get("task")
    parts = task if isinstance(task, list) else [task or "unknown"]
    return ", ".join(_task_name(part, sources) for part in parts)


def _task_name(part: Any, sources: bool) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    name = str(part.get("task", "unknown"))
    return f"{name} ({part['source']})" if sources and part.get("source") else name
