"""Traces in a data set on the Hub: read and written by `HfFileSystem`, against a server here."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from huggingface_hub import HfFileSystem

from retrace.traces import (
    RetraceError,
    Trace,
    copy_trace,
    find_traces,
    open_trace,
    verify_trace,
)
from tests.traces.hub_server import Hub

OLD = Path(__file__).parents[1] / "data/format-1/float32.zarr"
PLACE = "hf://datasets/owner/traces/t.zarr"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty data set, and a user who may write to it."""
    hub = Hub("owner/traces", "secret")
    _use(monkeypatch, hub, "secret")
    yield hub
    hub.close()


def _use(monkeypatch: pytest.MonkeyPatch, hub: Hub, token: str | bool) -> None:
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": token})
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def there(hub: Hub) -> Trace:
    """A trace that was copied to the Hub."""
    return copy_trace(OLD, PLACE)


def test_written_and_read(there: Trace, tmp_path: Path) -> None:
    assert str(there.path) == PLACE and verify_trace(PLACE).whole
    back = copy_trace(PLACE, tmp_path / "back")
    for sequence in back.sequences:
        expected = open_trace(OLD).layer(1).value(sequence)
        np.testing.assert_array_equal(back.layer(1).value(sequence), expected)
    assert [str(place) for place in find_traces("hf://datasets/owner/traces")] == [PLACE]


def test_what_is_there_is_not_taken_from_a_listing(there: Trace, hub: Hub) -> None:
    with pytest.raises(RetraceError, match="exists"):
        copy_trace(OLD, PLACE)
    shorter = copy_trace(OLD, PLACE, sequences=[1], layers=[0], overwrite=True)
    assert shorter.sequences == (0,) and not any("layers/1/" in name for name in hub.files)


def test_damage_is_told(there: Trace, hub: Hub) -> None:
    name = next(name for name in hub.files if "layers/0/key/c/0" in name)
    hub.files[name] = hub.files[name][:-1]
    damage, *_ = verify_trace(PLACE).damages  # of all sequences in the shard
    assert "truncated" in damage.cause


def test_a_missing_repository(hub: Hub) -> None:
    other = "hf://datasets/owner/none/t.zarr"
    with pytest.raises(RetraceError, match=r"^There is no trace at \S+\. .*HF_TOKEN\.$"):
        open_trace(other)
    with pytest.raises(RetraceError, match=r"^\S+ cannot be reached \(.*HF_TOKEN") as told:
        copy_trace(OLD, other)
    assert "\n" not in str(told.value) and "AWS" not in str(told.value)


def test_a_missing_token(there: Trace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, hub, False)
    with pytest.raises(RetraceError, match=r"^There is no trace at \S+\. .*HF_TOKEN\.$"):
        open_trace(PLACE)
    with pytest.raises(RetraceError, match=r"^\S+ cannot be reached \(.*HF_TOKEN"):
        copy_trace(OLD, PLACE)
