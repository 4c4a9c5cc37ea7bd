"""The Hub's requests and answers as HTTP, with the faults on their way."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.faults import SILENT, SLOW_SECONDS, STATUSES
from hub.state import Blob

if TYPE_CHECKING:
    from hub_server import HubServer


@dataclass(frozen=True)
class Answer:
    content: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    content = json.dumps(value).encode()
    return Answer(content, status, {"Content-Type": "application/json", **headers})


class Refusal(Exception):
    """An answer other than 200, raised where it is found out."""

    def __init__(self, status: int, body: Any = None, code: str = "", **headers: str) -> None:
        super().__init__(status)
        marks = {"X-Error-Code": code} if code else {}
        body = {"error": code or str(status)} if body is None else body
        self.answer = as_json(body, status, **marks, **headers)


class HttpHandler(BaseHTTPRequestHandler):
    """Routes a request to the method that its route names and sends what that returns."""

    hub: HubServer
    routes: tuple[tuple[str, str, str], ...]
    protocol_version = "HTTP/1.1"
    # Head and body of an answer in one packet: apart, each answer waits for the client's delayed
    # acknowledgement of the first, 40 ms.
    wbufsize = -1

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        faults = self.hub.faults
        fault = faults(self.command, url.path) if faults is not None else None
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length // 2 if fault == "drop" else length)
        if fault == "drop":
            return self.hang_up()
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
            if fault == "conflict":
                self.commit_first(url.path)
            answer = self.answer(url.path) if fault not in STATUSES else self.failure(fault)
        if fault == SILENT:
            with suppress(OSError):
                self.connection.recv(1)
        if fault in ("lost", SILENT):
            return self.hang_up()
        if fault == "corrupt" and answer.content:
            middle = len(answer.content) // 2
            wrong = bytes([answer.content[middle] ^ 1])
            content = answer.content[:middle] + wrong + answer.content[middle + 1 :]
            answer = Answer(content, answer.status, answer.headers)
        self.send(answer, cut=fault == "truncate")

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, path: str) -> Answer:
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                arguments = {k: unquote(v) for k, v in match.groupdict().items()}
                try:
                    answer: Answer = getattr(self, name)(**arguments)
                except Refusal as refusal:
                    return refusal.answer
                return answer
        return Refusal(404).answer

    def failure(self, fault: str) -> Answer:
        headers = {"Retry-After": "1"} if fault == "rate-limit" else {}
        return as_json({"error": "as planned"}, STATUSES[fault], **headers)

    def commit_first(self, path: str) -> None:
        """Let somebody else change one file of the branch that this request is about to change."""
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path)
        assert match is not None
        repo, branch = self.hub.repos[match[1]], unquote(match[2])
        parent = repo.find(branch)
        assert parent is not None
        repo.add(branch, "theirs", parent.files | {"README.md": Blob(b"theirs", False)})

    def send(self, answer: Answer, *, cut: bool) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            content = answer.content
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client may be gone
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass
