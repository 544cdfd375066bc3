"""How queries are cut into blocks changes nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze.methods.registry import method_names, parse_spec
from retrace.analyze.reference import ReferenceStore
from retrace.analyze.replay import Clock, Plan, Replayed, Tally, replay
from retrace.analyze.states import Protocol
from retrace.traces import RetraceError, Trace


def tallies(trace: Trace, protocol: str, block_elements: int | None) -> dict[str, Tally]:
    """Every installed method over the first layer and sequence."""
    methods = []
    for name in method_names():
        try:
            spec = parse_spec(name)
            spec.method.build(torch.zeros(16, 8), torch.zeros(16, 8), None)  # type: ignore[arg-type]
        except (RetraceError, AttributeError):
            if name == "hnsw":
                continue  # without faiss
        methods.append(Replayed(parse_spec(name), (2, 7)))
    plan = Plan(tuple(methods), Protocol.parse(protocol), 0, block_elements)
    found = replay(trace, 0, 0, plan, torch.device("cpu"), ReferenceStore(None), Clock())
    return {str(m.spec): t for m, t in zip(methods, found, strict=True)}


@pytest.mark.parametrize("block_elements", [1, 700])
@pytest.mark.parametrize(
    ("changes", "protocol"),
    [({"heads": 4}, "all:20"), ({"window": 9}, "prefix:20"), ({"chunk": 16}, "all")],
    ids=str,
)
def test_block_size(
    make_trace: Callable[..., Trace],
    rules: Any,
    block_elements: int,
    changes: dict[str, Any],
    protocol: str,
) -> None:
    trace = make_trace(rules(**changes), [50])
    whole = tallies(trace, protocol, None)
    for method, parts in tallies(trace, protocol, block_elements).items():
        for ours, theirs in (
            (parts.at_all, whole[method].at_all),
            (parts.at_points, whole[method].at_points),
        ):
            assert ours.keys() == theirs.keys()
            for metric in ours:
                if (method, metric) == ("hnsw", "bytes_ratio"):
                    continue  # faiss counts comparisons of a whole block
                np.testing.assert_array_equal(ours[metric].count, theirs[metric].count)
                for moment in ("mean", "squares"):
                    np.testing.assert_allclose(
                        getattr(ours[metric], moment),
                        getattr(theirs[metric], moment),
                        atol=2e-5,
                        err_msg=f"{method} {metric} {moment}",
                    )
