"""The vectors of one modality as one matrix, whatever the number of files that hold them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from clip_index import storage, store
from clip_index.types import ClipIndexError

BLOCK_ROWS = 16384


class Vectors:
    """Row i of the matrix [rows, dim] is row i of the manifest. Safe to share between threads."""

    exact = True

    def __init__(self, folder: str, manifest: store.Manifest, modality: str):
        if modality not in manifest.config.modalities:
            raise ClipIndexError(f"{folder} holds no {modality} vectors, only {', '.join(manifest.config.modalities)}")
        self.path = storage.join(folder, store.FOLDERS[modality])
        self.rows, self.dim = manifest.rows, manifest.config.dim
        self._folder, self._width, self._modality = folder, manifest.width, modality
        table = zip(manifest.ids, manifest.shard_rows, strict=True)
        self._shards = [(shard, rows) for shard, rows in table if rows]
        self._starts = np.cumsum([0, *(rows for _, rows in self._shards)], dtype=np.int64)
        # A local shard is a memory map and stays open; a remote one is held while it is read, and the one after it.
        self._open = functools.lru_cache(2 if storage.is_url(folder) else None)(self._read)

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 [up to `rows`, dim]) over the whole matrix, in order."""
        for position, (_, length) in enumerate(self._shards):
            shard, start = self._open(position), int(self._starts[position])
            for offset in range(0, length, rows):
                yield start + offset, shard[offset : offset + rows].astype(np.float32)

    def stored_blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers int64 [n], float32 [n, dim]) over the whole matrix, in the order in which it is stored."""
        for start, block in self.blocks(rows):
            yield np.arange(start, start + len(block)), block

    def take(self, rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """[n, dim] of `dtype`: the given rows in the given order, read in the order in which they are stored."""
        rows = np.asarray(rows, np.int64)
        taken = np.empty((len(rows), self.dim), dtype)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self._starts)
        for position in np.flatnonzero(np.diff(bounds)):
            wanted = order[bounds[position] : bounds[position + 1]]
            taken[wanted] = self._open(int(position))[rows[wanted] - self._starts[position]]
        return taken

    def check(self) -> None:
        """Raise ClipIndexError unless every shard's file is there with the manifest's shape. Cheap: headers only."""
        if not storage.is_url(self._folder):
            for position in range(len(self._shards)):
                self._open(position)
            return
        lengths = dict(storage.list_files(self.path, (".npy",)))
        for shard, rows in self._shards:
            name = store.shard_files(shard, self._width)[self._modality].split("/")[1]
            if lengths.get(name, 0) <= rows * self.dim * store.DTYPE.itemsize:
                raise ClipIndexError(f"{self.path}/{name} is missing or truncated: embed its shard again")

    def _read(self, position: int) -> np.ndarray:
        shard, rows = self._shards[position]
        name = storage.join(self._folder, store.shard_files(shard, self._width)[self._modality])
        try:
            vectors = store.read_vectors(self._folder, self._modality, shard, width=self._width)
        except FileNotFoundError:
            raise ClipIndexError(f"{name} is missing: run embed again") from None
        except (ValueError, EOFError) as error:
            raise ClipIndexError(f"{name} cannot be read: {error}; remove its marker and run embed again") from error
        if vectors.shape != (rows, self.dim):
            expected = (rows, self.dim)
            raise ClipIndexError(f"{name} has shape {vectors.shape}, the manifest says {expected}: run embed again")
        return vectors
