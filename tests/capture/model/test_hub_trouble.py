"""A Hub that fails is told in a line with the cause, in bounded time."""

import gc
import http.server
import io
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from huggingface_hub import HfApi, constants

from retrace.capture import CaptureSettings, capture
from retrace.capture.model.loading import open_checkpoint
from retrace.capture.reading.tasks import read_sequences
from retrace.capture.reading.windows import WindowCutter
from retrace.traces import RetraceError

COMMIT = "0" * 40
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def send(
    to: http.server.BaseHTTPRequestHandler, status: int, content: bytes = b"", **headers: str
) -> None:
    to.send_response(status)
    for name, value in {"content-length": str(len(content)), **headers}.items():
        to.send_header(name.replace("_", "-"), value)
    to.end_headers()
    if to.command != "HEAD":
        to.wfile.write(content)


def status(number: int, **headers: str) -> Answer:
    return lambda to: send(to, number, **headers)


def silent(to: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(8)  # longer than the test waits
    to.close_connection = True


def reset(to: http.server.BaseHTTPRequestHandler) -> None:
    to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    to.close_connection = True


def page(to: http.server.BaseHTTPRequestHandler) -> None:
    send(to, 200, b"<html>Log in", content_type="text/html; charset=utf-8")


def cut(to: http.server.BaseHTTPRequestHandler) -> None:
    """Half of what was announced."""
    to.send_response(200)
    for name, value in {"content-length": "200000", "etag": '"x"', "x-repo-commit": COMMIT}.items():
        to.send_header(name, value)
    to.end_headers()
    if to.command != "HEAD":
        to.wfile.write(bytes(100_000))
    to.close_connection = True


def gated(number: int) -> Answer:
    restricted = "Access to model a/b is restricted. You must have access to it."
    return status(number, x_error_code="GatedRepo", x_error_message=restricted)


def wikitext() -> dict[str, bytes]:
    """The files of the data set, with two articles."""
    rows = [" = Bird = \n", *[" a bird flies over the hills \n"] * 20, " = Hill = \n", " high \n"]
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), table)
    file = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
    files = f"[{{split: test, path: {file}}}]"
    card = f"---\nconfigs: [{{config_name: wikitext-2-raw-v1, data_files: {files}}}]\n---\n"
    return {"README.md": card.encode(), file: table.getvalue()}


class Server:
    """A Hub on this machine with one model and one data set, which may fail with some files."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.fails = re.compile("nothing")
        self.answer: Answer = status(200)

        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                """Nothing."""

            def do_HEAD(self) -> None:
                hub.respond(self)

            def do_GET(self) -> None:
                hub.respond(self)

            def do_POST(self) -> None:
                self.asked = self.rfile.read(int(self.headers["content-length"])).decode()
                hub.respond(self)

        self.data = wikitext()
        self.listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.listening.daemon_threads = True
        self.listening.block_on_close = False
        threading.Thread(target=self.listening.serve_forever, daemon=True).start()

    def respond(self, to: http.server.BaseHTTPRequestHandler) -> None:
        name = to.path.split("?")[0].split("/")[-1]
        file = self.model / name
        if self.fails.search(to.path):
            self.answer(to)
        elif "datasets/" in to.path:
            self.give_data(to)
        elif "/tree/" in to.path:
            send(to, 200, b"[]", content_type="application/json")
        elif "/resolve/" not in to.path:
            told = {"id": "a/b", "sha": COMMIT, "siblings": []}
            send(to, 200, json.dumps(told).encode(), content_type="application/json")
        elif file.is_file():
            send(to, 200, file.read_bytes(), etag=f'"{name}"', x_repo_commit=COMMIT)
        else:
            send(to, 404, x_error_code="EntryNotFound", x_repo_commit=COMMIT)

    def give_data(self, to: Any) -> None:
        """Something of the data set."""
        path = to.path.split("?")[0]
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].partition("/")[2]
            if name in self.data:
                send(to, 200, self.data[name], etag=f'"{len(name)}"', x_repo_commit=COMMIT)
            else:
                send(to, 404, x_error_code="EntryNotFound", x_repo_commit=COMMIT)
            return
        told: Any = {"id": "Salesforce/wikitext", "sha": COMMIT, "tags": []}
        told["siblings"] = [{"rfilename": name} for name in self.data]
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": "x"}
            for name, content in self.data.items()
        ]
        if "/tree/" in path:
            told = [one for one in files if one["path"].startswith(path.split("/")[-1])]
        elif "/paths-info/" in path:
            wanted = urllib.parse.unquote_plus(to.asked)
            told = [one for one in files if one["path"] in wanted]
        send(to, 200, json.dumps(told).encode(), content_type="application/json")


@pytest.fixture
def server(model_folder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    server = Server(model_folder("llama"))
    endpoint = f"http://127.0.0.1:{server.listening.server_port}"
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ALL_PROXY", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for api in (one for one in gc.get_objects() if type(one) is HfApi):  # made at another endpoint
        monkeypatch.setattr(api, "endpoint", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    for cache in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "HF_CACHE_HOME"):
        monkeypatch.setattr(datasets.config, cache, str(tmp_path / "cache" / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    yield server
    server.listening.shutdown()
    server.listening.server_close()


def load() -> Any:
    settings = CaptureSettings(pretrained="a/b", tasks=["wikitext"])
    return open_checkpoint(settings).load("float32", "cpu")


@pytest.mark.parametrize("fails", [r"config\.json", "safetensors"])
@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (silent, "it sends nothing"),
        (reset, "does not give .*(reset|disconnect)"),
        (page, "a web page in place of .*wants a login"),
        (status(403), r"answers 403 \(Forbidden\)"),
        (cut, "does not give|sends nothing|breaks off"),
        (status(500), r"answers 500 \(Internal Server Error\)"),
        (status(429, retry_after="3600"), "answers 429 .*asks to wait 3600 s"),
    ],
    ids=["silent", "reset", "page", "403", "cut", "500", "429"],
)
def test_the_cause_is_told(answer: Answer, cause: str, fails: str, server: Server) -> None:
    server.fails, server.answer = re.compile(fails), answer
    started = time.monotonic()
    with pytest.raises(RetraceError, match=f"a/b cannot be loaded: .*{cause}") as refusal:
        load()
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("fails", [r"config\.json", "safetensors"])
@pytest.mark.parametrize("number", [401, 403])
def test_a_gated_model(number: int, fails: str, server: Server) -> None:
    server.fails, server.answer = re.compile(f"a/b/resolve/.*{fails}"), gated(number)
    with pytest.raises(RetraceError, match=r"a/b is gated: .*hf auth login") as refusal:
        load()
    assert "\n" not in str(refusal.value)


def test_a_model_that_is_not_there(server: Server) -> None:
    server.fails, server.answer = re.compile("a/b"), status(404, x_error_code="RepoNotFound")
    with pytest.raises(RetraceError, match=r"a/b cannot be loaded: .* Check its name"):
        load()


def test_the_first_command(server: Server, tmp_path: Path) -> None:
    trace = capture("a/b", tasks=["wikitext"], limit=10, max_length=64, out=tmp_path / "t.zarr")
    assert trace.attributes["model"]["revision"] == COMMIT
    assert trace.attributes["task"][0]["source"] == "Salesforce/wikitext/wikitext-2-raw-v1"
    assert len(trace.sequences) == 10


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (cut, "does not give|sends nothing"),
        (status(503), r"answers 503"),
        (status(429, retry_after="1"), "answers 429"),
        (silent, "sends nothing"),
    ],
    ids=["cut", "503", "429", "silent"],
)
def test_documents_that_do_not_come(
    answer: Answer, cause: str, server: Server, tmp_path: Path
) -> None:
    server.fails, server.answer = re.compile(r"datasets/.*parquet"), answer
    started = time.monotonic()
    with pytest.raises(RetraceError, match=f"wikitext .*cannot be loaded: .*({cause})") as refusal:
        capture("a/b", tasks=["wikitext"], limit=2, max_length=64, out=tmp_path / "t.zarr")
    assert "\n" not in str(refusal.value)
    assert "datasets-server" not in str(refusal.value)
    assert time.monotonic() - started < 30
    assert not (tmp_path / "t.zarr").exists()


def test_it_is_retried_as_the_server_asks(server: Server) -> None:
    failures = [503, 429]

    def answer(to: http.server.BaseHTTPRequestHandler) -> None:
        if failures:
            send(to, failures.pop(), retry_after="0")
        else:
            server.fails = re.compile("nothing")
            server.respond(to)

    server.fails, server.answer = re.compile("safetensors"), answer
    assert load().num_parameters() > 0
    assert not failures


@pytest.mark.parametrize("damage", ["ConnectionResetError", "corrupt parquet"])
def test_documents_that_cannot_be_downloaded(
    damage: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets.exceptions import DatasetGenerationError

    def fail(*_: Any, **__: Any) -> None:
        if damage == "ConnectionResetError":
            raise ConnectionResetError("Connection reset by peer")
        raise DatasetGenerationError("An error occurred") from ValueError("Parquet magic\nbytes")

    monkeypatch.setattr("datasets.load_dataset", fail)
    settings = CaptureSettings(pretrained="x", tasks=["wikitext"])
    with pytest.raises(RetraceError, match=r"(reset by peer|Parquet magic)\..*--data") as refusal:
        read_sequences(settings, WindowCutter(lambda *_, **__: {"input_ids": [1]}, 9, None))
    assert "\n" not in str(refusal.value)
