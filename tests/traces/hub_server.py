"""A server on this machine that answers what `HfFileSystem` asks the Hub of one data set."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A data set of files, held in memory."""

    def __init__(self, repository: str, token: str) -> None:
        self.repository, self.token = repository, token
        self.files: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()

    def entry(self, path: str) -> dict[str, Any] | None:
        """What the Hub says of a path; None where there is nothing."""
        if path in self.files:
            content = self.files[path]
            return {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"type": "directory", "path": path, "oid": _digest(path.encode())}
        return None

    def tree(self, path: str, recursive: bool) -> list[dict[str, Any]]:
        """What is beneath a path."""
        start = f"{path}/" if path else ""
        paths = set()
        for name in self.files:
            if name.startswith(start):
                parts = name.removeprefix(start).split("/")
                depths = range(1, len(parts) + 1) if recursive else (1,)
                paths |= {start + "/".join(parts[:depth]) for depth in depths}
        return [entry for name in sorted(paths) if (entry := self.entry(name))]

    def commit(self, lines: bytes) -> None:
        """Do what a commit says."""
        for line in lines.splitlines():
            operation = json.loads(line)
            path = operation["value"].get("path", "")
            if operation["key"] == "file":
                self.files[path] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "deletedFile":
                self.files.pop(path)
            elif operation["key"] == "deletedFolder":
                beneath = f"{path.rstrip('/')}/"
                self.files = {n: c for n, c in self.files.items() if not n.startswith(beneath)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # an answer in two parts would wait for the client

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                self._answer(b"".join(iter(self._chunk, b"")))
            else:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _chunk(self) -> bytes:
            chunk = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return chunk

        def _answer(self, body: bytes) -> None:
            parsed = urlparse(self.path)
            path, asked = unquote(parsed.path), parsed.query
            known = self.headers.get("Authorization") == f"Bearer {hub.token}"
            match = re.fullmatch(
                rf"(?:/api)?/datasets/{hub.repository}(?:/(\w+-?\w*)(?:/[\w.-]+)?)?(?:/(.*))?", path
            )
            if match is None or not known:
                # The Hub does not tell those who may not see a repository that it is there.
                missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not Found"}
                self._send(404 if known else 401, {"error": "Repository not found"}, missing)
                return
            what, place = match[1], match[2] or ""
            if what in (None, "revision"):
                self._send(200, {"id": hub.repository, "sha": COMMIT, "private": True})
            elif what == "tree":
                found = hub.tree(place, "recursive=true" in asked.lower())
                if found or not place:
                    self._send(200, found)
                else:
                    self._send_missing()
            elif what == "paths-info":
                paths = self._asked(body)
                self._send(200, [e for p in paths if (e := hub.entry(p.rstrip("/")))])
            elif what == "preupload":
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular"} for f in files]
                self._send(200, {"files": [{**m, "shouldIgnore": False} for m in modes]})
            elif what == "commit":
                hub.commit(body)
                url = f"{hub.url}/datasets/{hub.repository}/commit/{COMMIT}"
                self._send(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
            elif place in hub.files:
                self._send_file(hub.files[place])
            else:
                self._send_missing()

        def _send_missing(self) -> None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

        def _asked(self, body: bytes) -> list[str]:
            if "json" in self.headers.get("Content-Type", ""):
                paths: list[str] = json.loads(body)["paths"]
                return paths
            return [
                unquote(p.replace("+", " ")) for p in re.findall(r"paths=([^&]*)", body.decode())
            ]

        def _send(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
            self._put(code, json.dumps(content).encode(), headers or {})

        def _send_file(self, content: bytes) -> None:
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}
            if span is None:
                self._put(200, content, headers)
                return
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._put(206, content[first : last + 1], headers)

        def _put(self, code: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler
