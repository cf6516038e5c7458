"""The on-disk format of embeddings.

1. `EmbeddingConfig` is what decides the numbers in a folder; a folder holds one of them and refuses another.
2. `Shard` is what a marker in `done/` says; `clip_index.shard_writer` writes one.
3. `Manifest` is the whole folder: the configuration and the table of shards, which maps a row to its shard.
4. `read_vectors`, `read_metadata` and `read_failed` open one shard; `clip_index.verify` checks every byte of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from clip_index import columns, storage
from clip_index.types import ClipIndexError

VERSION = 1
DTYPE = np.dtype("<f2")
FOLDERS = {"image": "img_emb", "text": "text_emb"}
_NO_FILES: dict[str, dict[str, Any]] = {}
_MARKERS_AT_ONCE = 64


@dataclass(frozen=True)
class EmbeddingConfig:
    """What decides the numbers in a folder of embeddings."""

    encoder: str
    fingerprint: str
    precision: str
    preprocess: dict[str, Any]
    modalities: tuple[str, ...]
    dim: int
    dtype: str = "float16"

    def differences(self, other: EmbeddingConfig) -> list[str]:
        """`field: mine -> other's` for every field that is not equal; the same encoder may go by another name."""
        found = []
        for name in (item.name for item in fields(self)):
            if name == "encoder" and self.fingerprint == other.fingerprint:
                continue
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "preprocess":
                keys = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
                found += [f"preprocess.{key}: {mine.get(key)} -> {theirs.get(key)}" for key in keys]
            elif mine != theirs:
                found.append(f"{name}: {mine} -> {theirs}")
        return found


@dataclass(frozen=True)
class Shard:
    """What a marker says: how many rows a task gave, and the bytes and SHA-256 of each of its files."""

    id: int
    inputs: str
    rows: int
    failed: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def shard_files(shard: int, width: int) -> dict[str, str]:
    """The names of a shard's files, relative to the folder: image, text, metadata, failed and done."""
    number = f"{shard:0{width}d}"
    return {
        "image": f"img_emb/img_emb_{number}.npy",
        "text": f"text_emb/text_emb_{number}.npy",
        "metadata": f"metadata/metadata_{number}.parquet",
        "failed": f"failed/failed_{number}.parquet",
        "done": f"done/{number}.json",
    }


def name_width(tasks: int) -> int:
    """Digits of a shard number: fixed over a folder, so that names sort in row order."""
    return max(5, len(str(max(0, tasks - 1))))


@contextlib.contextmanager
def writing(folder: str) -> Iterator[None]:
    """Turn what the operating system says of a failed write into a ClipIndexError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClipIndexError(
            f"cannot write to {folder}: {reason}; finished shards are kept, run the command again to go on"
        ) from error


class Manifest:
    """A folder of embeddings: its configuration, and the rows of each shard in order of their ids."""

    def __init__(self, config: EmbeddingConfig, shards: Iterable[Shard] = (), *, tasks: int = 0, width: int = 5):
        self.config, self.tasks, self.width = config, tasks, width
        table = sorted(shards, key=lambda shard: shard.id)
        self.ids = [shard.id for shard in table]
        self.shard_rows = [shard.rows for shard in table]
        self.shard_failed = [shard.failed for shard in table]
        self.inputs = [shard.inputs for shard in table]
        self._starts = np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)])

    @property
    def complete(self) -> bool:
        """Whether every planned task is in the table."""
        return self.ids == list(range(self.tasks))

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return int(self._starts[-1])

    @property
    def failed(self) -> int:
        """Samples that could not be embedded, in all shards."""
        return sum(self.shard_failed)

    @property
    def digest(self) -> str:
        """Identifies the folder's contents: an index says from which it was built."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def locate(self, row: int) -> tuple[int, int]:
        """(shard id, row within the shard) of a row of the whole. Raises IndexError."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not in 0..{self.rows - 1}")
        position = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.ids[position], row - int(self._starts[position])

    def to_json(self) -> bytes:
        """The file's contents; the table is kept by columns, one short line each."""
        table = {"id": self.ids, "rows": self.shard_rows, "failed": self.shard_failed, "inputs": self.inputs}
        head = {"version": VERSION, **asdict(self.config), "tasks": self.tasks, "name_width": self.width}
        head |= {"complete": self.complete, "rows": self.rows, "failed": self.failed}
        lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
        return ("{\n" + ",\n".join([*lines, ' "shards": {\n' + rows + "\n }"]) + "\n}\n").encode()

    def write(self, folder: str) -> None:
        """Write manifest.json."""
        with writing(folder):
            storage.write_bytes(storage.join(folder, "manifest.json"), self.to_json())

    def write_first(self, folder: str) -> bool:
        """Write manifest.json unless there is one: whether it was written."""
        with writing(folder):
            return storage.write_new(storage.join(folder, "manifest.json"), self.to_json())

    @classmethod
    def load(cls, folder: str) -> Manifest:
        """Read manifest.json. Raises ClipIndexError where there is none or it cannot be understood."""
        path = storage.join(folder, "manifest.json")
        try:
            data = json.loads(storage.read_bytes(path))
            if data["version"] != VERSION:
                raise ClipIndexError(f"{path} has format version {data['version']}, this release reads {VERSION}")
            known = {item.name: data[item.name] for item in fields(EmbeddingConfig)}
            config = EmbeddingConfig(**{**known, "modalities": tuple(known["modalities"])})
            table = data["shards"]
            rows = zip(table["id"], table["inputs"], table["rows"], table["failed"], strict=True)
            return cls(config, [Shard(*row) for row in rows], tasks=data["tasks"], width=data["name_width"])
        except FileNotFoundError:
            raise ClipIndexError(f"no embeddings in {folder}: manifest.json is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ClipIndexError(f"{path} is not a manifest: {error!r}") from error


def read_marker(folder: str, name: str) -> Shard | None:
    """A finished shard, None where it has no marker. Raises ClipIndexError for a marker that cannot be read."""
    path = storage.join(folder, *name.split("/"))
    try:
        return Shard(**json.loads(storage.read_bytes(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ClipIndexError(f"{path} is not a marker: {error}; remove it to embed its shard again") from error


def read_markers(folder: str, *, rank: int = 0, world: int = 1, files: bool = True) -> dict[int, Shard]:
    """The finished shards by id, from the markers alone: those of a rank, where there are several.

    Without `files` the shards know none: a million of them take 300 MB then, not 3 GB. Raises ClipIndexError for a
    marker that cannot be read.
    """
    names = [
        name
        for name in storage.list_names(storage.join(folder, "done"))
        if name.endswith(".json") and (not name[:-5].isdigit() or int(name[:-5]) % world == rank)
    ]

    def read(names: list[str]) -> list[Shard]:
        found = [read_marker(folder, f"done/{name}") for name in names]
        return [shard if files else replace(shard, files=_NO_FILES) for shard in found if shard is not None]

    blocks = [names[start : start + _MARKERS_AT_ONCE] for start in range(0, len(names), _MARKERS_AT_ONCE)]
    with ThreadPoolExecutor(16) as pool:  # the latencies of an object store or a network file system overlap
        return {shard.id: shard for block in pool.map(read, blocks) for shard in block}


def finalize(folder: str, manifest: Manifest, inputs: list[str] | None = None) -> Manifest:
    """Write the manifest over all markers, once every task has one, made from `inputs` where these are given.

    Raises ClipIndexError naming what is missing.
    """
    markers = read_markers(folder, files=False)
    missing = [task for task in range(manifest.tasks) if task not in markers]
    if missing:
        named = ", ".join(f"{task:0{manifest.width}d}" for task in missing[:10]) + (" ..." if len(missing) > 10 else "")
        raise ClipIndexError(f"{folder} lacks {len(missing)} of {manifest.tasks} shards ({named}): run embed again")
    if inputs is not None and inputs != [markers[task].inputs for task in range(manifest.tasks)]:
        raise ClipIndexError(f"another run has embedded other inputs into {folder}: stop it, and run embed again")
    shards = [markers[task] for task in range(manifest.tasks)]
    manifest = Manifest(manifest.config, shards, tasks=manifest.tasks, width=manifest.width)
    for name in [*FOLDERS.values(), "metadata", "failed", "done", ""]:
        storage.remove_temporaries(storage.join(folder, name) if name else folder)
    manifest.write(folder)
    return manifest


def read_vectors(folder: str, modality: str, shard: int, *, width: int = 5) -> np.ndarray:
    """A shard's vectors, float16 [rows, dim]; memory-mapped where the folder is local."""
    path = storage.join(folder, shard_files(shard, width)[modality])
    if storage.is_url(path):
        return np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_metadata(folder: str, shard: int, *, width: int = 5, names: list[str] | None = None) -> Any:
    """A shard's metadata as a pyarrow Table, row i belonging to vector i."""
    return columns.read_parquet(storage.join(folder, shard_files(shard, width)["metadata"]), names)


def read_failed(folder: str, shard: int, *, width: int = 5) -> Any:
    """A shard's failures as a pyarrow Table of key, source and error."""
    return columns.read_parquet(storage.join(folder, shard_files(shard, width)["failed"]))
