"""The metadata of an index as one uncompressed Arrow file, memory-mapped: row i belongs to vector i.

1. `write_metadata` settles one schema over all shards, since sidecar columns differ from shard to shard.
2. It copies the shards' rows, in order, into record batches of a fixed length.
3. `Metadata` finds a row's batch by division and reads no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from clip_index import storage, store
from clip_index.columns import OWN
from clip_index.types import ClipIndexError

BATCH_ROWS = 65536
_FEW_ROWS = 64


def metadata_files(manifest: store.Manifest) -> list[str]:
    """The metadata files of the shards that have rows, relative to the folder, in row order."""
    table = zip(manifest.ids, manifest.shard_rows, strict=True)
    return [store.shard_files(shard, manifest.width)["metadata"] for shard, rows in table if rows]


def write_metadata(folder: str, manifest: store.Manifest, target: str) -> None:
    """Write the rows of all shards to a local Arrow file. Raises ClipIndexError where a shard lacks rows."""
    write_tables(folder, metadata_files(manifest), [rows for rows in manifest.shard_rows if rows], target)


def write_keys(rows: int, target: str) -> None:
    """Write metadata for rows of which nothing is known: the number of each as its key."""
    import pyarrow as pa

    schema = pa.schema([("key", pa.string())])
    with pa.OSFile(target, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, rows, BATCH_ROWS):
            keys = [str(row) for row in range(start, min(rows, start + BATCH_ROWS))]
            writer.write_batch(pa.record_batch([pa.array(keys, pa.string())], schema=schema))


def write_tables(folder: str, names: list[str], lengths: list[int], target: str) -> None:
    """Write the rows of parquet files, named relative to the folder, of given numbers of rows, to a local Arrow file.

    A column that some shards lack is null there; one with numbers in one shard and text in another becomes text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [storage.join(folder, *name.split("/")) for name in names]
    schemas = []
    for path, rows in zip(paths, lengths, strict=True):
        try:
            with storage.open_read(path) as file:
                parquet = pq.ParquetFile(file)
                schemas.append(parquet.schema_arrow)
                found = parquet.metadata.num_rows
        except FileNotFoundError:
            raise ClipIndexError(f"{path} is missing: run embed again") from None
        except pa.ArrowInvalid as error:
            raise ClipIndexError(f"{path} is not a parquet file: {error}; embed its shard again") from error
        if found != rows:
            raise ClipIndexError(f"{path} has {found} rows, the manifest says {rows}: run embed again")
    schema = _common_schema(schemas)
    with pa.OSFile(target, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        pending = schema.empty_table()
        for path in paths:
            with storage.open_read(path) as file:
                table = pq.ParquetFile(file).read()
            pending = pa.concat_tables([pending, _conform(table, schema)])
            while pending.num_rows >= BATCH_ROWS:
                writer.write_batch(_batch(pending.slice(0, BATCH_ROWS)))
                pending = pending.slice(BATCH_ROWS)
        if pending.num_rows:
            writer.write_batch(_batch(pending))


def _common_schema(schemas: Iterable[Any]) -> Any:
    import pyarrow as pa

    kinds: dict[str, list[Any]] = {}
    for schema in schemas:
        for column in schema:
            kinds.setdefault(column.name, []).append(pa.schema([("", column.type)]))
    names = [name for name in OWN if name in kinds] + sorted(kinds.keys() - set(OWN))
    fields = []
    for name in names:
        try:
            kind = pa.unify_schemas(kinds[name], promote_options="permissive").field(0).type
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            kind = pa.string()
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def _conform(table: Any, schema: Any) -> Any:
    import pyarrow as pa

    columns = [
        # an integer beyond 2**53 loses its last digits where another shard has fractions in that column
        table[field.name].cast(field.type, safe=False)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _batch(table: Any) -> Any:
    return table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS)[0]


class Metadata:
    """The rows of an Arrow file that `write_metadata` wrote. Safe to share between threads."""

    def __init__(self, path: str):
        import pyarrow as pa

        with pa.memory_map(path) as source:  # the batches keep the mapping
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(position) for position in range(reader.num_record_batches)]
        self._schema = reader.schema
        self.names: list[str] = reader.schema.names
        self.rows = sum(batch.num_rows for batch in self._batches)

    def table(self) -> Any:
        """All rows as a pyarrow Table over the mapped file: nothing is read before it is used."""
        import pyarrow as pa

        return pa.Table.from_batches(self._batches, self._schema)

    def take(self, rows: Iterable[int], names: list[str] | None = None) -> list[dict[str, Any]]:
        """The given rows as dicts, in the given order; all columns, or those named. NaN becomes None, as in JSON."""
        import pyarrow as pa

        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return []
        batches, offsets = np.divmod(rows, BATCH_ROWS)
        order = np.argsort(rows, kind="stable")
        taken = []
        for number in np.unique(batches):
            batch = self._batches[number]
            batch = batch if names is None else batch.select(names)
            wanted = offsets[order][batches[order] == number]
            if len(wanted) <= _FEW_ROWS:  # `take` would import pyarrow.compute, some 70 ms of a first query
                taken += [row for at in wanted.tolist() for row in batch.slice(at, 1).to_pylist()]
                continue
            # pa.array would import pandas, a third of a second
            indices = pa.Array.from_buffers(pa.int64(), len(wanted), [None, pa.py_buffer(wanted)])
            taken += batch.take(indices).to_pylist()
        found: list[dict[str, Any]] = [{}] * len(rows)
        for position, row in zip(order, taken, strict=True):
            found[position] = {name: _finite(value) for name, value in row.items()}
        return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
