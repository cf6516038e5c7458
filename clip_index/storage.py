"""Any path, local or remote, through fsspec: list, read, write atomically.

Paths are strings: a local path, or a URL that fsspec knows (`s3://bucket/key`, `memory://folder`). Every file that the
package writes gets its name when it is whole (`clip_index.spool`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote_to_bytes

from clip_index import listing, remote
from clip_index.remote import filesystem as filesystem
from clip_index.remote import is_url as is_url
from clip_index.spool import TEMPORARY as TEMPORARY
from clip_index.spool import Spool as Spool
from clip_index.spool import exclusive as exclusive
from clip_index.spool import open_atomic as open_atomic
from clip_index.spool import remove_temporaries as remove_temporaries
from clip_index.spool import write_bytes as write_bytes
from clip_index.spool import write_new as write_new
from clip_index.types import ClipIndexError

_RANGE = re.compile(r"^(.*)#(\d+)\+(\d+)$", re.DOTALL)


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


def _glob(url: str, fs: Any, path: str) -> list[str]:
    """What a pattern matches, as URLs of the same protocol and host."""
    if not url.endswith(path):
        return [fs.unstrip_protocol(match) for match in fs.glob(path)]
    return [url.removesuffix(path) + match for match in fs.glob(path)]


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


def list_sizes(folder: str) -> Iterator[tuple[str, int]]:
    """(name, bytes) of what lies directly in a folder, in no order; nothing where the folder does not exist."""
    if is_url(folder):
        with contextlib.suppress(FileNotFoundError):
            yield from ((name, size) for name, size in listing.files(folder) if "/" not in name)
    elif os.path.isdir(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    yield entry.name, entry.stat().st_size
                except FileNotFoundError:
                    continue  # another process has removed it


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
            matches = sorted(remote.call(name, functools.partial(_glob, name)))
        else:
            matches = sorted(glob.glob(absolute(name), recursive=True))
        if not matches:
            raise ClipIndexError(f"nothing matches {name!r}: check the path, and quote it so that the shell leaves it")
        found.extend(matches)
    return found


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
