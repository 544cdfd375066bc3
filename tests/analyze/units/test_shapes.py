"""Shapes and dtypes that methods meet: types that are checked while tests run, and then alone."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from retrace.analyze.units.selection import Selection

IDS = torch.arange(6).reshape(1, 3, 2)
WRONG = {
    "sizes": (IDS, torch.ones(1, 1, 2, dtype=torch.int64)),
    "axes": (IDS[0], torch.ones(1, 1, 1, dtype=torch.int64)),
    "dtypes": (IDS.float(), torch.ones(1, 1, 1, dtype=torch.int64)),
}


@pytest.mark.parametrize("ids, attended", WRONG.values(), ids=WRONG)
def test_wrong_ones_are_refused(ids: torch.Tensor, attended: torch.Tensor) -> None:
    with pytest.raises(TypeCheckError, match=r"parameters of .*\.Selection\.__init__"):
        Selection((2,), ids, attended)


def test_users_wait_for_no_checks() -> None:
    script = (
        "import sys, torch\n"
        "from retrace.analyze.units.selection import Selection\n"
        "Selection((2,), torch.ones(2), torch.ones(3))\n"
        "assert 'beartype' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_rows_are_those_of_each_tensor() -> None:
    whole = Selection(
        (2, 4),
        IDS,
        torch.arange(6).reshape(2, 1, 3),
        first_given=torch.arange(3)[None],
        extra_keys=torch.tensor([5]),  # the same for all
        aux_bytes=torch.arange(3.0),
    )
    one = whole.rows(slice(1, 2))
    assert one.ids.tolist() == [[[2, 3]]]
    assert one.attended.tolist() == [[[1]], [[4]]]
    assert one.first_given is not None and one.first_given.tolist() == [[1]]
    assert one.extra_keys is whole.extra_keys
    assert torch.as_tensor(one.aux_bytes).tolist() == [1.0]
