"""Whatever a settings file says, a plan is made of it, or it is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.analyze.replay import forecast
from retrace.cli.commands.sweep import command
from retrace.cli.main import main

TryFile = Callable[[str | bytes], bool]
NUMBERS = st.sampled_from([-1, 0, 1, 2, 5, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308])
WORDS = st.sampled_from(
    [
        *"""none exact quest quest:page=2 quest:page={2,4} nothing.py:It { } {} {2,4} = : , 0-5 5-0
        2/3 0/0 prefix:20 prefix:.5 all:16 ../../x /dev/null/x cuda meta cpu:9 s3:// sink:9
        top-p:2""".split(),
        *("", " ", "a\nb", "\u0661", "\u212a", "a" * 300, "9" * 4000, f"prefix:{'9' * 400}"),
    ]
)
SCALARS = st.one_of(
    NUMBERS, WORDS, st.none(), st.booleans(), st.dates(), st.floats(), st.text(max_size=8)
)
PARAMETERS = st.sampled_from(["page", "pool", "keep", "budget", "least_pages", "rank", "seed"])
GRIDS = st.dictionaries(
    st.one_of(PARAMETERS, SCALARS), st.one_of(SCALARS, st.lists(SCALARS, max_size=4)), max_size=3
)
KINDS = st.sampled_from(["exact", "quest", "window", "sparq", "loki", "ivf", "snapkv"])
METHODS = st.one_of(KINDS, SCALARS, st.dictionaries(st.one_of(KINDS, SCALARS), GRIDS, max_size=2))
NAMES = st.sampled_from([str(option.name) for option in command.params] + ["top-k", "calibration"])
FILES = st.dictionaries(
    st.one_of(NAMES, SCALARS),
    st.one_of(SCALARS, METHODS, st.lists(METHODS, max_size=4)),
    max_size=4,
)
WHOLE = """# a sweep
topk: [2, 5-7]
min-context: 20
method:
  - exact
  - quest: {page: [2, 4], pool: [none, sum]}
  - "sparq:rank={2,4}"
"""
PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            *"""& * ! !!set << : ? - { } [ ] | > --- ... %YAML # ' " ~ = 0x_ 0b_ 1_0 1:2:3 .inf .nan
            2001-99-99""".split(),
            *("\n", "  ", "\t", "\\x00", "\ufeff"),
        ]
    ),
)


@pytest.fixture
def plan(trace: Path, monkeypatch: pytest.MonkeyPatch, bounded: None) -> TryFile:
    """Whether the plan of a settings file is made; it is refused in one line otherwise."""
    none = forecast._Rates(0, 0, 0, 0)
    monkeypatch.setattr(forecast, "_measure", lambda *_: none)  # which takes seconds

    def plan(text: str | bytes) -> bool:
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        result = CliRunner().invoke(main, ["sweep", str(trace), "run.yaml", "--dry-run"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code == 2:
            [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
            assert result.stderr.endswith(f"{line}\n")
        else:
            assert result.exit_code == 0
        return result.exit_code == 0

    return plan


@given(held=FILES)
def test_any_settings(plan: TryFile, held: dict[object, object]) -> None:
    plan(yaml.safe_dump(held, allow_unicode=True))


@settings(max_examples=60)
@given(methods=st.lists(METHODS, min_size=1, max_size=3))
def test_any_methods(plan: TryFile, methods: list[object]) -> None:
    plan(yaml.safe_dump({"method": methods, "topk": [2, 5]}))


@given(data=st.data())
def test_files_that_were_changed(plan: TryFile, data: st.DataObject) -> None:
    text = WHOLE
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + data.draw(PIECES) + text[stop:]
    plan(text)


@settings(max_examples=50)
@given(raw=st.binary(max_size=60))
def test_files_that_are_none(plan: TryFile, raw: bytes) -> None:
    plan(raw)


def test_a_whole_file_is_planned(plan: TryFile) -> None:
    assert plan(WHOLE)
