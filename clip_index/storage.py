"""Any path, local or remote, through fsspec: list, read, write atomically.

Paths are strings: a local path, or a URL that fsspec knows (`s3://bucket/key`, `memory://folder`). Every file that the
package writes is written here, under a temporary name that ends in `.tmp`, and gets its own name when it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote_to_bytes

from clip_index import listing, remote
from clip_index.remote import filesystem as filesystem
from clip_index.types import ClipIndexError

try:
    import fcntl
except ImportError:  # Windows, where nobody removes an open file
    fcntl = None

TEMPORARY = ".tmp"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_RANGE = re.compile(r"^(.*)#(\d+)\+(\d+)$", re.DOTALL)


def is_url(path: str) -> bool:
    """Whether a path names a protocol, as `s3://bucket` does."""
    return "://" in path and _URL.match(path) is not None


def absolute(path: str | os.PathLike[str]) -> str:
    """The path with `~` and `.` resolved, without a trailing slash; URLs keep their protocol."""
    path = os.fspath(path)
    if path.startswith("file://"):
        path = path[len("file://") :]
    if is_url(path):
        return path.rstrip("/") if not path.endswith("://") else path
    return os.path.abspath(os.path.expanduser(path))


def join(base: str, *parts: str) -> str:
    """A path below a folder, always with forward slashes for URLs."""
    if is_url(base):
        return "/".join([base.rstrip("/"), *parts])
    return os.path.join(base, *parts)


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if not is_url(path):
        return os.path.exists(path)
    return listing.exists(path)


def is_folder(path: str) -> bool:
    """Whether a path is a folder (for an object store: a prefix with something below it)."""
    if not is_url(path):
        return os.path.isdir(path)
    return listing.is_folder(path)


def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    if not is_url(path):
        return os.path.getsize(path)
    length = remote.call(path, lambda fs, name: fs.size(name))
    if length is None:
        raise ClipIndexError(f"cannot read {path}: its server does not say how long it is")
    return int(length)


def read_bytes(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """A file's bytes, or `length` of them from `offset`. Raises FileNotFoundError."""
    if length == 0:
        return b""
    if is_url(path):
        if length is not None:
            return remote.read_range(path, offset, length)
        # an object store refuses a range of an empty object: ask for one only where one is meant
        return remote.call(path, lambda fs, name: fs.cat_file(name, start=offset or None))
    # a whole file needs no buffer, which would cost more than a small one
    with open(path, "rb", buffering=-1 if length else 0) as file:
        file.seek(offset)
        return file.read() if length is None else file.read(length)


def read_source(source: str) -> bytes:
    """The bytes that a metadata row's `source` names: a whole file, or `file#offset+length`."""
    found = _RANGE.match(source)
    path, offset, length = (found[1], int(found[2]), int(found[3])) if found else (source, 0, None)
    return read_bytes(source_path(path), offset, length)


def file_source(path: str) -> str:
    """The `source` of a whole file: its path, or a percent-encoded file URL where the name is not valid Unicode."""
    return path if is_unicode(path) else "file://" + quote(os.fsencode(path))


def range_source(path: str, offset: int, length: int) -> str:
    """The `source` of `length` bytes at `offset` in a file."""
    return f"{file_source(path)}#{offset}+{length}"


def source_path(source: str) -> str:
    """The path that `file_source` was given."""
    return os.fsdecode(unquote_to_bytes(source[len("file://") :])) if source.startswith("file://") else source


def is_unicode(name: str) -> bool:
    """Whether a name can be written as UTF-8; one that Python read from undecodable bytes cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """A seekable file object, buffered and read ahead. Raises FileNotFoundError."""
    if is_url(path):
        with io.BufferedReader(remote.RemoteFile(path, size(path)), 1 << 16) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def make_folder(path: str) -> None:
    """Make a folder and its parents; a no-op where folders do not exist, as on S3."""
    if not is_url(path):
        os.makedirs(path, exist_ok=True)


def list_files(folder: str, suffixes: Iterable[str] = ()) -> list[tuple[str, int]]:
    """(path relative to the folder, bytes) of every file below it, recursively, sorted by path.

    Suffixes are compared in lower case; none means all files. Folders behind symbolic links are followed, each real
    folder once, under its real name where that lies below the folder too. Hidden files and folders (a leading dot) and
    temporary files are left out. A file is not left out for being unreadable, nor is a broken symbolic link (0 bytes):
    its reader says so. Raises ClipIndexError for a folder that cannot be listed.
    """
    suffixes = tuple(suffixes)
    if is_url(folder):
        found = listing.files(folder)
    else:
        found = _list_local(folder)
    return sorted(
        (name, length)
        for name, length in found
        if (not suffixes or name.lower().endswith(suffixes)) and not name.endswith(TEMPORARY)
    )


def _list_local(folder: str) -> Iterator[tuple[str, int]]:
    seen: set[tuple[int, int]] = set()
    folders, links = [("", folder)], []
    while folders or links:
        if not folders:  # real names go before names through links, and those in order
            links.sort(reverse=True)
            folders.append(links.pop())
        prefix, path = folders.pop()
        try:
            info = os.stat(path)
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(path) as entries:  # one after the other: a million of them take 700 MB
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    try:
                        if entry.is_dir():
                            (links if entry.is_symlink() else folders).append((f"{prefix}{entry.name}/", entry.path))
                        elif entry.is_file():
                            yield f"{prefix}{entry.name}", entry.stat().st_size
                        elif entry.is_symlink() and not os.path.exists(entry.path):
                            yield f"{prefix}{entry.name}", 0
                    except OSError:
                        yield f"{prefix}{entry.name}", 0  # a symbolic link to itself, or a file that went away
        except OSError as error:
            raise ClipIndexError(f"cannot list {path}: {error.strerror}") from error


def list_names(folder: str) -> list[str]:
    """The names directly in a folder, sorted; none where the folder does not exist."""
    if not is_url(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    try:
        return sorted(listing.names(folder))
    except FileNotFoundError:
        return []


def expand(pattern: str) -> list[str]:
    """The files that a path means: braces expanded (`{00000..00003}.tar`), then globs, in that order.

    Braces keep their order, globs are sorted. Raises ClipIndexError where a glob finds nothing; a name without a glob
    is taken as it is.
    """
    import glob

    from braceexpand import UnbalancedBracesError, braceexpand

    if exists(pattern):
        return [absolute(pattern)]
    try:
        names = list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError as error:
        raise ClipIndexError(f"unbalanced braces in {pattern!r}: {error}") from error
    found: list[str] = []
    for name in names:
        if not glob.has_magic(name) or exists(name):
            found.append(absolute(name))
            continue
        if is_url(name):
            matches = remote.call(name, lambda fs, path: sorted(map(fs.unstrip_protocol, fs.glob(path))))
        else:
            matches = sorted(glob.glob(absolute(name), recursive=True))
        if not matches:
            raise ClipIndexError(f"nothing matches {name!r}: check the path, and quote it so that the shell leaves it")
        found.extend(matches)
    return found


class Spool:
    """A file being written, local and seekable at `path`; `commit` gives it its name, `discard` removes it.

    For a local target the temporary file lies beside it, so that the rename is atomic; for a remote one it lies in the
    temporary folder and is uploaded whole, which object stores make visible at once. It is locked while it is written:
    what is not was left by a process that was killed.
    """

    def __init__(self, target: str):
        self.target = target
        name = target.rsplit("/", 1)[-1] if is_url(target) else os.path.basename(target)
        folder = _spool_folder() if is_url(target) else os.path.dirname(target)
        make_folder(folder or os.curdir)
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
def exclusive(path: str) -> Iterator[None]:
    """Wait until nobody else is in such a block for the same path. Not for URLs: object stores have no locks."""
    if is_url(path) or fcntl is None:
        yield
        return
    make_folder(os.path.dirname(path))
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
    def upload(fs: Any, name: str) -> bool:
        if not replace and fs.exists(name):
            return False
        fs.put_file(path, name)
        return True

    return remote.call(target, upload)


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


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    if not is_url(path):
        Path(path).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        remote.call(path, lambda fs, name: fs.rm_file(name) if fs.exists(name) else None)


def copy_in(source: str, target_folder: str) -> str:
    """A local path with a remote file's bytes (the path itself where it is local already)."""
    if not is_url(source):
        return source
    target = os.path.join(target_folder, source.rsplit("/", 1)[-1])
    with open_read(source) as remote, open(target, "wb") as local:
        shutil.copyfileobj(remote, local, 4 << 20)
    return target


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
