"""The on-disk format of embeddings.

1. `EmbeddingConfig` is what decides the numbers in a folder; a folder holds one of them and refuses another.
2. A shard is finished when it has a marker (`clip_index.markers`); `clip_index.shard_writer` writes one.
3. `Manifest` is the whole folder: the configuration and the table of shards, which maps a row to its shard.
4. `read_vectors`, `read_metadata` and `read_failed` open one shard; `clip_index.verify` checks every byte of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from clip_index import columns, storage
from clip_index.markers import KINDS, Shard, ShardTable, read_markers, shard_files, wrong_files
from clip_index.types import ClipIndexError

VERSION = 1
DTYPE = np.dtype("<f2")
FOLDERS = {"image": "img_emb", "text": "text_emb"}
_NAMED = 10
"""Shards that an error names; of more it says that there are more."""


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

    def __init__(self, config: EmbeddingConfig, table: ShardTable | None = None, *, tasks: int = 0, width: int = 5):
        self.config, self.tasks, self.width = config, tasks, width
        table = ShardTable() if table is None else table
        self.ids, self.shard_rows, self.shard_failed = (c.tolist() for c in (table.ids, table.rows, table.failed))
        self.inputs = [told.decode() for told in table.inputs]
        self._starts = np.concatenate([[0], np.cumsum(table.rows)])

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
            shards = ShardTable(Shard(*row) for row in rows)
            return cls(config, shards, tasks=data["tasks"], width=data["name_width"])
        except FileNotFoundError:
            raise ClipIndexError(f"no embeddings in {folder}: manifest.json is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ClipIndexError(f"{path} is not a manifest: {error!r}") from error


def finalize(folder: str, manifest: Manifest, inputs: Iterable[bytes] | None = None) -> Manifest:
    """Write the manifest over all markers, once every task has one and every file is there in the size that it says.

    `inputs`, where given, are the digests that the markers must have, in order of the tasks. Raises ClipIndexError
    naming what is missing or wrong; whether the contents are right, `clip_index.verify` says.
    """
    config, tasks, width = manifest.config, manifest.tasks, manifest.width
    table = ShardTable(read_markers(folder), width=width)
    places = table.positions(np.arange(tasks))
    missing = np.flatnonzero(places < 0).tolist()
    if missing:
        raise ClipIndexError(
            f"{folder} lacks {len(missing)} of {tasks} shards ({_some(missing, width)}): run embed again"
        )
    if len(table) > tasks:
        table = table.select(places)
    if inputs is not None and any(had != wanted for had, wanted in zip(table.inputs, inputs, strict=True)):
        raise ClipIndexError(f"another run has embedded other inputs into {folder}: stop it, and run embed again")
    options = {"modalities": config.modalities, "row_bytes": config.dim * DTYPE.itemsize}
    wrong = list(wrong_files(folder, table, width=width, **options))
    if wrong:
        shards = sorted({shard for shard, _ in wrong})
        told = "; ".join(what for _, what in wrong[:_NAMED]) + ("; ..." if len(wrong) > _NAMED else "")
        raise ClipIndexError(
            f"{folder} has markers of files that are not as they say: {told}; remove the markers from done/ "
            f"({_some(shards, width)}), and run embed again"
        )
    manifest = Manifest(config, table, tasks=tasks, width=width)
    for name in [*KINDS.values(), "done", ""]:
        storage.remove_temporaries(storage.join(folder, name) if name else folder)
    manifest.write(folder)
    return manifest


def _some(shards: list[int], width: int) -> str:
    return ", ".join(f"{shard:0{width}d}" for shard in shards[:_NAMED]) + (" ..." if len(shards) > _NAMED else "")


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
