"""The installed methods by name, and how one is made with its parameters, which are text."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from retrace.analyze.methods.base import (
    AttendMethod,
    BlockMethod,
    EvictionMethod,
    Method,
    PolicyMethod,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.methods.hooks import own_fault
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.options.cache import Cache
from retrace.analyze.methods.options.keep import Keep
from retrace.traces import RetraceError
from retrace.traces.errors import did_you_mean

ENTRY_POINTS = "retrace.methods"
MOST_NUMBER = 2**31
"""Whole numbers of a spec are below this: none stands for more positions or channels."""
LEVELS: tuple[tuple[type[Method], str], ...] = (
    (ScoreMethod, "scores"),
    (SearchMethod, "search"),
    (AttendMethod, "attend"),
    (PolicyMethod, "answering"),
)
"""Kinds of method, and what each must define."""


def method_names() -> list[str]:
    """The methods that are installed, this package's and others', in alphabetical order."""
    return sorted(installed())


@cache
def installed() -> dict[str, EntryPoint]:
    """Where each is, by name; of two that share one the first on the path, as imports go."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, point)
    return found


def method_class(name: str) -> type[Method]:
    """The class of an installed method."""
    point = installed().get(name)
    if point is None:
        raise RetraceError(
            f"There is no method {name!r}.{did_you_mean(name, method_names())} "
            "`retrace methods` lists them all."
        )
    loaded = point.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise RetraceError(f"The entry point {name} ({point.value}) is not a method.")
    return loaded


def parameter_fields(method: type[Method]) -> list[Field[Any]]:
    """The parameters that a spec can set."""
    return [f for f in fields(method) if f.init and f.name != "function"]


def missing_libraries() -> dict[str, str]:
    """The installed methods whose library is not there, and the command that installs it."""
    kinds = {name: method_class(name) for name in method_names()}
    return {
        name: kind.install_command() or ""
        for name, kind in kinds.items()
        if not kind.is_installed()
    }


def make(method: type[Method], name: str, parameters: Mapping[str, str]) -> Method:
    """A method of a class that goes by a name, the parameters given as text.

    Raises:
        RetraceError: it lacks a parameter, a value is none, or it is not a whole method.
    """
    _check_fields(method, name)
    hints = get_type_hints(method)
    known = {f.name: f for f in parameter_fields(method)}
    values = {}
    for key, text in parameters.items():
        if key not in known:
            raise RetraceError(
                f"The method {name} has no parameter {key!r}.{did_you_mean(key, list(known))} "
                f"It has {', '.join(known) or 'none'}."
            )
        values[key] = _convert(text, hints[key], f"{name}: {key}")
    missing = [k for k, f in known.items() if f.default is MISSING and k not in values]
    if missing:
        raise RetraceError(f"The method {name} needs {', '.join(f'{k}=...' for k in missing)}.")
    try:
        made = method(**values)
    except RetraceError as error:
        raise RetraceError(f"{name}: {error}") from error
    except Exception as error:
        raise own_fault(f"{name}()", error) from error
    check_complete(made, name)
    return made


def made_inside(text: str) -> Method:
    """The method that another one names in a parameter, as
    `name:parameter=value+parameter=value`.

    Raises:
        RetraceError: there is none of the name, or a parameter is none.
    """
    name, _, parameters = text.partition(":")
    given = dict(part.partition("=")[::2] for part in parameters.split("+") if part)
    return make(method_class(name), name, given)


def check_complete(method: Method, name: str) -> None:
    """Refuse a method that lacks what its kind must have."""
    kind = type(method)
    _check_fields(kind, name)
    needed: list[tuple[type[Method], str]] = []
    needed += [(level, hook) for level, hook in LEVELS if isinstance(method, level)]
    if isinstance(method, EvictionMethod) and kind.build is EvictionMethod.build:
        needed.append((EvictionMethod, "importance"))
    if isinstance(method, BlockMethod) and type(method).choose is BlockMethod.choose:
        needed.append((BlockMethod, "block_scores"))
    if not needed and not isinstance(method, BlockMethod):
        raise RetraceError(
            f"{name} must be a ScoreMethod, a SearchMethod, an AttendMethod, a BlockMethod or a "
            "PolicyMethod, and not a Method alone."
        )
    keeps_new = isinstance(method, ScoreMethod) and method.keeps_new
    needed += [(Method, "extend")] if method.fitted and not keeps_new else []
    needed += [(Method, "calibrate")] if method.calibrated else []
    for level, hook in needed:
        if getattr(kind, hook) is getattr(level, hook):
            raise RetraceError(f"{name} must define {hook}(), as every {_words(level, hook)} does.")
    _check_cache(method, name)


def _check_cache(method: Method, name: str) -> None:
    """Refuse a cache whose newest tokens are in full, where a method cannot follow when they are
    rounded."""
    cache = method.cache
    if cache is None or cache.step is None:
        return
    full = f"{name}: cache={cache} holds the newest tokens in full"
    if isinstance(method, BlockMethod):
        raise RetraceError(
            f"{full}, other ones for each query of a block, and a block's queries share their keys."
        )
    if isinstance(method, AttendMethod) and not method.plain:
        if method.fitted:
            raise RetraceError(f"{full}, which a state that computes outputs does not follow.")
        if cache.values.slides:
            raise RetraceError(
                f"{full}, other values for each query, and the method computes the output of many "
                "at once: take another format for values, as in k:kivi:2+v:int4:token."
            )


def _words(level: type[Method], hook: str) -> str:
    if level is not Method:
        return level.__name__
    return "fitted method" if hook == "extend" else "calibrated method"


def _check_fields(kind: type[Method], name: str) -> None:
    """Refuse a class whose parameters are no fields: nobody could set them."""
    for written in kind.__mro__:
        if "__dataclass_fields__" in written.__dict__ or not issubclass(written, Method):
            continue
        own = [
            word
            for word, hint in inspect.get_annotations(written).items()
            if "ClassVar" not in str(hint)
        ]
        if own:
            raise RetraceError(
                f"{name}: {', '.join(own)} cannot be set, since {written.__name__} is no "
                "dataclass: write @dataclass(frozen=True, kw_only=True) above it."
            )


def default_of(field: Field[Any]) -> Any:
    """A parameter's value where none is given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def plain(value: Any) -> Any:
    """A parameter's value as text or number."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _convert(text: str, kind: Any, where: str) -> Any:
    """A parameter's text as the type of its field."""
    if text.lower() == "none" and kind not in (Keep, Budget, str):
        return None
    kinds = getattr(kind, "__args__", (kind,))
    for value in (Keep, Budget, Cache):
        if value in kinds:
            return value.parse(text)
    try:
        if bool in kinds:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if int in kinds:
            return _bounded(int(text), where)
        if float in kinds:
            return float(text)
    except OverflowError as error:
        raise RetraceError(str(error)) from None
    except (KeyError, ValueError):
        wanted = next(k.__name__ for k in (bool, int, float) if k in kinds)
        raise RetraceError(f"{where}={text!r}: expected {wanted}.") from None
    return text


def _bounded(number: int, where: str) -> int:
    if abs(number) >= MOST_NUMBER:
        raise OverflowError(f"{where}: expected a number below {MOST_NUMBER:,}.")
    return number
