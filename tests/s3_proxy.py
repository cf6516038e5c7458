"""Stands before the S3 server of `s3_server` and misbehaves as real stores do."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code} by test</Message></Error>"
STATUS = {"SlowDown": 503, "InternalError": 500, "AccessDenied": 403}


class Proxy:
    """`choose(method, path)` says what becomes of a request: None, a code of `STATUS`, "reset", or "cut"."""

    def __init__(self, upstream: str, choose: Callable[[str, str], str | None]):
        self.choose = choose
        self.seen: Counter[str | None] = Counter()
        self._upstream = urlsplit(upstream)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.choose(self.command, self.path)
                proxy.seen[fault] += 1
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                elif fault in STATUS:
                    self._answer(STATUS[fault], {"Content-Type": "application/xml"}, ERROR.format(code=fault).encode())
                else:
                    status, headers, data = self._forward(body)
                    cut = fault == "cut" and self.command == "GET" and len(data) > 1
                    self._answer(status, headers, data, sent=len(data) // 2 if cut else None)
                    self.close_connection = self.close_connection or cut

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                connection = http.client.HTTPConnection(proxy._upstream.hostname, proxy._upstream.port)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    return answer.status, dict(answer.getheaders()), answer.read()
                finally:
                    connection.close()

            def _answer(self, status: int, headers: dict[str, str], data: bytes, sent: int | None = None) -> None:
                self.send_response_only(status)
                skipped = {"connection", "transfer-encoding"} | (
                    {"content-length"} if self.command != "HEAD" else set()
                )
                for name, value in headers.items():
                    if name.lower() not in skipped:
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[:sent])

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def sometimes(seed: int, rate: float, faults: list[str]) -> Callable[[str, str], str | None]:
    """One of the faults for a share of the requests."""
    rng, lock = random.Random(seed), threading.Lock()

    def choose(method: str, path: str) -> str | None:
        with lock:
            return rng.choice(faults) if rng.random() < rate else None

    return choose


def for_a_while(fault: str, after: int, seconds: float) -> Callable[[str, str], str | None]:
    """The fault for every request, for some seconds from the given request on."""
    count, began, lock = [0], [0.0], threading.Lock()

    def choose(method: str, path: str) -> str | None:
        with lock:
            count[0] += 1
            if count[0] == after:
                began[0] = time.monotonic()
            return fault if began[0] and time.monotonic() - began[0] < seconds else None

    return choose
