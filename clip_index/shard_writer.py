"""Writing one shard of embeddings: vectors and metadata first, the marker in `done/` last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from clip_index import columns, storage
from clip_index.markers import Shard, read_marker, shard_files
from clip_index.store import DTYPE, EmbeddingConfig, writing
from clip_index.types import ClipIndexError, Task


class EmbeddingWriter:
    """One shard being written, row by row; nothing has its own name before `commit`, and the marker comes last."""

    def __init__(self, folder: str, task: Task, config: EmbeddingConfig, *, width: int = 5):
        self.folder, self.task, self.config = folder, task, config
        self._names = shard_files(task.id, width)
        self._vectors: dict[str, tuple[storage.Spool, IO[bytes]]] = {}
        self._metadata = columns.Columns()
        self._failed: list[dict[str, str]] = []
        self.rows = 0

    @property
    def failed(self) -> int:
        """Samples recorded as failed so far."""
        return len(self._failed)

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for spool, file in self._vectors.values():
            with contextlib.suppress(OSError):  # a full disk refuses the last buffer too
                file.close()
            spool.discard()

    def append(self, vectors: dict[str, np.ndarray], rows: list[dict[str, Any]]) -> None:
        """Add rows: for each modality float32 [n, dim] of unit rows, and n dicts of metadata."""
        for modality in self.config.modalities:
            block = vectors[modality]
            if block.shape != (len(rows), self.config.dim):
                expected = (len(rows), self.config.dim)
                raise ValueError(f"{modality} vectors have shape {block.shape}, expected {expected}")
        if not rows:
            return
        with writing(self.folder):
            for modality in self.config.modalities:
                self._file(modality).write(np.ascontiguousarray(vectors[modality], DTYPE).tobytes())
        self._metadata.append(rows)
        self.rows += len(rows)

    def fail(self, key: str, source: str, error: str) -> None:
        """Record a sample that could not be embedded."""
        self._failed.append({"key": key, "source": source, "error": error})

    def commit(self) -> Shard:
        """Give every file its name, then write the marker. An empty shard has a marker alone.

        Where another run was faster, its files stay. Raises ClipIndexError where it had other inputs.
        """
        with writing(self.folder):
            tables = {}
            if self.rows:
                tables["metadata"] = self._metadata.to_parquet()
            if self._failed:
                tables["failed"] = columns.failed_parquet(self._failed)
            files = {self._names[modality]: self._settle(*held) for modality, held in self._vectors.items()}
            files |= {self._names[kind]: _describe(data) for kind, data in tables.items()}
            shard = Shard(self.task.id, self.task.digest, self.rows, self.failed, files)
            with storage.exclusive(self._path("done")):
                if not self._is_there(shard):
                    self._name_files(shard, tables)
        return shard

    def _name_files(self, shard: Shard, tables: dict[str, bytes]) -> None:
        for spool, _ in self._vectors.values():
            spool.commit()
        for kind, data in tables.items():
            storage.write_bytes(self._path(kind), data)
        for name in self._names.values():
            if name not in shard.files:
                storage.remove(storage.join(self.folder, name))
        storage.write_bytes(self._path("done"), _to_json(asdict(shard)))

    def _is_there(self, shard: Shard) -> bool:
        existing = read_marker(self._path("done"))
        if existing == shard:
            return True
        if existing is not None:
            if existing.inputs != shard.inputs:
                raise ClipIndexError(f"another run embeds other inputs into {self.folder}: stop one of the two")
            storage.remove(self._path("done"))
        return False

    def _settle(self, spool: storage.Spool, file: IO[bytes]) -> dict[str, Any]:
        file.seek(0)
        _write_header(file, self.rows, self.config.dim)
        file.close()
        with open(spool.path, "rb") as written:
            digest = hashlib.file_digest(written, "sha256") if hasattr(hashlib, "file_digest") else _digest(written)
            return {"bytes": written.seek(0, os.SEEK_END), "sha256": digest.hexdigest()}

    def _file(self, modality: str) -> IO[bytes]:
        if modality not in self._vectors:
            spool = storage.Spool(self._path(modality))
            file = open(spool.path, "wb")  # noqa: SIM115 - closed in commit or __exit__
            self._vectors[modality] = spool, file
            _write_header(file, 0, self.config.dim)
        return self._vectors[modality][1]

    def _path(self, kind: str) -> str:
        return storage.join(self.folder, *self._names[kind].split("/"))


def _describe(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(file: IO[bytes]) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _write_header(file: IO[bytes], rows: int, dim: int) -> None:
    # numpy pads the header so that its length does not depend on the number of rows: it can be rewritten in place.
    header = {"descr": DTYPE.str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(file, header)


def _to_json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
