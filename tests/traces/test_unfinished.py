"""Only what is completely written can be seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrace.traces import RetraceError, create_trace, open_trace, resume_trace

MakePlan = Callable[..., Any]


def test_unfinished_sequences_are_left_out(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments)
    assert open_trace(writer.path).sequences == ()
    writer.write_layer(1, 0, *plan.tensors[0, 1])
    writer.write_layer(1, 3, *plan.tensors[3, 1])
    assert open_trace(writer.path).sequences == ()
    plan.fill(writer, [2])
    trace = open_trace(writer.path)
    assert (trace.sequences, trace.planned) == ((2,), 3)
    assert "sequences=1/3" in repr(trace)


def test_bytes_are_of_finished_sequences(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan("float16")
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments)
    assert open_trace(writer.path).nbytes() == 0
    plan.fill(writer, [1, 2])
    wanted = sum(t.nbytes for (_, s), tensors in plan.tensors.items() for t in tensors if s)
    assert open_trace(writer.path).nbytes() == wanted


def test_resuming_goes_on(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    plan.fill(create_trace(tmp_path / "t.zarr", **plan.arguments), [0])
    writer = resume_trace(tmp_path / "t.zarr", **plan.arguments)
    plan.fill(writer, [1, 2])
    assert open_trace(writer.path).sequences == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "tokens"),
        ({"dtype": "float16"}, "dtype"),
        ({"lengths": (9, 1)}, "tokens"),
        ({"queries": [[8], [0], [13]]}, "queries"),
    ],
    ids=str,
)
def test_another_plan_is_refused(
    make_plan: MakePlan, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    create_trace(tmp_path / "t.zarr", **make_plan().arguments)
    with pytest.raises(RetraceError, match=rf"other .*{named}.*--overwrite"):
        resume_trace(tmp_path / "t.zarr", **make_plan(**changes).arguments)


def test_other_layers_are_refused(make_plan: MakePlan, rules: Any, tmp_path: Path) -> None:
    create_trace(tmp_path / "t.zarr", **make_plan().arguments)
    for other in ({0: rules()}, {0: rules(), 3: rules(module="model.layers.3", window=6)}):
        arguments = {**make_plan().arguments, "rules": other}
        with pytest.raises(RetraceError, match="other layers"):
            resume_trace(tmp_path / "t.zarr", **arguments)


def test_other_attributes_are_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    create_trace(tmp_path / "t.zarr", **make_plan().arguments)
    arguments = {**make_plan().arguments, "attributes": {"model": "another"}}
    with pytest.raises(RetraceError, match="other model"):
        resume_trace(tmp_path / "t.zarr", **arguments)


def test_a_trace_is_never_replaced(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    plan.fill(create_trace(tmp_path / "t.zarr", **plan.arguments), [0])
    with pytest.raises(RetraceError, match="exists already"):
        create_trace(tmp_path / "t.zarr", **plan.arguments)
    assert open_trace(tmp_path / "t.zarr").sequences == (0,)


def test_a_failed_creation_leaves_nothing(make_plan: MakePlan, tmp_path: Path) -> None:
    arguments = {**make_plan().arguments, "attributes": {"model": object()}}
    with pytest.raises(TypeError):
        create_trace(tmp_path / "t.zarr", **arguments)
    assert list(tmp_path.iterdir()) == []
