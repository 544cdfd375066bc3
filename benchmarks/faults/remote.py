"""What is lost of captures to an object store that fails, and of runs of `analyze` that read from
it. The store is an S3 server of moto, with faults put before it."""

import contextlib
import hashlib
import logging
import os
import random
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.analyze import METHODS, TOPK
from benchmarks.faults.capture import Captures

SEQUENCES = 4
LENGTH = 60
TIME_OUT = 2
"""Seconds until a client gives a request up, 15 otherwise."""
TRANSIENT = {
    "500": 0.1,
    "503": 0.1,
    "cut before the answer": 0.1,
    "cut within the answer": 0.1,
    "no answer in time": 0.02,
}
"""Share of the requests that fail so."""
ERRORS = {
    "403": ("403 Forbidden", "AccessDenied"),
    "500": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Slow Down", "SlowDown"),
}


class Failing:
    """A WSGI application some of whose requests fail."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self.fault: Callable[[int], str | None] = lambda number: None
        """What happens to the request of a number, from 1 on."""
        self.requests = 0
        self.faults = 0
        self._lock = threading.Lock()

    def begin(self, fault: Callable[[int], str | None]) -> None:
        """Count anew, with other faults."""
        with self._lock:
            self.fault, self.requests, self.faults = fault, 0, 0

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests += 1
            fault = self.fault(self.requests)
            self.faults += fault is not None
        if fault in ERRORS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = ERRORS[fault]
            start(status, [("Content-Type", "application/xml")])
            body = (
                f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
            )
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body.encode()]
        if fault == "no answer in time":
            time.sleep(1.5 * TIME_OUT)
        elif fault == "cut before the answer":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        answer: Iterable[bytes] = self._application(environ, start)
        if fault == "cut within the answer":
            return _half(b"".join(answer), environ["werkzeug.socket"])
        return answer


def _half(whole: bytes, connection: socket.socket) -> Iterator[bytes]:
    if len(whole) > 1:
        yield whole[: len(whole) // 2]
    connection.shutdown(socket.SHUT_RDWR)


class Store:
    """A bucket of a server on this machine, what is captured into it, and what was said of that."""

    def __init__(self, captures: Captures) -> None:
        import fsspec
        import s3fs
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        warnings.simplefilter("ignore")  # those of s3fs about connections that were cut
        for name in ("werkzeug", "asyncio"):
            logging.getLogger(name).disabled = True
        self._captures = captures
        self.server = Failing(DomainDispatcherApplication(create_backend_app))
        server = make_server("127.0.0.1", 0, self.server, threaded=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        fsspec.config.conf["s3"] = {"config_kwargs": {"read_timeout": TIME_OUT}}
        self._files = s3fs.S3FileSystem()
        self._files.mkdir("traces")

    def capture(self, name: str, resume: bool = False) -> str | None:
        """Capture to the bucket; what was said if it was refused."""
        from retrace.capture import capture
        from retrace.traces import RetraceError

        try:
            capture(
                str(self._captures.model),
                text=[self._captures.text],
                limit=SEQUENCES,
                max_length=LENGTH,
                out=f"s3://traces/{name}",
                resume=resume,
            )
        except RetraceError as error:
            return str(error)
        return None

    def analyze(self, name: str, out: Path) -> str | None:
        """Analyze it; what was said if that was refused."""
        from retrace.analyze import analyze
        from retrace.traces import RetraceError

        try:
            analyze(f"s3://traces/{name}", METHODS, TOPK[:1], out=out, workers=1)
        except RetraceError as error:
            return str(error)
        return None

    def digest(self, name: str) -> str:
        """Of every object but the trace's own attributes, which hold the time."""
        known = hashlib.sha256()
        for path in sorted(self._files.find(f"traces/{name}")):
            if path != f"traces/{name}/zarr.json":
                known.update(path.removeprefix(f"traces/{name}").encode())
                known.update(self._files.cat_file(path))
        return known.hexdigest()


def section(captures: Captures, count: int) -> list[str]:
    """Faults that pass and faults that stay, so many of each."""
    store, rng, folder = Store(captures), random.Random(5), captures.folder
    assert store.capture("whole") is None
    requests = store.server.requests
    assert store.analyze("whole", folder / "whole.results") is None
    whole = store.digest("whole"), (folder / "whole.results/metrics.parquet").read_bytes()
    lines = [
        f"`capture` to an object store, {SEQUENCES} sequences of {LENGTH} tokens in about "
        f"{requests} requests, and `analyze` of it, while requests fail at random:",
        "",
        "| fault | share | captures | requests | failed | the same objects | analyzed, requests "
        "| failed | the same metrics.parquet |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for fault, share in TRANSIENT.items():
        found: Counter[str] = Counter()
        for index in range(count):
            name = f"{fault.replace(' ', '-')}-{index}"

            def failing(number: int, fault: str = fault, share: float = share) -> str | None:
                return fault if rng.random() < share else None

            store.server.begin(failing)
            found["refused"] += store.capture(name) is not None
            found["requests"] += store.server.requests
            found["failed"] += store.server.faults
            store.server.begin(lambda number: None)
            found["same"] += store.digest(name) == whole[0]
            store.server.begin(failing)
            out = folder / f"{name}.results"
            found["refused"] += store.analyze(name, out) is not None
            found["read"] += store.server.requests
            found["unread"] += store.server.faults
            store.server.begin(lambda number: None)
            with contextlib.suppress(OSError):
                found["figures"] += (out / "metrics.parquet").read_bytes() == whole[1]
        lines.append(
            f"| {fault} | {share:.0%} | {count} | {found['requests']:,} | {found['failed']} "
            f"| {found['same']} | {found['read']:,} | {found['unread']} | {found['figures']} |"
        )
    return [*lines, *_lasting(store, 2 * count, requests, whole[0], rng)]


def _lasting(store: Store, count: int, requests: int, whole: str, rng: random.Random) -> list[str]:
    """From some request on every one fails, until the same command is given again."""
    from retrace.traces import open_trace, verify_trace

    lines = [
        "",
        "Every request fails from a random one on; afterwards the same command with `--resume`:",
        "",
        "| fault | captures | told in one line | finished sequences left | damaged arrays "
        "| resumed to the same objects |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for fault in ("403", "500"):
        finished, damaged, told, same = [], 0, 0, 0
        for index in range(count):
            name, first = f"lasting-{fault}-{index}", int(requests * (index + rng.random()) / count)
            store.server.begin(lambda n, first=first, fault=fault: fault if n > first else None)
            line = store.capture(name)
            store.server.begin(lambda number: None)
            told += line is not None and "\n" not in line
            try:
                finished.append(len(open_trace(f"s3://traces/{name}").sequences))
                damaged += len(verify_trace(f"s3://traces/{name}").damages)
            except ValueError:  # it was not begun yet
                finished.append(0)
            same += store.capture(name, resume=True) is None and store.digest(name) == whole
        lines.append(
            f"| {fault} | {count} | {told} | {min(finished)} to {max(finished)} | {damaged} "
            f"| {same} |"
        )
    return lines
