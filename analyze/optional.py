"""Libraries that a plain install leaves out."""

import importlib
from typing import Any

from retrace.traces import RetraceError


def optional(module: str, command: str, wanted: str = "") -> Any:
    """A module of an optional library.

    Args:
        module: its name, such as `faiss`.
        command: what installs the library.
        wanted: what needs it.

    Raises:
        RetraceError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        text = f"{wanted} needs {library}, which is not installed: {command}."
        raise RetraceError(text.lstrip()) from error
