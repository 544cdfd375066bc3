"""From a method spec to a method: `quest`, `quest:page=32,pool=sum`, `./mine.py:Mine:a=1`."""

import hashlib
import importlib.util
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from retrace.analyze.methods.base import Method
from retrace.analyze.methods.function import AttentionFunction, Function
from retrace.analyze.methods.hooks import naming, own_lines
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.options.cache import Cache
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.planned import Planned
from retrace.analyze.methods.registry import (
    check_complete,
    default_of,
    installed,
    make,
    method_class,
    method_names,
    parameter_fields,
    plain,
)
from retrace.analyze.plans.plan import FULL, PLAN, Plan
from retrace.analyze.storage.provenance import LOOSE, Code, code_of_method
from retrace.traces import RetraceError
from retrace.traces.errors import did_you_mean

ALL = "all"
"""In place of a spec: every installed method."""
MOST_SPECS = 1000
"""Of one run: more are a slip of the finger, or a file that was made to fill the memory."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_LOOSE = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)(?::(?P<parameters>.*))?")


Methods = str | Method | Plan | type[Method] | AttentionFunction | Sequence[Any] | Mapping[str, Any]
"""One method or plan, or several, or methods by the labels that they go by in results."""


class MethodSpec:
    """A method by the name it is known by, with its parameters.

    It is pickled as text: another process loads the method, and its file, anew. A method that was
    given as an object is pickled as one.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        file: Path | None = None,
        label: str | None = None,
        text: str | None = None,
    ) -> None:
        self.name = name
        self.method = method
        self.file = file
        """The loose file that the method comes from."""
        self.label = label
        """What it goes by in results in place of its spec."""
        self.text = text
        """The spec that it was named by; None if it was given as an object."""

    @cached_property
    def code(self) -> Code:
        """The code that the method is, when it was first looked at; and what its name does not
        tell."""
        code = code_of_method(self.method)
        if self.label is None and self.text is not None:
            return code
        told = json.dumps([self.name, self.parameters], sort_keys=True).encode()
        sources = {**code.sources, "": hashlib.sha256(told).hexdigest()}
        return replace(code, sources=sources, known=code.known and self._is_told())

    def _is_told(self) -> bool:
        """Whether its file and its parameters say all that it is."""
        own = getattr(self.method, "function", type(self.method))
        values = (getattr(self.method, f.name) for f in parameter_fields(type(self.method)))
        return "<" not in getattr(own, "__qualname__", "<") and all(
            isinstance(value, Keep | Budget | Cache | int | float | str | None) for value in values
        )

    @property
    def each(self) -> tuple["MethodSpec", ...]:
        """The methods that answer queries: itself, or those of a plan's kv heads."""
        return (self,)

    def layers_of(self, spec: "MethodSpec", layers: Sequence[int]) -> tuple[int, ...]:
        """The layers, of these, in which one of `each` answers queries."""
        return tuple(layers)

    def budgets(self, topk: Sequence[int], context: int) -> tuple[int, ...]:
        """Those at which it stands in results, where these are asked for: all of them."""
        return tuple(topk)

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter with its value, as text or number."""
        return {
            f.name: plain(getattr(self.method, f.name)) for f in parameter_fields(type(self.method))
        }

    def __str__(self) -> str:
        """Its label, or the shortest spec that gives this method: parameters at their default are
        left out."""
        if self.label is not None:
            return self.label
        changed = [
            f"{f.name}={self.parameters[f.name]}"
            for f in parameter_fields(type(self.method))
            if self.parameters[f.name] != plain(default_of(f))
        ]
        return ":".join([self.name, *([",".join(changed)] if changed else [])])

    def labelled(self, label: str | None) -> "MethodSpec":
        """The same by another name."""
        return MethodSpec(self.name, self.method, self.file, label, self.place)

    @property
    def place(self) -> str:
        """The spec that gives this method wherever it is read: with the loose file's whole path."""
        if self.label is not None and self.text is not None:
            return self.text
        return str(self) if self.file is None else f"{self.file.parent}/{self}"

    def anew(self) -> Method:
        """The method as it is before anything was asked of it: of a loose file, by loading it
        again."""
        return replace(self.method) if self.file is None else parse_spec(self.place).method

    def check_alike(self) -> None:
        """Refuse a plan where each budget has queries of its own."""

    def check_named(self) -> None:
        """Refuse a method that no spec names, and that so cannot be found again.

        Raises:
            RetraceError: it was given as an object, or by a label.
        """
        if self.text is None or self.label is not None:
            raise RetraceError(
                f"{self}: parts are merged by the specs of their methods. Put it in a file, and "
                "name that without a label, as in ./mine.py:Mine."
            )

    def check_portable(self) -> None:
        """Refuse a method that other processes cannot load.

        Raises:
            RetraceError: it was given as an object whose class they cannot import.
        """
        if self.text is not None:
            return
        own = getattr(self.method, "function", type(self.method))
        module, name = getattr(own, "__module__", "__main__"), getattr(own, "__qualname__", "")
        if module == "__main__" or "<" in name or module not in sys.modules:
            raise RetraceError(
                f"{self} is defined in {'a function' if '<' in name else module}, where other "
                "processes cannot import it from: put it in a file and name that, as in "
                f"./mine.py:{own.__name__}, or run it in this one with workers=1."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.text is None:
            return MethodSpec, (self.name, self.method, None, self.label)
        return same_spec, (self.place, self.code.sources_digest, self.label)


class PlanSpec(MethodSpec):
    """A plan by the name it stands for in results: `plan:` and its digest.

    Its one budget there is the largest that a kv head has.
    """

    def __init__(self, plan: Plan, text: str | None = None, label: str | None = None) -> None:
        self.plan = plan
        names = dict.fromkeys(setting.method for setting in plan.settings.values())
        for name in names:
            if is_loose(name) or name.startswith(PLAN):
                raise RetraceError(
                    f"names {name}, and plans run installed methods only: register it as an entry "
                    "point of the group retrace.methods."
                )
        self._own = {name: parse_spec(name) for name in names}
        methods = {name: spec.method for name, spec in self._own.items()}
        label = label or f"{PLAN}{plan.digest}"
        super().__init__("plan", Planned(plan=plan, methods=methods), label=label, text=text)

    @property
    def each(self) -> tuple[MethodSpec, ...]:
        """The methods of its kv heads."""
        return tuple(self._own.values())

    def of_head(self, layer: int, kv_head: int, context: int) -> tuple[MethodSpec, int]:
        """The method and budget of a kv head; full attention has the largest budget of all."""
        setting = self.plan.of(layer, kv_head)
        k = self.largest(context) if setting.full else setting.budget(context)
        return self._own[setting.method], k

    def budgets_of(self, spec: MethodSpec, context: int) -> tuple[int, ...]:
        """The budgets, ascending, that one of its methods has in some kv head."""
        settings = self.plan.settings.items()
        found = [self.of_head(*at, context) for at, _ in settings]
        return tuple(sorted({k for own, k in found if own is spec}))

    def layers_of(self, spec: MethodSpec, layers: Sequence[int]) -> tuple[int, ...]:
        """The layers, of these, in which one of its methods has a kv head."""
        settings = self.plan.settings.items()
        own = {at[0] for at, setting in settings if self._own[setting.method] is spec}
        return tuple(i for i in layers if i in own)

    def largest(self, context: int) -> int:
        """The largest budget of a kv head."""
        settings = self.plan.settings.values()
        return max([1, *(setting.budget(context) for setting in settings)])

    def budgets(self, topk: Sequence[int], context: int) -> tuple[int, ...]:
        """The largest of its own, whatever is asked for."""
        return (self.largest(context),)

    @property
    def parameters(self) -> dict[str, Any]:
        """What it holds, in short."""
        settings = self.plan.settings.values()
        return {"kv_heads": len(settings), "full": sum(s.method == FULL for s in settings)}

    @cached_property
    def code(self) -> Code:
        """That of its methods, and what the plan says."""
        codes = [spec.code for spec in self.each]
        sources = {name: digest for code in codes for name, digest in code.sources.items()}
        packages = {name: number for code in codes for name, number in code.packages.items()}
        known = all(code.known for code in codes)
        return Code({**sources, "": self.plan.digest}, packages, known)

    def labelled(self, label: str | None) -> "PlanSpec":
        """The same by another name."""
        return PlanSpec(self.plan, self.text, label)

    def check_alike(self) -> None:
        """Refuse it.

        Raises:
            RetraceError: always.
        """
        raise RetraceError(
            f"{self} has a budget for each kv head, and min_context each counts other queries for "
            "each budget: name a position."
        )

    def check_named(self) -> None:
        """Refuse a plan that is in no file.

        Raises:
            RetraceError: it was given as an object.
        """
        if self.text is None:
            raise RetraceError(f"{self}: parts are merged by the files of their plans: save it.")

    def check_portable(self) -> None:
        """It may be handed to any process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanSpec, (self.plan, self.text, self.label)


def parse_spec(text: str) -> MethodSpec:
    """The method that a spec names, or the plan that `plan:FILE` does.

    Raises:
        RetraceError: no such method or parameter (with the nearest name), or a bad value.
    """
    if text.startswith(PLAN):
        file = Path(text.removeprefix(PLAN)).absolute()
        plan = Plan.load(file)
        with naming(file):
            return PlanSpec(plan, f"{PLAN}{file}")
    if loose := _LOOSE.fullmatch(text):
        return _loose_method(Path(loose["path"]), loose["name"], loose["parameters"] or "")
    name, _, parameters = text.partition(":")
    method = make(method_class(name), name, _read_parameters(parameters, name))
    return MethodSpec(name, method, text=text)


def given_spec(given: Any, label: str | None = None) -> MethodSpec:
    """The method that was given: as a `MethodSpec`, an object, a class or an attention function.

    Raises:
        RetraceError: it is none of these, or lacks what a method of its kind must have.
    """
    if isinstance(given, MethodSpec):
        return given
    if isinstance(given, Plan):
        return PlanSpec(given, label=label)
    if isinstance(given, type) and issubclass(given, Method):
        given = make(given, given.__name__, {})
    elif callable(given) and not isinstance(given, Method | type):
        given = Function(function=given)
    if not isinstance(given, Method):
        raise RetraceError(
            f"{given!r:.200} is no method: expected a spec such as 'quest:page=32', an object or "
            "class of ScoreMethod, SearchMethod, AttendMethod or BlockMethod, or an attention "
            "function."
        )
    kind = type(given)
    name = kind.__name__
    if isinstance(given, Function):
        name = getattr(given.function, "__name__", type(given.function).__name__)
    check_complete(given, name)
    for known, point in installed().items():
        if point.value == f"{kind.__module__}:{kind.__qualname__}":
            text = str(MethodSpec(known, given))
            if (spec := parse_spec(text)).method == given:
                return spec.labelled(label)
    return MethodSpec(name, given, label=label)


def is_loose(text: str) -> bool:
    """Whether a spec names a method of a loose file."""
    return _LOOSE.fullmatch(text) is not None


def recorded_spec(text: str, named: Sequence[str]) -> MethodSpec:
    """The method that a trace or the parts of a run name.

    Those are data that anybody may have written: a loose file that they name is run only if the
    user named it too.

    Args:
        text: the spec.
        named: specs of loose files, as the user gave them; their parameters do not matter.

    Raises:
        RetraceError: what `parse_spec` raises, or a file that the user did not name.
    """
    recorded = _LOOSE.fullmatch(text)
    if recorded is None:
        return parse_spec(text)
    file, name = Path(recorded["path"]).name, recorded["name"]
    for loose in filter(None, map(_LOOSE.fullmatch, named)):
        path = Path(loose["path"])
        if (path.name, loose["name"]) == (file, name):
            return _loose_method(path, name, recorded["parameters"] or "")
    raise RetraceError(
        f"The method {file}:{name} is code of a file, which is run only where you name it: add "
        f"--method PATH/{file}:{name}."
    )


@cache
def same_spec(text: str, sources_digest: str, label: str | None = None) -> MethodSpec:
    """The method that a spec named before, in another process.

    Raises:
        RetraceError: a file of its code is gone or is another here.
    """
    spec = parse_spec(text)
    spec = spec if label is None else spec.labelled(label)
    if spec.code.sources_digest != sources_digest:
        raise RetraceError(
            f"The code of {spec}, or what it imports, was edited since the run began, or is "
            "another on this worker: run it again."
        )
    return spec


def listed(methods: Methods) -> list[Any]:
    """Methods one by one: as they were given, or a `MethodSpec` for what has a label.

    Raises:
        RetraceError: a label that cannot stand in a table, or whose spec is several methods.
    """
    if isinstance(methods, Mapping):
        return [_labelled(label, given) for label, given in methods.items()]
    if isinstance(methods, str | Method | Plan | type) or not isinstance(methods, Iterable):
        return [methods]
    return list(methods)


def _labelled(label: Any, given: Any) -> MethodSpec:
    if not isinstance(label, str) or not label.strip() or not label.isprintable():
        raise RetraceError(f"The label {label!r:.200}: expected a name that can be printed.")
    if not isinstance(given, str):
        spec = given_spec(given, label)
        return spec if spec.label == label else spec.labelled(label)
    if given == ALL or _BRACES.search(given):
        raise RetraceError(f"The label {label!r} is for one method, and {given!r} is several.")
    return parse_spec(given).labelled(label)


def parse_specs(methods: Methods) -> tuple[list[MethodSpec], frozenset[str]]:
    """The methods that are named or given, each once, and which of them `all` stands for alone.

    `quest:page={8,16}` stands for one method with each value, several braces for each combination.
    `all` is every installed method with its defaults, less those whose library is missing.

    Raises:
        RetraceError: no method at all, more than `MOST_SPECS`, or two different ones of one name.
    """
    asked = listed(methods)
    grids = {i: _grid(one) for i, one in enumerate(asked) if isinstance(one, str) and one != ALL}
    count = sum(math.prod(map(len, values)) for _, values in grids.values())
    if count > MOST_SPECS:
        raise RetraceError(
            f"The methods have {count:,} combinations of values; a run takes {MOST_SPECS:,}."
        )
    named: list[MethodSpec] = []
    for i, one in enumerate(asked):
        if i in grids:
            named += [parse_spec(text) for text in _filled(*grids[i])]
        elif not isinstance(one, str):
            named.append(given_spec(one))
    every = _every_method() if ALL in [one for one in asked if isinstance(one, str)] else []
    if not named and not every:
        raise RetraceError("No method is named; `retrace methods` lists them.")
    unique: dict[str, MethodSpec] = {}
    for spec in [*named, *every]:
        first = unique.setdefault(str(spec), spec)
        if first is not spec and _are_different(first, spec):
            raise RetraceError(f"Two different methods are {spec}: rename one, or give it a label.")
    return list(unique.values()), frozenset(map(str, every)) - frozenset(map(str, named))


def _are_different(ours: MethodSpec, other: MethodSpec) -> bool:
    """Whether two methods of one name are not the same."""
    if ours.text is not None and other.text is not None:
        return ours.code != other.code
    kinds = [getattr(spec.method, "function", type(spec.method)) for spec in (ours, other)]
    return kinds[0] is not kinds[1] or ours.code != other.code


def _grid(text: str) -> tuple[list[str], list[list[str]]]:
    """A spec's text between braces, and the values in each."""
    split = _BRACES.split(text)
    between = split[::2]
    if any(mark in part for part in between for mark in "{}"):
        raise RetraceError(f"{text!r}: expected values in braces such as quest:page={{8,16,32}}.")
    return between, [[value.strip() for value in listed.split(",")] for listed in split[1::2]]


def _filled(between: list[str], values: list[list[str]]) -> list[str]:
    """A spec for each combination of the values."""
    return [
        between[0] + "".join(map("".join, zip(chosen, between[1:], strict=True)))
        for chosen in itertools.product(*values)
    ]


def _every_method() -> list[MethodSpec]:
    kinds = {name: method_class(name) for name in method_names()}
    return [
        parse_spec(name)
        for name, kind in kinds.items()
        if kind.is_installed() and all(f.default is not MISSING for f in parameter_fields(kind))
    ]


def _read_parameters(text: str, name: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise RetraceError(f"{name}: {part!r} in its spec is not of the form key=value.")
        if key.strip() in parameters:
            raise RetraceError(f"{name}: {key.strip()} stands twice in its spec.")
        parameters[key.strip()] = value.strip()
    return parameters


def _loose_method(path: Path, name: str, parameters: str) -> MethodSpec:
    """A class or function from a file that the user named: the only code run from outside."""
    if not path.is_file():
        raise RetraceError(f"There is no file {path} to load the method {name} from.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    place = importlib.util.spec_from_file_location(f"{LOOSE}{digest[:16]}", path)
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules[place.name] = module  # where dataclasses look up annotations that are text
    try:
        place.loader.exec_module(module)
    except Exception as error:
        told = RetraceError(f"{path} could not be loaded: {error!r}.")
        told.add_note(own_lines(error))
        raise told from error
    found = getattr(module, name, None)
    label = f"{path.name}:{name}"
    if isinstance(found, type) and issubclass(found, Method):
        method = make(found, label, _read_parameters(parameters, label))
    elif callable(found) and not isinstance(found, type):
        given = _read_parameters(parameters, label)
        if given.keys() - {"cache"}:
            raise RetraceError(
                f"{label} is a function: it takes no parameters in a spec but cache."
            )
        cache = Cache.parse(given["cache"]) if given else None
        method = Function(function=found, cache=cache)
        check_complete(method, label)
    else:
        if isinstance(found, type):
            raise RetraceError(
                f"{label} is a class, but no method: derive it from ScoreMethod, SearchMethod, "
                "AttendMethod or BlockMethod."
            )
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RetraceError(f"{path} has no method or function {name!r}.{did_you_mean(name, names)}")
    spec = MethodSpec(label, method, path.absolute())
    spec.text = spec.place
    _ = spec.code  # as it is now that it is run
    return spec
