"""What holds for all tests: how hypothesis draws, types that are checked, a bound on memory, no
waiting for the disk."""

import inspect
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

CHECKED = (
    "retrace.analyze.methods.base",
    "retrace.analyze.units.past",
    "retrace.analyze.units.selection",
    "retrace.analyze.units.unit",
)
"""Modules whose shapes and dtypes are checked at every call, in this process alone."""

# The same examples whenever and wherever they are drawn, however slow the machine is. Drawn
# anew they are other ones each time, and what fails can be told to be drawn again.
common = settings(
    deadline=None,
    # Fixtures are places to write to, which each example writes anew.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("same", common, derandomize=True)
settings.register_profile("anew", common, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("RETRACE_EXAMPLES", "same"))
FSYNC = os.fsync


def of_shapes_alone(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """What the hook decorates with, less what names no shape: properties of a number or a flag
    would take most of the time."""

    def decorator(*, typechecker: Any) -> Callable[[Any], Any]:
        check = jaxtyped(typechecker=typechecker)
        return lambda own: check(own) if "jaxtyping" in repr(inspect.get_annotations(own)) else own

    return decorator


jaxtyping.jaxtyped = of_shapes_alone(jaxtyping.jaxtyped)
# An int passes for a float, as it does for mypy.
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook(CHECKED, TYPECHECKER)


@pytest.fixture(autouse=True, scope="session")
def nothing_outlives_a_power_cut() -> None:
    """Files are not flushed to the disk: no test could tell, and traces are of a hundred files."""
    os.fsync = lambda file: None


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is flushed to the disk in this test, in turn, which it really is; names as they were."""
    paths = []

    def flush(file: int) -> None:
        FSYNC(file)
        paths.append(Path(f"/proc/self/fd/{file}").readlink())

    monkeypatch.setattr(os, "fsync", flush)
    return paths


@pytest.fixture
def bounded() -> Iterator[None]:
    """A few GB of memory more than there are now, so that more is an error of the test."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
