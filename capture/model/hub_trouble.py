"""What goes wrong between the Hub and its clients: noticed, told in a line, and ended in time.

The clients of the Hub retry what fails, and wait as long as a server asks. What they raise in the
end tells that a file was not found, whatever kept them from it.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import _http

from retrace.traces import RetraceError

TRIES = 3
"""How many times the client's own time limit of one answer (HF_HUB_DOWNLOAD_TIMEOUT) it may take
until there is one, retries included."""
FILE = re.compile(r"/resolve/|^/api/(models|datasets)/")
"""The paths of what is never a web page."""


BESIDE = "datasets-server."
"""What is asked where the Hub itself did not give something, and is not there beside a mirror."""


class GivenUpError(RetraceError):
    """The Hub does not give what is asked for, however often."""


Request = tuple[str, str, str]
"""Method, address, and which bytes."""


class Trouble:
    """What was noticed of the requests to the Hub."""

    def __init__(self) -> None:
        self._begun: dict[Request, float] = {}
        self._failed: dict[Request, str] = {}
        self._failing_since: float | None = None
        self._ended: str | None = None
        self.gated = False
        """Whether something was refused to who has not asked for access."""

    @property
    def cause(self) -> str | None:
        """Why the last request that failed did so, and does still; None where none does."""
        return self._ended or next(reversed(self._failed.values()), None)

    def send(self, send: Callable[..., Any], request: Any, options: dict[str, Any]) -> Any:
        """A response to a request of the client; its failures are noted.

        Raises:
            GivenUpError: it has been retried long enough, or the answer is no file.
        """
        if self._ended is not None:
            raise GivenUpError(self._ended)
        asked = request.method, str(request.url), request.headers.get("range", "")
        place = f"{request.url.host}{request.url.path}"
        now = time.monotonic()
        since = self._begun.setdefault(asked, now)
        if self._failing_since is not None:
            since = min(since, self._failing_since)
        if now - since + constants.HF_HUB_DOWNLOAD_TIMEOUT >= _patience():
            self._give_up(self.cause or f"sends nothing of {place}")
        limits = request.extensions.get("timeout", {})
        most = constants.HF_HUB_DOWNLOAD_TIMEOUT  # the client waits a minute for some answers
        limits = {
            what: most if limit is None else min(limit, most) for what, limit in limits.items()
        }
        request.extensions["timeout"] = limits
        try:
            response = send(request, **options)
        except Exception as error:
            self._note(asked, now, f"does not give {place}: {in_words(error)}")
            raise
        status, headers = response.status_code, response.headers
        gated = headers.get("x-error-code") == "GatedRepo"
        self.gated |= gated
        if status >= 500 or (status in (403, 407, 408, 429) and not gated):
            self._note(asked, now, f"answers {status} ({_phrase(status)}) for {place}")
            asks = headers.get("retry-after", "")
            if asks.isdecimal() and now - since + int(asks) >= _patience():
                self._give_up(f"{self.cause}, and asks to wait {asks} s")
            return response
        if status == 200 and FILE.search(request.url.path) and _is_page(headers):
            self._give_up(
                f"answers with a web page in place of {place}: something on the way wants a login"
            )
        self._failed.pop(asked, None)
        self._failing_since = None
        return response

    def _note(self, asked: Request, when: float, cause: str) -> None:
        if urlsplit(asked[1]).netloc.startswith(BESIDE):
            return
        self._failed.pop(asked, None)  # the last is the one that is told
        self._failed[asked] = cause
        if self._failing_since is None:
            self._failing_since = when

    def _give_up(self, cause: str) -> None:
        self._ended = cause
        raise GivenUpError(cause)


_noticing: ContextVar[Trouble | None] = ContextVar("noticing", default=None)


@contextlib.contextmanager
def noticed_trouble() -> Iterator[Trouble]:
    """Within this context requests to the Hub are watched, and given up in time; within another
    one, by that."""
    if (known := _noticing.get()) is not None:
        yield known
        return
    trouble, factory = Trouble(), _http._GLOBAL_CLIENT_FACTORY

    def make() -> Any:
        client: Any = factory()
        send = client.send
        client.send = lambda request, **options: trouble.send(send, request, options)
        return client

    huggingface_hub.set_client_factory(make)
    token = _noticing.set(trouble)
    try:
        yield trouble
    finally:
        _noticing.reset(token)
        huggingface_hub.set_client_factory(factory)


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error may be the Hub's or its client's, and not that of what was loaded."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in ("httpx", "httpx2", "huggingface_hub")


def _patience() -> float:
    return float(TRIES * constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _is_page(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").startswith("text/html")


def in_words(error: Exception) -> str:
    """An error of the client."""
    if "Timeout" in type(error).__name__:
        return "it sends nothing"
    return " ".join(str(error).split()) or type(error).__name__


def _phrase(status: int) -> str:
    with contextlib.suppress(ValueError):
        return HTTPStatus(status).phrase
    return "no status that is known"
