"""Serves a folder as web servers do, or as a hub of data sets does: files in parts, and lists of what there is."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

_REPOSITORY = re.compile(r"/api/datasets/(\w+/\w+)(?:/revision/main)?")
_TREE = re.compile(r"/api/datasets/(\w+/\w+)/tree/main(?:/(.+))?")
_PATHS = re.compile(r"/api/datasets/(\w+/\w+)/paths-info/main")
_RESOLVE = re.compile(r"/datasets/(\w+/\w+)/resolve/main/(.+)")


class WebServer:
    """`choose(method, path)` is None, a status, "reset" or "cut"; without `ranges` files are sent whole."""

    def __init__(
        self,
        folder: Path,
        choose: Callable[[str, str], int | str | None] = lambda *_: None,
        *,
        ranges: bool = True,
        hub: bool = False,
    ):
        self.folder, self.choose, self.ranges, self.hub = folder, choose, ranges, hub
        self.seen: Counter[int | str | None] = Counter()
        self.sent = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(served) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = served.choose(self.command, self.path)
                served.seen[fault] += 1
                self.cut = fault == "cut"
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                elif isinstance(fault, int):
                    self._answer(fault, b"no", {})
                else:
                    url = urlsplit(self.path)
                    path = unquote(url.path)
                    if served.hub:
                        self._hub(path, parse_qs(url.query))
                    else:
                        self._file(served.folder / path.strip("/"))

            do_GET = do_HEAD = do_POST = handle_any

            def _file(self, path: Path) -> None:
                if path.is_dir():
                    links = "".join(
                        f'<a href="{quote(item.name)}{"/" * item.is_dir()}">.</a>' for item in path.iterdir()
                    )
                    self._answer(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"})
                elif not path.is_file():
                    self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                else:
                    data, headers = path.read_bytes(), {"Content-Type": "application/octet-stream"}
                    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
                    if asked is None or not served.ranges:
                        self._answer(200, data, headers)
                    else:
                        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
                        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                        self._answer(206, data[start:stop], headers)

            def _hub(self, path: str, query: dict[str, list[str]]) -> None:
                if found := _REPOSITORY.fullmatch(path):
                    there = (served.folder / found[1]).is_dir()
                    told = {"id": found[1], "sha": "0" * 40, "private": False, "tags": [], "siblings": []}
                    self._json(told if there else None, "RepoNotFound", status=401)
                elif found := _TREE.fullmatch(path):
                    folder = served.folder / found[1] / (found[2] or "")
                    below = folder.rglob("*") if query.get("recursive") == ["true"] else folder.glob("*")
                    there = folder.is_dir()
                    self._json([_entry(item, served.folder / found[1]) for item in sorted(below)] if there else None)
                elif found := _PATHS.fullmatch(path):
                    root = served.folder / found[1]
                    asked = json.loads(self.body)["paths"]
                    self._json([_entry(root / name, root) for name in asked if (root / name).exists()])
                elif found := _RESOLVE.fullmatch(path):
                    self._file(served.folder / found[1] / found[2])
                else:
                    self._answer(404, b"", {})

            def _json(self, told: object, code: str = "EntryNotFound", status: int = 404) -> None:
                if told is None:
                    self._answer(status, b"{}", {"X-Error-Code": code})
                else:
                    self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

            def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.close_connection = self.close_connection or self.cut
                    served.sent += len(data)
                    self.wfile.write(data[: len(data) // 2] if self.cut else data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _entry(path: Path, root: Path) -> dict[str, object]:
    name, oid = path.relative_to(root).as_posix(), hashlib.sha1(path.name.encode()).hexdigest()
    kind = {"type": "directory"} if path.is_dir() else {"type": "file"}
    return {**kind, "path": name, "oid": oid, "size": 0 if path.is_dir() else path.stat().st_size}
