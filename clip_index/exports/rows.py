"""The rows of an index as other engines take them, a block of a pyarrow Table at a time.

Rows that are deleted are left out. `id` is the row's number, then comes the metadata, then a float32 vector for each
modality, `image_vector` and `text_vector`. `WRITERS` is where a new engine gets its line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from clip_index import storage
from clip_index.exports.plain import plain, unique
from clip_index.index_folder import IndexFolder
from clip_index.locations import find_index
from clip_index.metadata import Metadata
from clip_index.narrow import live_rows
from clip_index.opened import open_index
from clip_index.types import ClipIndexError, UsageError

WRITERS = {name: f"clip_index.exports.{name}" for name in ("parquet", "lance", "milvus", "qdrant")}
"""Format to the module whose `write(rows, output, collection)` returns what there is to say of it."""
_BLOCK_ROWS = 16384


def export_rows(index: str, output: str, format: str, *, collection: str = "images") -> dict[str, Any]:
    """Write an index's rows for another engine; returns the output, the rows, and notes on what came out otherwise.

    `format` is "parquet", a folder of files; "lance", a Lance table; "milvus", the URL of a server or a .db file of
    Milvus Lite; or "qdrant", the URL of a server or the folder of a local one. The latter two get a new `collection`.
    Raises UsageError for an output that is there already or a library that is missing, ClipIndexError for an index
    that holds no vectors but codes of them.
    """
    if format not in WRITERS:
        raise UsageError(f"no format {format!r}: choose one of {', '.join(WRITERS)}")
    rows, output = Rows(find_index(index)), storage.absolute(output)
    write: Callable[[Rows, str, str], list[str]] = importlib.import_module(WRITERS[format]).write
    notes = write(rows, output, collection)
    return {"output": output, "format": format, "rows": rows.count, "notes": notes}


class Rows:
    """The rows of an index that are not deleted. Raises ClipIndexError where it holds codes of its vectors alone."""

    def __init__(self, index: str):
        self.folder = IndexFolder(index)
        live = live_rows(self.folder)
        marker = self.folder.marker
        self._allowed = np.ones(marker.rows, bool) if live is None else live.allowed
        self.count, self.dim, self.modalities = int(self._allowed.sum()), marker.config.dim, marker.config.modalities
        self._metadata = Metadata(self.folder.local("metadata.arrow")).table()
        self._indices = {name: open_index(self.folder, name) for name in self.modalities}
        if not all(opened.exact for opened in self._indices.values()):
            raise ClipIndexError(f"{index} holds codes of its vectors alone: build it without --index_key")
        vectors = [f"{name}_vector" for name in self.modalities]
        self.columns = unique(self._metadata.column_names, {"id", *vectors})
        """Names of the metadata's columns: `meta_` stands before one that would be taken for ours."""

    @property
    def schema(self) -> Any:
        """The pyarrow schema of every block."""
        import pyarrow as pa

        held = zip(self.columns, self._metadata.schema.types, strict=True)
        vector = pa.list_(pa.float32(), self.dim)
        ours = [(f"{name}_vector", vector) for name in self.modalities]
        return pa.schema([("id", pa.int64()), *held, *ours])

    def blocks(self) -> Iterator[Any]:
        """Tables of some rows each, in order; at most as much as a block is in memory."""
        import pyarrow as pa

        schema = self.schema
        for start in range(0, len(self._allowed), _BLOCK_ROWS):
            allowed = self._allowed[start : start + _BLOCK_ROWS]
            numbers = start + np.flatnonzero(allowed)
            if len(numbers):
                held = self._metadata.slice(start, len(allowed)).filter(pa.array(allowed))
                flat = [pa.array(opened.vectors_of(numbers).ravel()) for opened in self._indices.values()]
                vectors = [pa.FixedSizeListArray.from_arrays(values, self.dim) for values in flat]
                yield pa.table([pa.array(numbers), *held.columns, *vectors], schema=schema).combine_chunks()

    def points(self, count: int) -> Iterator[tuple[list[int], list[dict[str, Any]], dict[str, np.ndarray]]]:
        """(numbers, metadata in plain values, float32 [n, dim] by modality) of up to so many rows at a time."""
        import pyarrow as pa

        for block in self.blocks():
            for start in range(0, len(block), count):
                part = block.slice(start, count).combine_chunks()
                held = pa.table([plain(part[name]) for name in self.columns], names=self.columns)
                flat = {name: part[f"{name}_vector"].chunk(0).flatten().to_numpy() for name in self.modalities}
                vectors = {name: values.reshape(-1, self.dim) for name, values in flat.items()}
                yield part["id"].to_pylist(), held.to_pylist() or [{}] * len(part), vectors
