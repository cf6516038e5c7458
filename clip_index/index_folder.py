"""An index folder to read: a marker that names every file, with its length and checksum.

A file lies under its own name or, until the writer has moved it there, in the marker's staging folder
(`clip_index.index_writer` says why).

Rows added later and rows deleted are to be files of their own, named in a marker that replaces this one: what is here
already is never rewritten, and a reader sees the state of one marker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from typing import IO, Any

from clip_index import storage
from clip_index.locations import MARKER, cache_folder
from clip_index.store import EmbeddingConfig
from clip_index.types import ClipIndexError

VERSION = 2


@dataclass(frozen=True)
class Marker:
    """What an index is: how its vectors were made, from which embeddings, and every file's bytes and SHA-256.

    `staging` is the folder below the index where the files were written, unique to a build. `obsolete` names the files
    of earlier builds that this one lacks. `search` holds the operating points, by modality and kind of query.
    """

    config: EmbeddingConfig
    rows: int
    embeddings: str
    embeddings_digest: str
    staging: str
    files: dict[str, dict[str, Any]]
    obsolete: list[str]
    search: dict[str, dict[str, dict[str, int]]]

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
                    if sha256(file) != recorded["sha256"]:
                        problems.append(f"{name} was altered: its checksum is not the marker's")
            except ClipIndexError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{name} cannot be read: {error.strerror or error}")
        return problems


def sha256(file: IO[bytes]) -> str:
    """The checksum of what is left of a file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
