"""A Hub that fails is told in a line with the cause, in bounded time."""

import gc
import http.server
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from retrace.capture import CaptureSettings
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


class Server:
    """A Hub on this machine with one model, which may fail with its configuration or weights."""

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

        self.listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.listening.daemon_threads = True
        self.listening.block_on_close = False
        threading.Thread(target=self.listening.serve_forever, daemon=True).start()

    def respond(self, to: http.server.BaseHTTPRequestHandler) -> None:
        name = to.path.split("?")[0].split("/")[-1]
        file = self.model / name
        if self.fails.search(to.path):
            self.answer(to)
        elif "/tree/" in to.path:
            send(to, 200, b"[]", content_type="application/json")
        elif "/resolve/" not in to.path:
            told = {"id": "a/b", "sha": COMMIT, "siblings": []}
            send(to, 200, json.dumps(told).encode(), content_type="application/json")
        elif file.is_file():
            send(to, 200, file.read_bytes(), etag=f'"{name}"', x_repo_commit=COMMIT)
        else:
            send(to, 404, x_error_code="EntryNotFound", x_repo_commit=COMMIT)


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
        (status(500), r"answers 500 \(Internal Server Error\)"),
        (status(429, retry_after="3600"), "answers 429 .*asks to wait 3600 s"),
    ],
    ids=["silent", "reset", "page", "403", "500", "429"],
)
def test_the_cause_is_told(answer: Answer, cause: str, fails: str, server: Server) -> None:
    server.fails, server.answer = re.compile(fails), answer
    started = time.monotonic()
    with pytest.raises(RetraceError, match=f"a/b cannot be loaded: .*{cause}") as refusal:
        load()
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - started < 30


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
