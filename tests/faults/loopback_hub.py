"""A hub of datasets on the loopback interface: what `datasets` asks of the real one, and faults put into its answers."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "allenai/c4"
COMMIT = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


def shard(texts: list[str]) -> bytes:
    """A file of C4: gzip, a JSON object a line."""
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com/page"} for text in texts]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


@dataclass
class Fault:
    """What happens to requests whose path (without the query) matches `path`: to `times` of them, after `after` were served well."""

    path: str
    kind: str  # status, drop, slow, silent, garbage
    value: float = 0  # the status; the share of the body after which the connection is dropped; seconds
    times: float = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def takes(self, path: str) -> bool:
        """Whether this request is one of them."""
        if not re.search(self.path, path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return self.times >= 0


class LoopbackHub:
    """Serves the files of one dataset repository at `url` until it is closed; `requests` are the paths asked for, with their ranges."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = {"README.md": README.encode(), **files}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str | None]] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Listen, at the port of before if there was one."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections from now on, and cut those that are open."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[Any] = set()
        self.closed = threading.Event()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def cut(self) -> None:
        self.closed.set()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are nothing to talk about."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.requests.append((f"{self.command} {path}", self.headers.get("Range")))
        fault = next((fault for fault in self.hub.faults if fault.takes(path)), None)
        if fault is not None and fault.kind == "silent":
            self.server.closed.wait(fault.value)  # type: ignore[attr-defined]
            self.close_connection = True
            return
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.value)
        if fault is not None and fault.kind == "status":
            self._send(int(fault.value), b'{"error": "injected"}', fault.headers)
            return
        self._route(path, parse_qs(parts.query), parse_qs(sent.decode()), fault)

    def _route(self, path: str, query: dict[str, list[str]], form: dict[str, list[str]], fault: Fault | None) -> None:
        api = f"/api/datasets/{REPOSITORY}"
        if path in (api, f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "cardData": {}}, fault)
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            found = self._tree(below, recursive=query.get("recursive", ["false"])[0].lower() == "true")
            self._json(found, fault, 200 if found else 404)
        elif path == f"{api}/paths-info/{COMMIT}":
            self._json([entry for name in form["paths"] for entry in self._entries() if entry["path"] == name], fault)
        elif path.startswith(f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/datasets/{REPOSITORY}/resolve/{COMMIT}/")
            if name not in self.hub.files:
                self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            elif name.endswith(".gz") and self.command == "GET":  # large files lie elsewhere
                self._send(302, b"", {"Location": f"{self.hub.url}/cdn/{name}", "X-Repo-Commit": COMMIT})
            else:
                self._file(name, fault)
        elif path.startswith("/cdn/"):
            self._file(path.removeprefix("/cdn/"), fault)
        else:
            self._send(404, b'{"error": "no such page"}')

    def _entries(self) -> list[dict[str, Any]]:
        folders = sorted({str(parent) for name in self.hub.files for parent in Path(name).parents if str(parent) != "."})
        found: list[dict[str, Any]] = [{"type": "directory", "path": folder, "oid": _oid(folder.encode()), "size": 0} for folder in folders]
        for name, content in self.hub.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "oid": _oid(content), "size": len(content)}
            if name.endswith(".gz"):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            found.append(entry)
        return found

    def _tree(self, below: str, *, recursive: bool) -> list[dict[str, Any]]:
        def is_in(path: str) -> bool:
            inner = path.removeprefix(f"{below}/") if below else path
            return (not below or path.startswith(f"{below}/")) and (recursive or "/" not in inner)

        return [entry for entry in self._entries() if is_in(entry["path"])]

    def _file(self, name: str, fault: Fault | None) -> None:
        content = self.hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            if first >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers, fault)

    def _json(self, value: Any, fault: Fault | None, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None) -> None:
        length = len(body)
        if fault is not None and fault.kind == "garbage":
            body = bytes(length)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault is not None and fault.kind == "drop":
            body, self.close_connection = body[: int(length * fault.value)], True
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


Serve = Callable[[dict[str, bytes]], LoopbackHub]
