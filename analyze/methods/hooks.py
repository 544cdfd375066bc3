"""Calls of a method's own code: what goes wrong in it is told with its place and its own lines."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import retrace.traces
from retrace.traces import DamageError, RetraceError

HERE = Path(__file__).parent
METHODS = HERE / "methods"
CALLERS = tuple(METHODS / f"{name}.py" for name in ("base", "function", "registry", "specs"))
"""Files among the methods that call others' code."""
READER = Path(retrace.traces.__file__).parent
LIBRARIES = tuple(Path(module.__file__).parent for module in (torch, np) if module.__file__)
LONGEST = 300
"""Characters of what an error says, at most."""

Place = Callable[[], str]
"""Names where a hook was called."""


@contextmanager
def calling(hook: str, place: Place) -> Iterator[None]:
    """Call a hook of a method, such as `scores()`.

    Raises:
        RetraceError: it raised something; in one line, and the lines of its own code as a note.
    """
    try:
        yield
    except (RetraceError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and _is_read(error):
            raise  # what is read of the trace is none of the method's doing
        raise own_fault(f"{hook} at {place()}", error) from error


def own_fault(what: str, error: Exception) -> RetraceError:
    """What is told of an error in a user's own code, `what` being the code."""
    if isinstance(error, NotImplementedError):
        return RetraceError(f"{what}: {error}" if str(error) else f"{what} is not defined.")
    words = " ".join(str(error).split())
    words = words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
    told = RetraceError(
        f"{what} raised {type(error).__name__}{f': {words}' if words else ''}"
        f"{'' if words.endswith('.') else '.'}"
    )
    told.add_note(own_lines(error))
    return told


def own_lines(error: Exception) -> str:
    """The traceback of an error, less the lines of what called the user's code and of the libraries
    that it calls."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not _is_ours(Path(frame.filename))
        and not _within(frame, *LIBRARIES)
        and not frame.filename.startswith("<frozen ")
    ]
    told = traceback.format_list(own) + traceback.format_exception_only(error)
    return "".join(told).rstrip()


@contextmanager
def naming(method: object) -> Iterator[None]:
    """Put a method's name in front of what is told of it."""
    try:
        yield
    except DamageError:
        raise  # of the trace, whoever reads it
    except RetraceError as error:
        error.args = (f"{method} {error}",)
        raise


def numbers(answer: Any, hook: str, place: Place, like: Tensor) -> Tensor:
    """A hook's answer, which must be a tensor of floating-point numbers on the device of `like`."""
    tensor = _tensor(answer, hook, place, like)
    if not tensor.is_floating_point():
        raise RetraceError(
            f"{hook} gave {_kind(tensor)} at {place()}; expected floating-point numbers, such as "
            "float32."
        )
    return tensor


def key_ids(answer: Any, hook: str, place: Place, like: Tensor) -> Tensor:
    """A hook's answer, which must be whole numbers on the device of `like`, as int64."""
    ids = _tensor(answer, hook, place, like)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise RetraceError(f"{hook} gave {_kind(ids)} at {place()}; expected whole numbers, int64.")
    return ids.to(torch.int64)


def _tensor(answer: Any, hook: str, place: Place, like: Tensor) -> Tensor:
    if not isinstance(answer, Tensor):
        cure = ": torch.from_numpy makes one of an array" if isinstance(answer, np.ndarray) else ""
        raise RetraceError(
            f"{hook} gave {_kind(answer)} at {place()}; expected a torch.Tensor{cure}."
        )
    if answer.device != like.device:
        raise RetraceError(
            f"{hook} gave a tensor on {answer.device} at {place()}; expected one on {like.device}, "
            "where the queries are."
        )
    return answer


def _kind(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"a tensor of {str(answer.dtype).removeprefix('torch.')}"
    if answer is None:
        return "None"
    kind = type(answer)
    if kind.__module__ == "builtins":
        return f"a {kind.__name__}"
    return f"a {kind.__module__.partition('.')[0]}.{kind.__name__}"


def _is_ours(file: Path) -> bool:
    """Whether a file is one of those that call methods, and not a method."""
    return file in CALLERS or (file.is_relative_to(HERE) and not file.is_relative_to(METHODS))


def _is_read(error: OSError) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(_within(frame, READER) for frame in frames)


def _within(frame: traceback.FrameSummary, *folders: Path) -> bool:
    return any(Path(frame.filename).is_relative_to(folder) for folder in folders)
