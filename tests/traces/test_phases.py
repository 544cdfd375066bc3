"""What each position is: read, scored or generated."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from retrace.traces import PHASES, RetraceError, create_trace, open_trace, resume_trace

LENGTHS = (9, 1, 14)


@pytest.fixture
def phases() -> list[Any]:
    """Of each sequence, a last position that was generated."""
    made = [np.zeros(length, np.int8) for length in LENGTHS]
    for phase in made:
        phase[-1] = PHASES["generated"]
    return made


def test_round_trip(tmp_path: Path, make_plan: Callable[..., Any], phases: list[Any]) -> None:
    plan = make_plan(lengths=LENGTHS)
    writer = create_trace(tmp_path / "t", **plan.arguments, phases=phases)
    plan.fill(writer, range(3))
    trace = open_trace(tmp_path / "t")
    for sequence, phase in enumerate(phases):
        assert trace.phase(sequence).dtype == np.int8
        np.testing.assert_array_equal(trace.phase(sequence), phase)
    array = zarr.open_array(tmp_path / "t" / "phase")
    assert array.attrs["codes"] == PHASES
    assert array.chunks == (1, 14)
    assert array[1].tolist() == [PHASES["generated"]] + [-1] * 13


def test_another_plan_is_not_resumed(
    tmp_path: Path, make_plan: Callable[..., Any], phases: list[Any]
) -> None:
    plan = make_plan(lengths=LENGTHS)
    create_trace(tmp_path / "t", **plan.arguments, phases=phases)
    resume_trace(tmp_path / "t", **plan.arguments, phases=phases)
    with pytest.raises(RetraceError, match="with other phases"):
        resume_trace(tmp_path / "t", **plan.arguments)


def test_a_trace_from_before_there_were_phases(
    write_trace: Callable[..., Path], make_plan: Callable[..., Any]
) -> None:
    path = write_trace(lengths=LENGTHS)
    digest = open_trace(path).digest(0)
    shutil.rmtree(path / "phase")
    trace = open_trace(path)
    assert trace.phase(2).tolist() == [PHASES["context"]] * 14
    assert trace.digest(0) == digest
    resume_trace(path, **make_plan(lengths=LENGTHS).arguments)
