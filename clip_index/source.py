"""The embeddings that an index is built from: a folder of ours, or one that other programs wrote.

A folder without `manifest.json` is taken as clip-retrieval and autofaiss know it: `img_emb/` and `text_emb/`, or the
folder itself, hold .npy files of float16 or float32 rows; `metadata/`, or the folder itself, parquet files of as many
rows, in the order of their names. Rows of any length are scaled to unit length when they are read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clip_index import storage, store
from clip_index.metadata import metadata_files
from clip_index.store import EmbeddingConfig, Manifest
from clip_index.types import ClipIndexError, UsageError, normalize
from clip_index.vectors import BLOCK_ROWS, Vectors

_UNIT = 4e-3


@dataclass(frozen=True)
class Source:
    """Embeddings to index. `tables` are the metadata files, relative to the folder, with `table_rows` rows each."""

    folder: str
    config: EmbeddingConfig
    rows: int
    digest: str
    matrices: dict[str, Vectors]
    tables: list[str]
    table_rows: list[int]


def open_source(folder: str, model: str | None) -> Source:
    """Open a folder of embeddings; `model` names the encoder of one without a manifest. Raises ClipIndexError."""
    if storage.exists(storage.join(folder, "manifest.json")):
        return _ours(folder, model)
    return _others(folder, model)


def _ours(folder: str, model: str | None) -> Source:
    manifest = Manifest.load(folder)
    if model is not None and model != manifest.config.encoder:
        raise UsageError(f"{folder} was embedded with {manifest.config.encoder}: leave --model {model} out")
    if not manifest.complete:
        missing = manifest.tasks - len(manifest.ids)
        raise ClipIndexError(f"{folder} lacks {missing} of {manifest.tasks} shards: run embed again")
    matrices = {name: Vectors(folder, manifest, name) for name in manifest.config.modalities}
    for vectors in matrices.values():
        vectors.check()
    rows = [rows for rows in manifest.shard_rows if rows]
    return Source(folder, manifest.config, manifest.rows, manifest.digest, matrices, metadata_files(manifest), rows)


def _others(folder: str, model: str | None) -> Source:
    if storage.is_url(folder):
        raise ClipIndexError(f"no embeddings in {folder}: manifest.json is missing; copy other folders here first")
    matrices: dict[str, Vectors] = {}
    for modality, name in store.FOLDERS.items():
        if files := _files(folder, name, ".npy"):
            matrices[modality] = OthersVectors(storage.join(folder, name), files)
    if not matrices and (files := _files(folder, "", ".npy")):
        matrices["image"] = OthersVectors(folder, files)
    if not matrices:
        raise ClipIndexError(f"no embeddings in {folder}: manifest.json is missing, and there are no .npy files")
    shapes = {name: (vectors.rows, vectors.dim) for name, vectors in matrices.items()}
    if len(set(shapes.values())) > 1:
        raise ClipIndexError(f"{folder} has {shapes['image']} image and {shapes['text']} text vectors: not row by row")
    (rows, dim), *_ = shapes.values()
    tables = [f"metadata/{name}" for name in _files(folder, "metadata", ".parquet")] or _files(folder, "", ".parquet")
    table_rows = [_table_rows(storage.join(folder, name)) for name in tables]
    if tables and sum(table_rows) != rows:
        raise ClipIndexError(f"{folder} has {rows} vectors, but {sum(table_rows)} rows of metadata")
    config = EmbeddingConfig(model or "", "", "", {}, tuple(matrices), dim)
    told = [model, [(name, vectors.names) for name, vectors in matrices.items()], shapes, tables]
    digest = hashlib.sha256(json.dumps(told).encode("utf-8", "surrogatepass")).hexdigest()
    return Source(folder, config, rows, digest, matrices, tables, table_rows)


def _files(folder: str, name: str, suffix: str) -> list[str]:
    within = storage.join(folder, name) if name else folder
    return sorted(file for file in storage.list_names(within) if file.endswith(suffix))


def _table_rows(path: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ClipIndexError(f"{path} is not a parquet file: {error}") from error


class OthersVectors(Vectors):
    """The rows of .npy files, one after the other, as one matrix of unit rows."""

    def __init__(self, path: str, names: list[str]):
        self.path, self.names, self._folder = path, names, path
        self._open = functools.lru_cache(None)(self._read)
        opened = [self._open(position) for position in range(len(names))]
        self._shards = [(position, len(vectors)) for position, vectors in enumerate(opened)]
        self._starts = np.cumsum([0, *(len(vectors) for vectors in opened)], dtype=np.int64)
        self.rows, self.dim = int(self._starts[-1]), opened[0].shape[1]
        for name, vectors in zip(names, opened, strict=True):
            if vectors.shape[1] != self.dim:
                raise ClipIndexError(f"{path}/{name} has {vectors.shape[1]} dimensions, {names[0]} has {self.dim}")
        sample = super().take(np.random.default_rng(0).integers(0, max(1, self.rows), min(1000, self.rows)))
        self._unit = bool((np.abs(np.linalg.norm(sample, axis=1) - 1) < _UNIT).all())

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """As of any matrix."""
        for start, block in super().blocks(rows):
            yield start, block if self._unit else normalize(block)

    def take(self, rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """As of any matrix."""
        if self._unit:
            return super().take(rows, dtype)
        return normalize(super().take(rows)).astype(dtype)

    def _read(self, position: int) -> np.ndarray:
        path = storage.join(self.path, self.names[position])
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ClipIndexError(f"{path} cannot be read: {error}") from error
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise ClipIndexError(f"{path} holds {vectors.dtype} of shape {vectors.shape}, not rows of floats")
        return vectors
