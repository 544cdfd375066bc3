"""Whether the Hub can be reached is known in seconds, and so is that a model cannot be had."""

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from retrace.capture import CaptureSettings
from retrace.capture.model.hub import hub_reachable
from retrace.capture.model.loading import open_checkpoint
from retrace.traces import RetraceError

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that change where the Hub is looked for."""
    names = [*PROXIES, *(name.upper() for name in PROXIES)]
    for name in [*names, "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers everything with 501, which is an answer."""
    with http.server.HTTPServer(("127.0.0.1", 0), QuietHandler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Knows no method, and says nothing of it."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def test_an_endpoint_that_answers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert hub_reachable()


def test_an_endpoint_behind_a_proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", server)
    assert hub_reachable()


def test_offline_by_variable(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_reachable()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid", "nonsense"])
def test_an_endpoint_that_does_not_answer(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    started = time.monotonic()
    assert not hub_reachable()
    assert time.monotonic() - started < 5


def test_unknown_model_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RetraceError) as refusal:
        open_checkpoint(CaptureSettings(pretrained="nobody/no-model", tasks=["wikitext"]))
    assert time.monotonic() - started < 5
    assert "nobody/no-model" in str(refusal.value)
    assert "cannot be reached" in str(refusal.value)
    assert "builtin:smollm2" in str(refusal.value)
    assert "\n" not in str(refusal.value)
