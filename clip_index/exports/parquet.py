"""Parquet files, each of up to 262,144 rows."""

from __future__ import annotations

from itertools import chain, islice

from clip_index import storage
from clip_index.exports.rows import Rows
from clip_index.types import UsageError

_FILE_BLOCKS = 16


def write(rows: Rows, output: str, _: str) -> list[str]:
    """Write rows_00000.parquet and so on into a new folder, local or a URL."""
    import pyarrow.parquet as pq

    if storage.list_names(output):
        raise UsageError(f"{output} is not empty: name a new folder")
    blocks = rows.blocks()
    for number, first in enumerate(blocks):
        with (
            storage.open_atomic(storage.join(output, f"rows_{number:05d}.parquet")) as file,
            pq.ParquetWriter(file, rows.schema, compression="zstd") as writer,
        ):
            for block in chain([first], islice(blocks, _FILE_BLOCKS - 1)):
                writer.write_table(block)
    return []
