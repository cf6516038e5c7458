"""The `dump` command: an index for engines that serve more than one machine can."""

from __future__ import annotations

from typing import Literal

from clip_index.console import count, print_json


def dump(
    index: str,
    output: str,
    *,
    format: Literal["parquet", "lance", "qdrant"] = "parquet",
    collection: str = "images",
    json: bool = False,
) -> None:
    """Write an index's vectors and metadata for another engine.

    Each row has its number as `id`, the columns of its metadata, and a float32 vector for each modality.

    Examples:
        clip-index dump index/ rows/
        clip-index dump index/ images.lance --format lance
        clip-index dump index/ http://localhost:6333 --format qdrant --collection images

    Args:
        index: the folder that `clip-index build-index` wrote
        output: a new folder, local or a URL; for qdrant a server's URL, or a folder of its local mode
        format: parquet files, a Lance table, or a collection in Qdrant
        collection: the collection that Qdrant makes of it
        json: print one JSON document
    """
    from clip_index import dumps, storage

    rows = dumps.dump(index, output, format, collection=collection)
    if json:
        print_json({"output": storage.absolute(output), "rows": rows})
    else:
        print(f"{output}: {count(rows, 'row')}")
