"""A Lance table with vector indices over the lists of our index, so that nothing is clustered again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from clip_index import storage
from clip_index.exports.plain import renamed, unique
from clip_index.exports.rows import Rows
from clip_index.types import ClipIndexError, UsageError


def write(rows: Rows, output: str, _: str) -> list[str]:
    """Write a new table, and an index for each modality whose index here has lists: IVF_RQ, cosine, our centroids."""
    try:
        import lance
    except ImportError:
        raise UsageError("the format lance needs its library: pip install 'clip-index[lance]'") from None
    import pyarrow as pa

    if storage.list_names(output):
        raise UsageError(f"{output} is not empty: name a new folder")
    names = unique(rows.schema.names, forbidden=r"\.")  # which Lance takes for a path into a struct
    schema = pa.schema([field.with_name(name) for name, field in zip(names, rows.schema, strict=True)])

    def batches() -> Iterator[Any]:
        for block in rows.blocks():
            yield from block.rename_columns(names).to_batches()

    try:
        table = lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), output)
        notes = renamed(rows.schema.names, names)
        for modality in rows.modalities:
            lists = centroids(rows.folder.local(f"{modality}.index"))
            if lists is None:
                notes.append(f"{modality}_vector has no index: ours compares every row, and has no lists")
                continue
            # codes of five bits a dimension; they are defined for whole bytes of one bit each
            kind = "IVF_RQ" if rows.dim % 8 == 0 else "IVF_FLAT"
            # rows go to the list whose centroid is nearest, as they do here; with "dot" they would not
            options = {"metric": "cosine", "num_partitions": len(lists), "ivf_centroids": lists}
            table = table.create_index(f"{modality}_vector", kind, **options)
            notes.append(f"{modality}_vector has an {kind} index over our {len(lists):,} lists")
    except (OSError, ValueError, RuntimeError) as error:
        raise ClipIndexError(f"Lance cannot write {output}: {error}") from error
    return notes


def centroids(path: str) -> np.ndarray | None:
    """The centroids float32 [lists, dim] of an index file, in the space of the vectors; None where it has no lists."""
    import faiss

    index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    transforms = []
    if isinstance(index, faiss.IndexPreTransform):
        transforms = [faiss.downcast_VectorTransform(index.chain.at(at)) for at in range(index.chain.size())]
    inverted = faiss.downcast_index(index.index) if transforms else index
    if not isinstance(inverted, faiss.IndexIVF):
        return None
    found = faiss.downcast_index(inverted.quantizer).reconstruct_n(0, inverted.nlist)
    for transform in reversed(transforms):
        found = transform.reverse_transform(found)
    return found
