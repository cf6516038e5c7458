"""Metadata rows as Arrow columns and parquet files.

Sidecar values are whatever people wrote: a column that is an integer in one row and a text in the next becomes text.
Rows are turned into columns in blocks, so that a long shard does not hold a dict for each of its rows.
"""

from __future__ import annotations

import io
from typing import Any

from clip_index import storage

OWN = ("image_path", "caption", "key", "source", "width", "height")
_BLOCK = 4096


class Columns:
    """Rows gathered into columns; their types are settled when the file is written."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._tables: list[Any] = []

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows: dicts of str, int, float, bool or None."""
        self._rows += rows
        if len(self._rows) >= _BLOCK:
            self._settle()

    def to_parquet(self) -> bytes:
        """A parquet file with the package's own columns first, then the others by name."""
        import pyarrow as pa

        self._settle()
        names = {name for table in self._tables for name in table.column_names}
        ordered = [name for name in OWN if name in names] + sorted(names - set(OWN))
        kinds = {
            name: _common_type([table for table in self._tables if name in table.column_names], name)
            for name in ordered
        }
        schema = pa.schema([pa.field(name, kinds[name]) for name in ordered])
        parts = []
        for table in self._tables:
            arrays = [
                _cast(table[name], kinds[name]) if name in table.column_names else pa.nulls(table.num_rows, kinds[name])
                for name in ordered
            ]
            parts.append(pa.table(arrays, schema=schema))
        return to_parquet(pa.concat_tables(parts))

    def _settle(self) -> None:
        import pyarrow as pa

        if self._rows:
            names = dict.fromkeys(name for row in self._rows for name in row)
            self._tables.append(pa.table({name: _array([row.get(name) for row in self._rows]) for name in names}))
            self._rows = []


def _array(values: list[Any]) -> Any:
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.nulls(len(values))
    if kinds == {int}:
        if all(value is None or -(2**63) <= value < 2**63 for value in values):
            return pa.array(values, pa.int64())
    elif kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    elif kinds == {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # a file name that is not UTF-8 keeps its odd bytes as escapes
    return str(value).encode("utf-8", "backslashreplace").decode()


def _common_type(tables: list[Any], name: str) -> Any:
    import pyarrow as pa

    kinds = {table.schema.field(name).type for table in tables} - {pa.null()}
    if not kinds:
        return pa.string()
    if len(kinds) == 1:
        return kinds.pop()
    return pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()


def _cast(column: Any, kind: Any) -> Any:
    return column if column.type == kind else column.cast(kind)


def to_parquet(table: Any) -> bytes:
    """A table as the bytes of a parquet file, the same bytes for the same table."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=65536)
    return buffer.getvalue()


def failed_parquet(rows: list[dict[str, str]]) -> bytes:
    """The failures of a shard as a parquet file."""
    import pyarrow as pa

    return to_parquet(
        pa.table({name: pa.array([_text(row[name]) for row in rows]) for name in ("key", "source", "error")})
    )


def read_parquet(path: str, names: list[str] | None = None) -> Any:
    """A parquet file as a pyarrow Table."""
    import pyarrow.parquet as pq

    with storage.open_read(path) as file:
        return pq.ParquetFile(file).read(columns=names)


def parquet_rows(data: bytes) -> int:
    """The rows of a parquet file, read in full so that a damaged page is found."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(io.BytesIO(data)).read().num_rows
