"""An S3 server (moto) as a process, and an HTTP proxy in front of it. The proxy logs requests and causes faults."""

from __future__ import annotations

import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote

DEADLINE_S = 120.0  # longest time of each wait; on an idle machine, the server starts in 2 s
BUCKET = "photographs"
_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class S3Server:
    """moto's S3 server as a process on a free port of this machine, with an empty bucket.

    The server accepts parts of a multipart upload from a size of 256 bytes.
    """

    def __init__(self, port: int = 0) -> None:
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.port = port
        program = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "256"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                self.request("PUT", f"/{BUCKET}")
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.02)

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Send a request, and return status and body of the answer. The server does not check signatures."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body, {"Authorization": _AUTHORIZATION})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Return {path: content} of all objects below `prefix`/."""
        _, listing = self.request("GET", f"/{BUCKET}?list-type=2&prefix={prefix}/")
        keys = re.findall(r"<Key>(.*?)</Key>", listing.decode())
        return {key.removeprefix(f"{prefix}/"): self.request("GET", f"/{BUCKET}/{key}")[1] for key in keys}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Request(NamedTuple):
    """A request that reached the proxy."""

    method: str
    path: str  # path of the object in the bucket, without the query
    query: str
    sent_bytes: int  # length of the request's body


@dataclass
class Fault:
    """The fault that the proxy causes in one request."""

    cut_request_after: int | None = None  # close the connection after this number of bytes of the request's body
    cut_answer_after: int | None = None  # close the connection after this number of bytes of the answer's body
    flip_request: bool = False  # change one bit of the request's body
    flip_answer: bool = False  # change one bit of the answer's body
    status: int = 0  # if not 0, the proxy answers with this status and `code`, without asking the server
    code: str = "InternalError"


@dataclass
class Proxy:
    """An HTTP proxy on a free port.

    Before the proxy forwards a request, `decide` chooses the fault that the proxy causes.
    """

    server: S3Server
    decide: Callable[[Request], Fault | None] = lambda request: None
    log: list[Request] = field(default_factory=list)
    faults: int = 0  # number of faults that were caused
    is_gcs: bool = False  # True if requests have the form of Google's API, in which `/` and `.` in keys are escaped

    def __post_init__(self) -> None:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def count(self, method: str, path: str) -> int:
        """Return the number of requests of a method for a path."""
        return sum(request.method == method and request.path == path for request in self.log)

    def close(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffer an answer, so that its head and body are sent together
    owner: Proxy

    def _forward(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if self.owner.is_gcs:
            self.path = unquote(self.path)
            del self.headers["Authorization"]
            self.headers["Authorization"] = _AUTHORIZATION
        raw_path, _, query = self.path.partition("?")
        request = Request(self.command, raw_path.removeprefix(f"/{BUCKET}/"), query, length)
        self.owner.log.append(request)
        fault = self.owner.decide(request) or Fault()
        self.owner.faults += fault != Fault()
        if fault.cut_request_after is not None:
            self.rfile.read(min(length, fault.cut_request_after))
            self._cut()
            return
        body = self.rfile.read(length)
        if fault.flip_request and body:
            body = _flipped(body)
        status, headers, answer = fault.status, dict[str, str](), b""
        if status:
            answer = f"<Error><Code>{fault.code}</Code></Error>".encode()
        else:
            try:
                status, headers, answer = self._ask_server(body)
            except OSError:  # the server was killed
                self._cut()
                return
        if fault.flip_answer and answer:
            answer = _flipped(answer)
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", headers.get("Content-Length", "0") if is_head else str(len(answer)))
        self.end_headers()
        if fault.cut_answer_after is not None:
            self.wfile.write(answer[: fault.cut_answer_after])
            self._cut()
        elif not is_head:
            self.wfile.write(answer)

    def _ask_server(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.server.port, timeout=DEADLINE_S)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _cut(self) -> None:
        """Reset the connection, as a router may do."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the client or `_cut` closed the connection
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            pass


def _flipped(content: bytes) -> bytes:
    """Return a copy of `content` with one bit of the middle byte changed."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)
