"""An index as other engines take it: rows with their vectors and metadata, in parquet, as a Lance table, in Qdrant.

Each writes the rows that are not deleted, a block at a time: `id` is the row's number, then the metadata, then a
float32 vector for each modality, `image_vector` and `text_vector`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from clip_index import columns, storage
from clip_index.index_folder import IndexFolder
from clip_index.locations import find_index
from clip_index.metadata import Metadata
from clip_index.narrow import live_rows
from clip_index.opened import open_index
from clip_index.types import ClipIndexError, UsageError

_BLOCK_ROWS = 65536
_POINTS_AT_ONCE = 256


def dump(index: str, output: str, kind: str = "parquet", *, collection: str = "images") -> int:
    """Write an index's rows for another engine; returns how many.

    `kind` is "parquet", a folder of files; "lance", a Lance table; or "qdrant", the URL of a server or the folder of
    a local one, whose new `collection` gets the rows. Raises UsageError for an output that is there already or a
    library that is missing.
    """
    if kind not in WRITERS:
        raise UsageError(f"no format {kind!r}: choose one of {', '.join(WRITERS)}")
    rows = _Rows(find_index(index))
    WRITERS[kind](rows, storage.absolute(output), collection)
    return rows.count


class _Rows:
    """The rows of an index, a block of a pyarrow Table at a time."""

    def __init__(self, index: str):
        folder = IndexFolder(index)
        live = live_rows(folder)
        self.numbers = np.arange(folder.marker.rows) if live is None else np.flatnonzero(live.allowed)
        self.count, self.dim = len(self.numbers), folder.marker.config.dim
        self.modalities = folder.marker.config.modalities
        self._metadata = Metadata(folder.local("metadata.arrow")).table()
        self._indices = {name: open_index(folder, name) for name in self.modalities}
        if not all(opened.exact for opened in self._indices.values()):
            raise ClipIndexError(f"{index} holds codes of its vectors alone: build it without --index_key")

    def blocks(self, rows: int = _BLOCK_ROWS) -> Iterator[Any]:
        """Tables of up to so many rows."""
        import pyarrow as pa

        for start in range(0, self.count, rows):
            numbers = self.numbers[start : start + rows]
            table = self._metadata.take(pa.array(numbers)).add_column(0, "id", pa.array(numbers))
            for name, opened in self._indices.items():
                flat = pa.array(opened.vectors_of(numbers).ravel())
                table = table.append_column(f"{name}_vector", pa.FixedSizeListArray.from_arrays(flat, self.dim))
            yield table.combine_chunks()


def _write_parquet(rows: _Rows, output: str, _: str) -> None:
    if storage.list_names(output):
        raise UsageError(f"{output} is not empty: name a new folder")
    for number, table in enumerate(rows.blocks()):
        storage.write_bytes(storage.join(output, f"rows_{number:05d}.parquet"), columns.to_parquet(table))


def _write_lance(rows: _Rows, output: str, _: str) -> None:
    try:
        import lance
    except ImportError:
        raise UsageError("the format lance needs its library: pip install 'clip-index[lance]'") from None
    if storage.list_names(output):
        raise UsageError(f"{output} is not empty: name a new folder")
    for number, table in enumerate(rows.blocks()):
        lance.write_dataset(table, output, mode="append" if number else "create")


def _write_qdrant(rows: _Rows, output: str, collection: str) -> None:
    try:
        from qdrant_client import QdrantClient, models
    except ImportError:
        raise UsageError("the format qdrant needs its library: pip install 'clip-index[qdrant]'") from None
    client = QdrantClient(url=output) if storage.is_url(output) else QdrantClient(path=output)
    try:
        if client.collection_exists(collection):
            raise UsageError(f"{output} has a collection {collection!r}: name another one with --collection")
        sizes = {name: models.VectorParams(size=rows.dim, distance=models.Distance.COSINE) for name in rows.modalities}
        client.create_collection(collection, vectors_config=sizes)
        for table in rows.blocks(_POINTS_AT_ONCE):
            vectors = {name: table[f"{name}_vector"].to_pylist() for name in rows.modalities}
            payload = table.drop_columns(["id", *(f"{name}_vector" for name in rows.modalities)]).to_pylist()
            points = [
                models.PointStruct(id=number, vector={name: held[at] for name, held in vectors.items()}, payload=meta)
                for at, (number, meta) in enumerate(zip(table["id"].to_pylist(), payload, strict=True))
            ]
            client.upsert(collection, points)
    finally:
        client.close()


WRITERS: dict[str, Callable[[_Rows, str, str], None]] = {
    "parquet": _write_parquet,
    "lance": _write_lance,
    "qdrant": _write_qdrant,
}
