"""A collection in Milvus: a typed field for each column, a vector field and its index for each modality.

Rows are streamed; Milvus Lite, which runs in this process, holds all of them in memory itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from clip_index import storage
from clip_index.exports.plain import plain, renamed, unique
from clip_index.exports.rows import Rows
from clip_index.types import ClipIndexError, UsageError

_ROWS_AT_ONCE = 256
_TEXT_BYTES = 65535
"""The longest text that a field of Milvus holds."""


def write(rows: Rows, output: str, collection: str) -> list[str]:
    """Write a new collection of a server, or of a .db file of Milvus Lite. Vectors are compared by cosine."""
    if not storage.is_url(output) and not output.endswith(".db"):
        raise UsageError(f"{output}: the format milvus writes to a server's URL, or to a new file that ends in .db")
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError:
        raise UsageError("the format milvus needs its library: pip install 'clip-index[milvus]'") from None
    ours = {"id", *(f"{name}_vector" for name in rows.modalities)}
    names = unique(rows.columns, ours, forbidden=r"^(?=\d)|[^0-9A-Za-z_]")
    cut = 0
    try:
        if not storage.is_url(output):
            os.makedirs(os.path.dirname(output), exist_ok=True)
        with _quiet(), closing(MilvusClient(output)) as client:
            if client.has_collection(collection):
                raise UsageError(f"{output} has a collection {collection!r}: name another one with --collection")
            client.create_collection(collection, schema=_schema(rows, names))
            for numbers, metadata, vectors in rows.points(_ROWS_AT_ONCE):
                points = []
                for at, (number, values) in enumerate(zip(numbers, metadata, strict=True)):
                    point = {"id": number, **dict(zip(names, map(_fitting, values.values()), strict=True))}
                    cut += any(point[name] != value for name, value in zip(names, values.values(), strict=True))
                    points.append({**point, **{f"{name}_vector": held[at] for name, held in vectors.items()}})
                client.insert(collection, points)
            client.flush(collection)
            client.create_index(collection, _indices(rows, storage.is_url(output)))
            client.load_collection(collection)
    except MilvusException as error:
        raise ClipIndexError(f"Milvus at {output} does not take the rows: {error.message}") from error
    notes = renamed(rows.columns, names)
    if cut:
        notes.append(f"rows whose texts are cut to the {_TEXT_BYTES:,} bytes that Milvus holds: {cut:,}")
    return notes


@contextmanager
def _quiet() -> Iterator[None]:
    """pymilvus writes a traceback on stderr before it raises an error."""
    loggers = [logging.getLogger(name) for name in ("pymilvus", "pymilvus.milvus_client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _schema(rows: Rows, names: list[str]) -> Any:
    import pyarrow as pa
    from pymilvus import DataType, MilvusClient

    kinds = {pa.int64(): DataType.INT64, pa.float64(): DataType.DOUBLE, pa.bool_(): DataType.BOOL}
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    for old, new in zip(rows.columns, names, strict=True):
        kind = kinds.get(plain(pa.chunked_array([], rows.schema.field(old).type)).type, DataType.VARCHAR)
        longest = {"max_length": _TEXT_BYTES} if kind == DataType.VARCHAR else {}
        schema.add_field(new, kind, nullable=True, **longest)
    for modality in rows.modalities:
        schema.add_field(f"{modality}_vector", DataType.FLOAT_VECTOR, dim=rows.dim)
    return schema


def _indices(rows: Rows, server: bool) -> Any:
    from pymilvus import MilvusClient

    indices = MilvusClient.prepare_index_params()
    for modality in rows.modalities:
        # what Milvus Lite chooses for itself is a graph that takes minutes for 100,000 rows
        kind = "AUTOINDEX" if server else "FLAT"
        indices.add_index(f"{modality}_vector", index_type=kind, metric_type="COSINE")
    return indices


def _fitting(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= _TEXT_BYTES // 4:  # of four bytes a character at most
        return value
    return value.encode()[:_TEXT_BYTES].decode(errors="ignore")
