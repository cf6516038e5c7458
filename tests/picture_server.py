"""A server of small pictures for tests of downloads, on this machine: some are there, some are not, some are odd."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

SAMPLE = Path(str(resources.files("clip_index"))) / "data" / "sample"
PICTURES = sorted(SAMPLE.rglob("*.jpg"))


class PictureServer(ThreadingHTTPServer):
    """`/N.jpg` is a picture of the sample; `/gone`, `/text`, `/reset` fail; `late` waits for `release`.

    `hung_up` is set when who waits for an answer goes away.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: Counter[str] = Counter()
        self.release, self.hung_up = threading.Event(), threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: PictureServer

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        while "late" in self.path and not self.server.release.wait(0.05):
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                self.server.hung_up.set()
                return
        name = self.path.strip("/").split("?")[0].split(",")[0]
        if name == "reset":
            self.connection.close()
        elif name == "text":
            self._answer(b"<html>no picture</html>")
        elif name.removesuffix(".jpg").isdigit():
            self._answer(PICTURES[int(name.removesuffix(".jpg"))].read_bytes())
        else:
            self.send_error(404)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serve() -> Iterator[PictureServer]:
    """A server while the block runs."""
    with PictureServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()
