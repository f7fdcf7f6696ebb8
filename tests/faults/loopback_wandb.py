"""A W&B server on the loopback interface: as much of the API as `wandb` needs for a run, and the ways in which a server fails."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackWandb:
    """Serves at `url` until it is closed.

    `behaviour` is "well", "silent" (takes questions and never answers) or "refuses" (401 to every key). `runs` has the ids of the runs that
    were opened, `history` the records that came, by run.
    """

    def __init__(self, behaviour: str = "well") -> None:
        self.behaviour = behaviour
        self.runs: list[str] = []
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.operations: list[str] = []
        self.run_is_open = threading.Event()
        self.closed = threading.Event()
        self._connections: set[Any] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"wandb": self}))
        self._server.daemon_threads = True
        process_request = self._server.process_request

        def remember(request: Any, client_address: Any) -> None:
            self._connections.add(request)
            process_request(request, client_address)

        self._server.process_request = remember  # type: ignore[method-assign]
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections from now on, and cut those that are open."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of an answer to a GraphQL operation."""
        self.operations.append(operation)
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "team", "username": "user", "email": None, "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            known = variables["name"] in self.history
            count = len(self.history.get(variables["name"], []))
            tail = json.dumps([json.dumps({"_step": count - 1, "_runtime": 1})]) if count else "[]"
            bucket = {"id": "b", "name": variables["name"], "displayName": "r", "summaryMetrics": "{}", "config": "{}", "tags": []}
            bucket |= {"logLineCount": 0, "historyLineCount": count, "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]"}
            return {"model": {"id": "p", "name": "ngpt", "entity": {"id": "e", "name": "team"}, "bucket": bucket if known else None}}
        if operation == "UpsertBucket":
            name = variables.get("name") or self.runs[-1]
            inserted = name not in self.runs
            self.runs.append(name)
            self.run_is_open.set()
            project = {"name": variables.get("project") or "ngpt", "entity": {"name": "team"}}
            bucket = {"id": "b", "name": name, "displayName": "r", "project": project, "historyLineCount": 0, "config": "{}"}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def take(self, run: str, sent: dict[str, Any]) -> None:
        """Records of a run."""
        lines = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(json.loads(line) for line in lines)


class _Handler(BaseHTTPRequestHandler):
    wandb: LoopbackWandb
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            sent = gzip.decompress(sent)
        if self.wandb.behaviour == "silent":
            self.wandb.closed.wait()
            self.close_connection = True
        elif self.wandb.behaviour == "refuses":
            self._send(401, {"errors": [{"message": "invalid api key"}]})
        elif self.path == "/graphql":
            asked = json.loads(sent)
            self._send(200, {"data": self.wandb.answer(asked.get("operationName", ""), asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.wandb.take(self.path.split("/")[-2], json.loads(sent))
            self._send(200, {"exitcode": None, "limits": {}})
        else:
            self._send(200, {})

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
