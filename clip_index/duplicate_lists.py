"""Near-duplicates of a whole index as two lists: the rows to keep, and the rows to drop with what is kept instead."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from clip_index import columns, storage
from clip_index.duplicates import duplicate_groups, representatives
from clip_index.index_folder import IndexFolder
from clip_index.locations import find_index
from clip_index.matrix import IndexMatrix
from clip_index.metadata import Metadata
from clip_index.narrow import live_rows
from clip_index.opened import open_index
from clip_index.types import MODALITIES, ClipIndexError, UsageError

_NAMED = ("key", "image_path", "source")
_BLOCK_ROWS = 16384


def write_duplicate_lists(
    index: str, output: str, *, threshold: float = 0.95, keep: str = "largest", modality: str | None = None
) -> dict[str, Any]:
    """Write kept.parquet and dropped.parquet into the folder `output`; returns their lengths, and the seconds taken.

    Rows of at least the cosine similarity `threshold` are joined into groups (`clip_index.duplicates`). `keep` is
    "largest", the row of a group with the largest picture, or "first". Raises UsageError or ClipIndexError.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold}: expected a similarity between 0 and 1")
    folder = IndexFolder(find_index(index))
    held = folder.marker.config.modalities
    modality = modality or next(name for name in MODALITIES if name in held)
    if modality not in held:
        raise UsageError(f"--modality {modality}: the index has {' and '.join(held)}")
    opened = open_index(folder, modality)
    if not opened.exact:
        raise ClipIndexError(f"{folder.folder} holds codes of its vectors alone: build it without --index_key")
    live = live_rows(folder)
    output = storage.absolute(output)
    started = time.perf_counter()
    metadata = Metadata(folder.local("metadata.arrow"))
    tables = _tables(IndexMatrix(opened), metadata, live and live.allowed, threshold, keep == "largest")
    for name, table in zip(("kept", "dropped"), tables, strict=True):
        storage.write_bytes(storage.join(output, f"{name}.parquet"), columns.to_parquet(table))
    kept, dropped = tables
    told = {"kept": len(kept), "dropped": len(dropped), "groups": len(dropped["kept_row"].unique())}
    return {"index": folder.folder, "output": output, **told, "seconds": time.perf_counter() - started}


def _tables(
    matrix: IndexMatrix, metadata: Metadata, allowed: np.ndarray | None, threshold: float, largest: bool
) -> tuple[Any, Any]:
    """(kept, dropped) as pyarrow tables."""
    import pyarrow as pa

    groups = duplicate_groups(matrix, threshold, allowed=allowed)
    table = metadata.table()
    area = None
    if largest and {"width", "height"} <= set(metadata.names):
        sizes = [table[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width", "height")]
        area = sizes[0] * sizes[1]
    kept = representatives(groups, area)
    rows = np.arange(len(groups))
    stays = kept == rows if allowed is None else (kept == rows) & allowed
    goes = np.flatnonzero(kept != rows)
    named = table.select([name for name in _NAMED if name in metadata.names])
    similarity = np.empty(len(goes), np.float32)
    for start in range(0, len(goes), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        pair = matrix.take(goes[part]), matrix.take(kept[goes[part]])
        similarity[part] = np.einsum("nd,nd->n", *pair)
    members = np.bincount(kept, minlength=len(groups))[stays]
    keeping = named.filter(pa.array(stays)).add_column(0, "row", pa.array(np.flatnonzero(stays)))
    dropping = named.take(pa.array(goes)).add_column(0, "row", pa.array(goes))
    dropping = dropping.append_column("kept_row", pa.array(kept[goes]))
    if "key" in named.column_names:
        dropping = dropping.append_column("kept_key", named["key"].take(pa.array(kept[goes])))
    return (
        keeping.append_column("group_rows", pa.array(members)),
        dropping.append_column("similarity", pa.array(similarity)),
    )
