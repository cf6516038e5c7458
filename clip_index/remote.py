"""Object stores as they are: slow to answer, and sometimes throttling, resetting or failing.

1. `call` asks a store for something, and asks again with growing pauses while the failure is one that passes.
2. `RemoteFile` reads a file in blocks; while it is read from front to back, the next blocks are fetched on threads.
"""

from __future__ import annotations

import errno
import functools
import io
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from clip_index.types import ClipIndexError

Result = TypeVar("Result")

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PATIENCE_S = 60.0
"""How long a store may go on failing; its own client has tried some times before each of our attempts."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 8.0
_BLOCK = 4 << 20
_AHEAD = 7
"""Blocks fetched before they are asked for: with the one being read, a file holds at most 32 MB."""
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_EXTRAS |= {"az": "azure", "abfs": "azure", "abfss": "azure"}
_KINDS = {403: PermissionError, 404: FileNotFoundError}
_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, FileExistsError: errno.EEXIST}
_PASSING = {
    errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH,
    getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
_PASSING_KINDS = {
    "HTTPClientError", "EndpointConnectionError", "ResponseParserError",  # botocore
    "ClientPayloadError", "ClientConnectionError",  # aiohttp
    "TransportError",  # httpx, google.auth
    "ServiceRequestError", "ServiceResponseError",  # azure.core
}  # fmt: skip


class ShortRead(OSError):
    """A store gave fewer bytes than the object has."""


def is_url(path: str) -> bool:
    """Whether a path names a protocol, as `s3://bucket` does."""
    return "://" in path and _URL.match(path) is not None


def filesystem(path: str) -> tuple[Any, str]:
    """(fsspec filesystem, the path as that filesystem spells it). Raises ClipIndexError for an unknown protocol."""
    import fsspec

    try:
        # a cached listing goes stale when other processes write, and keeps a million entries in memory
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        extra = _EXTRAS.get(path.partition("://")[0])
        hint = f" (pip install 'clip-index[{extra}]')" if extra and isinstance(error, ImportError) else ""
        raise ClipIndexError(f"cannot open {path}: {error}{hint}") from error


def call(path: str, action: Callable[[Any, str], Result]) -> Result:
    """What `action(filesystem, name)` gives. Raises OSError, with the path, when it fails for good or for too long."""
    return persist(path, lambda: action(*filesystem(path)))


def persist(path: str, action: Callable[[], Result]) -> Result:
    """What `action()` gives, tried again while its failure is one that passes; raises as `call` does."""
    pause, first = _FIRST_PAUSE_S, None
    while True:
        try:
            return action()
        except Exception as error:
            if not _passes(error):
                _raise_lasting(path, error)
            now = time.monotonic()
            first = now if first is None else first
            if now - first > _PATIENCE_S:
                raise OSError(errno.EIO, f"the store keeps failing: {_one_line(error)}", path) from error
        time.sleep(pause * random.uniform(0.5, 1))  # apart from the others that were throttled at the same moment
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _raise_lasting(path: str, error: Exception) -> NoReturn:
    """Raise what callers know: OSError with the path, or ClipIndexError for all that is not an error of files."""
    kind = _KINDS.get(_status(error) or 0, type(error))
    if issubclass(kind, _LASTING):
        number = getattr(error, "errno", None) or _NUMBERS.get(kind, errno.EINVAL)
        raise kind(number, getattr(error, "strerror", None) or _one_line(error), path) from error
    if isinstance(error, OSError) and not (error.errno and error.strerror):
        raise OSError(errno.EIO, _one_line(error), path) from error
    if isinstance(error, OSError | ClipIndexError) or type(error).__module__ == "builtins":
        raise error
    raise ClipIndexError(f"cannot open {path}: {_one_line(error)}") from error  # such as no credentials


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error tells of, or the one that it was raised from."""
    for _ in range(3):
        places = (error, getattr(error, "response", None))
        for status in (getattr(place, name, None) for place in places for name in ("status", "code", "status_code")):
            if isinstance(status, int) and status >= 300:
                return status
        error = getattr(error, "__cause__", None)
    return None


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed later. Clients raise classes of their own beside OSError."""
    if isinstance(error, _LASTING):  # some clients take whatever happens for a missing file
        return error.__cause__ is not None and _passes(error.__cause__)
    if isinstance(error, ShortRead | TimeoutError | ConnectionError):
        return True
    if not _PASSING_KINDS.isdisjoint(base.__name__ for base in type(error).__mro__):
        return not isinstance(error, OSError) or error.errno is None or error.errno in _PASSING
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, OSError) and error.errno in _PASSING


def read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, fewer only at the file's end. Raises OSError where they cannot be had."""

    def fetch(fs: Any, name: str) -> bytes:
        data = (_web_range if is_web(path) else _range)(fs, name, offset, length)
        if len(data) < length and offset + len(data) < fs.size(name):
            raise ShortRead(errno.EIO, f"{len(data)} bytes came where {length} were asked for", path)
        return data

    return call(path, fetch) if length else b""


def is_web(path: str) -> bool:
    """Whether a path is on a web server rather than in a store."""
    return path.startswith(("http://", "https://"))


def _range(fs: Any, name: str, offset: int, length: int) -> bytes:
    return fs.cat_file(name, start=offset, end=offset + length)


def _web_range(fs: Any, name: str, offset: int, length: int) -> bytes:
    """As `_range`; of a server that knows no ranges no more is taken in than the first one."""
    try:
        with fs.open(name, "rb", size=offset + length, cache_type="none") as file:
            file.seek(offset)
            return file.read(length)
    except ValueError as error:
        raise ClipIndexError(f"cannot read {name} in parts: its server does not answer range requests") from error


class RemoteFile(io.RawIOBase):
    """A remote file, seekable. Wrap it in `io.BufferedReader` for small reads."""

    def __init__(self, path: str, size: int):
        self._path, self._size = path, size
        self._position = 0
        self._last = -2
        self._blocks: dict[int, Future[bytes]] = {}

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; returns the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what one block has; 0 at the end."""
        number, start = divmod(self._position, _BLOCK)
        count = max(0, min(len(buffer), self._size - self._position, _BLOCK - start))
        if count:
            buffer[:count] = self._block(number)[start : start + count]
            self._position += count
        return count

    def _block(self, number: int) -> memoryview:
        if number != self._last:
            ahead = _AHEAD if number == self._last + 1 else 0
            wanted = range(number, min(number + 1 + ahead, -(-self._size // _BLOCK)))
            for old in [block for block in self._blocks if block not in wanted]:
                self._blocks.pop(old).cancel()
            for block in wanted:
                if block not in self._blocks:
                    length = min(_BLOCK, self._size - block * _BLOCK)
                    self._blocks[block] = _pool().submit(read_range, self._path, block * _BLOCK, length)
            self._last = number
        return memoryview(self._blocks[number].result())

    def close(self) -> None:
        """Let go of what was fetched."""
        for future in self._blocks.values():
            future.cancel()
        self._blocks.clear()
        super().close()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(16, thread_name_prefix="fetch")
