"""An index folder to write: all of its files are replaced at once, or none is.

1. A writer puts its files below a staging folder, where no reader looks.
2. `commit` writes the marker `clip_index.json` in one rename: from then on this is the index, read from staging.
3. The files move to their own names, and what the old index leaves behind is removed.

Killed before step 2, the old index stands; after it, readers look in both places and the next writer ends the moves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clip_index import storage
from clip_index.index_folder import Marker, sha256
from clip_index.locations import MARKER, is_index
from clip_index.store import EmbeddingConfig
from clip_index.types import ClipIndexError, UsageError

_STAGING = ".staging-"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class IndexWriter:
    """A new index in the making; the folder's old index, if any, serves until `commit` and is replaced by it.

    Used in a `with` block, which removes what an exception left. One writer at a time: a second one is refused where
    the folder is local, and must not be started where it is remote.
    """

    def __init__(self, folder: str):
        self.folder = storage.absolute(folder)
        self._staging = _STAGING + uuid.uuid4().hex
        self._cleanup = contextlib.ExitStack()
        self._old: Marker | None = None
        self.local = storage.join(self.folder, self._staging)

    def __enter__(self) -> IndexWriter:
        with contextlib.ExitStack() as stack, _writing(self.folder):
            storage.make_folder(self.folder)
            stack.enter_context(_lock(self.folder))
            _settle(self.folder)
            self._old = Marker.load(self.folder) if is_index(self.folder) else None
            self._refuse_strangers()
            if storage.is_url(self.folder):
                self.local = stack.enter_context(tempfile.TemporaryDirectory(prefix="clip-index-"))
            else:
                os.mkdir(self.local)
                stack.callback(shutil.rmtree, self.local, ignore_errors=True)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._cleanup.close()
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise _cannot_write(self.folder, error) from error

    def path(self, name: str) -> str:
        """Where to write a file of the index: a local path, its folder made."""
        path = os.path.join(self.local, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file of the index."""
        with _writing(self.folder), open(self.path(name), "wb") as file:
            file.write(data)

    def carry(self, source: str, name: str) -> None:
        """Have a file from elsewhere as `name`: the same file by another name where that is possible, else a copy."""
        if not storage.is_url(source):
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link(source, self.path(name))
                return
        with storage.open_read(source) as read, open(self.path(name), "wb") as written:
            shutil.copyfileobj(read, written, 4 << 20)

    def commit(
        self, config: EmbeddingConfig, *, rows: int, embeddings: str, embeddings_digest: str, search: dict[str, Any]
    ) -> Marker:
        """Make what was written the index: all of it or, if killed, nothing."""
        with _writing(self.folder):
            names = sorted(name for name, _ in storage.list_files(self.local))
            files = {name: _record(os.path.join(self.local, name)) for name in names}
            if storage.is_url(self.folder):
                self._upload(names)
            obsolete = sorted(set(self._old.files if self._old else ()) - set(names))
            marker = Marker(config, rows, embeddings, embeddings_digest, self._staging, files, obsolete, search)
            storage.write_bytes(storage.join(self.folder, MARKER), marker.to_json())
            _settle(self.folder)
        return marker

    def _refuse_strangers(self) -> None:
        """Other people's files in the folder would be lost or, as metadata, be taken for this index's rows."""
        known = self._old.files if self._old else ()
        metadata = [f"metadata/{name}" for name in storage.list_names(storage.join(self.folder, "metadata"))]
        for name in [*metadata, "image.index", "text.index"]:
            if name not in known and storage.exists(storage.join(self.folder, name)):
                raise UsageError(f"{self.folder} has a {name} that is not of an index made here: choose another folder")

    def _upload(self, names: list[str]) -> None:
        fs, root = storage.filesystem(storage.join(self.folder, self._staging))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: fs.put_file(os.path.join(self.local, name), f"{root}/{name}"), names))
        fs.invalidate_cache()


def _record(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256(file)}


def _settle(folder: str) -> None:
    """Move the current index's files to their own names; remove what belongs to earlier or unfinished ones."""
    if is_index(folder):
        marker = Marker.load(folder)
        staged = storage.join(folder, marker.staging)
        for name, _ in storage.list_files(staged) if storage.exists(staged) else ():
            _move(storage.join(staged, name), storage.join(folder, name))
        for name in marker.obsolete:
            storage.remove(storage.join(folder, name))
    for name in storage.list_names(folder):
        if name.startswith(_STAGING):
            _remove_folder(storage.join(folder, name))
    storage.remove_temporaries(folder)


def _move(source: str, target: str) -> None:
    if storage.is_url(target):
        fs, name = storage.filesystem(source)
        fs.mv(name, storage.filesystem(target)[1])
        fs.invalidate_cache()
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)


def _remove_folder(path: str) -> None:
    if storage.is_url(path):
        fs, name = storage.filesystem(path)
        fs.rm(name, recursive=True)
        fs.invalidate_cache()
    else:
        shutil.rmtree(path)


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    """Hold the folder for one writer; the system lets go of it when the process ends, however it ends."""
    if storage.is_url(folder):
        yield
        return
    import fcntl

    with open(os.path.join(folder, ".lock"), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClipIndexError(f"another process is writing {folder}: wait until it ends") from None
        yield


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: str, error: OSError) -> ClipIndexError:
    return ClipIndexError(f"cannot write to {folder}: {error.strerror or error}; what was there stands")
