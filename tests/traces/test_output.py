"""The place of a trace: what stands in the way is refused, and no link is followed."""

from pathlib import Path

import pytest

from retrace.traces import RetraceError
from retrace.traces.output import Output


@pytest.mark.parametrize("name", [".t.zarr.replacement", ".t.zarr.replaced"])
def test_a_link_aside_is_no_trace(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "other", target_is_directory=True)
    with pytest.raises(RetraceError, match="is a link"):
        Output(tmp_path / "t.zarr", overwrite=False, resume=True)
    assert (tmp_path / "other").is_dir()
    assert not (tmp_path / "t.zarr").exists()
