"""Whether the Hugging Face Hub can be reached, found out in seconds.

The Hub's clients retry for 23 seconds where a name cannot be resolved, and longer behind a
firewall that drops packets. They are told to look only at their cache when this says no.
"""

import contextlib
import os
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def hub_reachable() -> bool:
    """True if the Hub (or the mirror that `HF_ENDPOINT` names) answers within the time that its own
    clients give it: ten seconds, or HF_HUB_ETAG_TIMEOUT.

    Honours the proxy variables and those that ask for offline work.
    """
    if any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE_VARIABLES
    ):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[bool] = []
    # In a thread, since no timeout bounds the resolution of a name.
    asking = threading.Thread(target=lambda: answers.append(_answers(endpoint)), daemon=True)
    asking.start()
    asking.join(constants.HF_HUB_ETAG_TIMEOUT + 0.5)
    return bool(answers and answers[0])


def _answers(endpoint: str) -> bool:
    address = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    if address.scheme not in proxies and "all" in proxies:
        # urllib does not speak SOCKS: that the proxy is there must do.
        address = urllib.parse.urlsplit(proxies["all"])
        return _connects(address.hostname or "", address.port or 1080)
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        # An opener of its own: the shared one keeps the proxies of its first call.
        with urllib.request.build_opener().open(request, timeout=constants.HF_HUB_ETAG_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except urllib.error.URLError as error:
        # A certificate that this client rejects may be one that the Hub's own accepts.
        return "CERTIFICATE" in str(error.reason).upper()
    except (OSError, ValueError):
        return False


def _connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=constants.HF_HUB_ETAG_TIMEOUT):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def datasets_offline() -> Iterator[None]:
    """`datasets` looks only at its cache within this context."""
    import datasets
    import huggingface_hub.constants

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
