"""Traces in an object store, against a real S3 server on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.capture import Progress, capture
from retrace.traces import (
    RemoteLocation,
    RetraceError,
    UnreachableError,
    find_traces,
    open_trace,
    verify_trace,
)

pytest.importorskip("s3fs", reason="s3fs, of the extra `remote`, is not installed")
server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
# Libraries of the server and of the client, whose warnings are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of an empty bucket of a server on localhost."""
    import s3fs

    server = server_module.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("traces")
    yield "s3://traces"
    server.stop()
    patch.undo()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def bundle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many sequences of 40 positions share a shard; one where a test does not say."""
    bundle = int(getattr(request, "param", 1))
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40 * bundle)
    return bundle


class Stop(Exception):
    """Ends a capture from within."""


def stop(progress: Progress) -> None:
    """Ends a capture once two sequences are finished."""
    if progress.sequences >= 2:
        raise Stop


@pytest.mark.parametrize("bundle", [2], indirect=True)
def test_captured_interrupted_resumed_and_read(
    bucket: str, bundle: int, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    model = str(model_folder("mistral"))
    options: dict[str, Any] = {"text": [text_file], "limit": 4, "max_length": 40}
    url = f"{bucket}/read-{bundle}/t.zarr"
    with pytest.raises(Stop):
        capture(model, out=url, progress=stop, **options)
    assert len(open_trace(url).sequences) == 2
    with pytest.raises(RetraceError, match="--resume"):
        capture(model, out=url, **options)
    remote = capture(model, out=url, resume=True, **options)
    local = capture(model, out=tmp_path / "t.zarr", **options)
    assert remote.sequences == local.sequences == (0, 1, 2, 3)
    assert remote.bundle == local.bundle == bundle
    for sequence in local.sequences:
        for name in ("query", "key", "value"):
            ours, theirs = (getattr(t.layer(1), name)(sequence) for t in (local, remote))
            np.testing.assert_array_equal(ours, theirs)
    assert find_traces(f"{bucket}/read-{bundle}") == [RemoteLocation(url)]
    assert capture(model, out=url, overwrite=True, **{**options, "limit": 1}).planned == 1


def test_what_was_killed_while_it_was_created(
    bucket: str, model_folder: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise ConnectionError

    url = f"{bucket}/half.zarr"
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "max_length": 40, "out": url}
    model = str(model_folder("mistral"))
    with monkeypatch.context() as patch, pytest.raises(RetraceError, match="cannot be reached"):
        patch.setattr("retrace.traces.writer._create_layer", killed)
        capture(model, **options)
    with pytest.raises(RetraceError, match="was being created"):
        open_trace(url)
    assert capture(model, **options).sequences == (0,)


@pytest.mark.parametrize("bundle", [1], indirect=True)
def test_a_store_that_fails_in_the_middle(
    bucket: str, bundle: int, model_folder: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import retrace.traces.storage.shards as shards

    put, url = shards._put, f"{bucket}/failing-{bundle}.zarr"
    options: dict[str, Any] = {"text": [text_file], "limit": 3, "max_length": 40, "out": url}
    model = str(model_folder("mistral"))

    def failing(array: Any, key: str, pieces: Any) -> None:
        if key.startswith(f"c/{2 // bundle}/") and array.path.startswith("layers"):
            raise TimeoutError("Read timeout on endpoint URL")
        put(array, key, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_put", failing)
        with pytest.raises(RetraceError, match=r"cannot be reached \(Read timeout"):
            capture(model, **options)
    found = verify_trace(url)
    assert found.whole and set(found.finished) <= {0, 1}
    assert capture(model, **options, resume=True).sequences == (0, 1, 2)
    assert verify_trace(url).whole


def test_a_store_that_fails_at_the_very_end(
    bucket: str, model_folder: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(store: Any) -> None:
        raise PermissionError("Access Denied")

    url, model = f"{bucket}/closing.zarr", str(model_folder("mistral"))
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "max_length": 40, "out": url}
    with monkeypatch.context() as patch, pytest.raises(UnreachableError, match=r"--resume"):
        patch.setattr("zarr.consolidate_metadata", denied)
        capture(model, **options)
    assert capture(model, **options, resume=True).sequences == (0,)


def test_damage_is_named(bucket: str, model_folder: Any, text_file: Path) -> None:
    import s3fs

    url, files = f"{bucket}/damaged.zarr", s3fs.S3FileSystem()
    model = str(model_folder("mistral"))
    capture(model, text=[text_file], limit=2, max_length=40, out=url)
    data = bytearray(files.cat_file(f"{url}/layers/1/key/c/0/0/0/0"))
    data[9] ^= 1
    files.pipe_file(f"{url}/layers/1/key/c/0/0/0/0", bytes(data))
    files.rm_file(f"{url}/layers/0/value/c/1/0/0/0")
    files.pipe_file(f"{url}/nll/c/1/0", b"abc")
    damages = verify_trace(url).damages
    assert [(d.layer, d.tensor, d.sequence, d.cause.split(":")[0]) for d in damages] == [
        (None, "nll", 1, "truncated"),
        (0, "value", 1, "missing"),
        (1, "key", 0, "checksum does not match"),
    ]


def test_what_is_no_trace(bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem().pipe_file(
        f"{bucket}/other.zarr/zarr.json",
        b'{"zarr_format": 3, "node_type": "group", "attributes": {}}',
    )
    with pytest.raises(RetraceError, match="retrace_format"):
        open_trace(f"{bucket}/other.zarr")
    with pytest.raises(RetraceError, match="no trace at"):
        open_trace(f"{bucket}/none.zarr")


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(RetraceError, match=r"no trace at|cannot be reached"):
        open_trace("s3://nowhere/t.zarr")
