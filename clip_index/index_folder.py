"""An index folder: a marker that names every file, and a way to replace all of them at once.

1. A writer puts its files below a staging folder, where no reader looks.
2. `commit` writes the marker `clip_index.json` in one rename: from then on this is the index, read from staging.
3. The files move to their own names, and what the old index leaves behind is removed.

Killed before step 2, the old index stands; after it, readers look in both places and the next writer ends the moves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from clip_index import storage
from clip_index.locations import MARKER, cache_folder, is_index
from clip_index.store import EmbeddingConfig
from clip_index.types import ClipIndexError, UsageError

VERSION = 1
_STAGING = ".staging-"


@dataclass(frozen=True)
class Marker:
    """What an index is: how its vectors were made, from which embeddings, and every file's bytes and SHA-256.

    `staging` is the folder below the index where the files were written, unique to a build. `obsolete` names the files
    of earlier builds that this one lacks.
    """

    config: EmbeddingConfig
    rows: int
    embeddings: str
    embeddings_digest: str
    staging: str
    files: dict[str, dict[str, Any]]
    obsolete: list[str]

    def to_json(self) -> bytes:
        """The marker file's contents."""
        head = {"version": VERSION, **asdict(self.config), **{k: v for k, v in asdict(self).items() if k != "config"}}
        return (json.dumps(head, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")

    @classmethod
    def load(cls, folder: str) -> Marker:
        """Read a folder's marker. Raises ClipIndexError where there is none or it cannot be understood."""
        path = storage.join(folder, MARKER)
        try:
            data = json.loads(storage.read_bytes(path))
            if data["version"] != VERSION:
                raise ClipIndexError(f"{path} has format version {data['version']}, this release reads {VERSION}")
            config = {name: data[name] for name in EmbeddingConfig.__dataclass_fields__}
            rest = {name: data[name] for name in cls.__dataclass_fields__ if name != "config"}
            return cls(EmbeddingConfig(**{**config, "modalities": tuple(config["modalities"])}), **rest)
        except (FileNotFoundError, NotADirectoryError):
            raise ClipIndexError(f"no index in {folder}: make one with `clip-index build-index`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ClipIndexError(f"{path} is not an index's marker: {error!r}; build the index again") from error


class IndexFolder:
    """An index to read. Raises ClipIndexError for a file that is missing, truncated or of another build."""

    def __init__(self, folder: str):
        self.folder = storage.absolute(folder)
        self.marker = Marker.load(self.folder)

    def has(self, name: str) -> bool:
        """Whether the index has a file of that name."""
        return name in self.marker.files

    def find(self, name: str) -> str:
        """Where a file is: under its own name, or still in staging. Its length is compared with the marker's."""
        found = None
        for _ in range(2):  # it may move between the two looks
            for path in (storage.join(self.folder, self.marker.staging, name), storage.join(self.folder, name)):
                with contextlib.suppress(FileNotFoundError):
                    found = storage.size(path)
                    if found == self.marker.files[name]["bytes"]:
                        return path
        expected = self.marker.files[name]["bytes"]
        what = "is missing" if found is None else f"has {found} bytes, its marker says {expected}"
        raise ClipIndexError(f"{storage.join(self.folder, name)} {what}: build the index again")

    def local(self, name: str) -> str:
        """A local path of a file, fetched into the cache where the index is remote."""
        if not storage.is_url(self.folder):
            return self.find(name)
        place = hashlib.sha256(self.folder.encode()).hexdigest()[:16]
        target = os.path.join(cache_folder(), "indices", place, self.marker.staging, *name.split("/"))
        if not (os.path.exists(target) and os.path.getsize(target) == self.marker.files[name]["bytes"]):
            with storage.open_read(self.find(name)) as remote, storage.open_atomic(target) as local:
                shutil.copyfileobj(remote, local, 4 << 20)
        return target

    def check_current(self) -> None:
        """Raise ClipIndexError where the index was replaced since this object read its marker."""
        if Marker.load(self.folder).staging != self.marker.staging:
            raise ClipIndexError(f"{self.folder} was rebuilt since it was opened: open it again")

    def verify(self) -> list[str]:
        """What is wrong with the index, a line each: every byte of every file is read."""
        problems = []
        for name, recorded in self.marker.files.items():
            try:
                with storage.open_read(self.find(name)) as file:
                    if _sha256(file) != recorded["sha256"]:
                        problems.append(f"{name} was altered: its checksum is not the marker's")
            except ClipIndexError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{name} cannot be read: {error.strerror or error}")
        return problems


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

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def path(self, name: str) -> str:
        """Where to write a file of the index: a local path, its folder made."""
        path = os.path.join(self.local, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file of the index."""
        with _writing(self.folder), open(self.path(name), "wb") as file:
            file.write(data)

    def commit(self, config: EmbeddingConfig, *, rows: int, embeddings: str, embeddings_digest: str) -> Marker:
        """Make what was written the index: all of it or, if killed, nothing."""
        with _writing(self.folder):
            names = sorted(name for name, _ in storage.list_files(self.local))
            files = {name: _record(os.path.join(self.local, name)) for name in names}
            if storage.is_url(self.folder):
                self._upload(names)
            obsolete = sorted(set(self._old.files if self._old else ()) - set(names))
            marker = Marker(config, rows, embeddings, embeddings_digest, self._staging, files, obsolete)
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
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": _sha256(file)}


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


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
        raise ClipIndexError(f"cannot write to {folder}: {error.strerror or error}; what was there stands") from error
