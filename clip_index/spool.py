"""Files being written: under a temporary name that ends in `.tmp`, locked, until they are whole and get their own.

What is not locked was left by a process that was killed, and is removed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from clip_index import listing, remote
from clip_index.remote import is_url
from clip_index.types import ClipIndexError

try:
    import fcntl
except ImportError:  # Windows, where nobody removes an open file
    fcntl = None

TEMPORARY = ".tmp"
_OBJECT_STORES = ("s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "abfss://", "hf://")


class Spool:
    """A file being written, local and seekable at `path`; `commit` gives it its name, `discard` removes it.

    For a local target the temporary file lies beside it, so that the rename is atomic; for a remote one it lies in the
    temporary folder and is uploaded whole. Object stores make that visible at once; to others, such as HDFS, it goes
    under a temporary name, and is renamed. It is locked while it is written: what is not was left by a process that was
    killed.
    """

    def __init__(self, target: str):
        self.target = target
        name = target.rsplit("/", 1)[-1] if is_url(target) else os.path.basename(target)
        folder = _spool_folder() if is_url(target) else os.path.dirname(target)
        os.makedirs(folder or os.curdir, exist_ok=True)
        self.path = os.path.join(
            folder, f"{name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY}"
        )
        self._lock = _create_locked(self.path)

    def commit(self, *, replace: bool = True) -> bool:
        """Make the file appear under its name, whole. Without `replace`, False where there is one by that name."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        if is_url(self.target):
            done = _upload(self.path, self.target, replace)
        else:
            done = _rename(self.path, self.target, replace)
        self.discard()
        return done

    def discard(self) -> None:
        """Remove what was written so far; harmless after a commit."""
        Path(self.path).unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def open_atomic(target: str) -> Iterator[IO[bytes]]:
    """A binary file that gets its name when the block ends without an exception."""
    spool = Spool(target)
    try:
        with open(spool.path, "wb") as file:
            yield file
        spool.commit()
    finally:
        spool.discard()


def write_bytes(target: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with open_atomic(target) as file:
        file.write(data)


def write_new(target: str, data: bytes) -> bool:
    """Write a whole file atomically unless there is one: whether it was written."""
    spool = Spool(target)
    try:
        Path(spool.path).write_bytes(data)
        return spool.commit(replace=False)
    finally:
        spool.discard()


@contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Wait until nobody else is in such a block for the same path. Not for URLs: object stores have no locks."""
    if is_url(path) or fcntl is None:
        yield
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock = path + TEMPORARY
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_WRONLY, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(lock) and os.path.samestat(os.stat(lock), os.fstat(descriptor)):
            break
        os.close(descriptor)  # whoever had it removed it
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)


def remove_temporaries(folder: str) -> None:
    """Remove what killed writers left in a folder, and nothing that is being written."""
    if is_url(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.endswith(TEMPORARY):
            with contextlib.suppress(OSError):  # gone already, or open on Windows
                _remove_unlocked(os.path.join(folder, name))


def _remove_unlocked(path: str) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if _lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _create_locked(path: str) -> int | None:
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666)
        if _lock(descriptor) and os.path.exists(path):
            return descriptor
        os.close(descriptor)  # somebody tidying up was faster


def _lock(descriptor: int) -> bool:
    """Whether nobody else has the file locked; where the file system knows no locks, nobody has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@functools.cache
def _spool_folder() -> str:
    folder = os.path.join(tempfile.gettempdir(), f"clip-index-{os.getuid() if hasattr(os, 'getuid') else 'spool'}")
    remove_temporaries(folder)
    return folder


def _rename(path: str, target: str, replace: bool) -> bool:
    if not replace:
        try:
            os.link(path, target)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if os.path.exists(target):
                return False
    os.replace(path, target)
    return True


def _upload(path: str, target: str, replace: bool) -> bool:
    if remote.is_web(target):
        raise ClipIndexError(f"cannot write {target}: web servers are only read from")
    if not replace and listing.exists(target):
        return False
    at_once = target.startswith(_OBJECT_STORES)
    first = target if at_once else f"{target}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
    remote.call(first, lambda fs, name: fs.put_file(path, name))
    if not at_once:
        remote.call(target, functools.partial(_rename_remote, remote.filesystem(first)[1]))
    return True


def _rename_remote(temporary: str, fs: Any, name: str) -> None:
    if fs.exists(temporary):  # else the answer to an attempt before this one was lost
        if fs.exists(name):  # HDFS gives no file a name that is taken
            fs.rm_file(name)
        fs.mv(temporary, name)
