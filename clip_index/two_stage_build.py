"""Builds the files that `clip_index.two_stage` searches.

1. `train` splits a random sample among lists (`clip_index.partition`) after a random rotation, which RaBitQ needs.
2. `add` streams all rows: the list of each, then its code of one bit a dimension. `NAME.index` is a faiss index that
   any faiss reads: rotation, IVF lists, RaBitQ codes, the row numbers.
3. `order` writes `NAME.vectors.npy`, the rows in the order of the lists, and `NAME.rows.npy`, the row number of each
   place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from clip_index import partition
from clip_index.steps import Steps
from clip_index.two_stage import QUERY_BITS, ROWS, VECTORS
from clip_index.types import ClipIndexError
from clip_index.vectors import Vectors

SAMPLE_PER_LIST = 32
_DEFAULT_PROBES = 64  # of those who open NAME.index with faiss alone
_HNSW_LISTS = 16384  # from here on looking at every centroid takes longer than scanning the lists
_HNSW_LINKS, _HNSW_CONSTRUCTION = 32, 200
_BLOCK_ROWS = 65536


def lists_for(rows: int) -> int:
    """How many lists: the power of two next to four times the square root of the rows."""
    return max(1, min(2 ** round(math.log2(4 * math.sqrt(rows))), rows // SAMPLE_PER_LIST))


def index_bytes(rows: int, dim: int, lists: int) -> int:
    """What a build holds at its end: codes, two factors and a number for each row, centroids, the rotation."""
    return rows * (code_bytes(dim) + 8 + 4) + lists * dim * 2 + dim * dim * 4


def code_bytes(dim: int) -> int:
    """Bytes of a row's code: a bit a dimension and two float32 factors."""
    return (dim + 7) // 8 + 8


def build(
    vectors: Vectors, path: Callable[[str], str], lists: int, memory: int, steps: Steps, like: str | None = None
) -> Any:
    """Write NAME.vectors.npy and NAME.rows.npy, `path` giving the place of each; the faiss index, to be written.

    `like` is the file of an index that was built before: its lists are taken instead of trained ones.
    """
    import faiss

    needed = index_bytes(vectors.rows, vectors.dim, lists) + 2 * _BLOCK_ROWS * vectors.dim * 4
    if needed > memory:
        raise ClipIndexError(
            f"{vectors.rows} codes of {vectors.dim} bits take {needed / 1e9:.1f} GB to build, more than the "
            f"{memory / 1e9:.1f} GB of --memory: give more, or split the embeddings and build an index of each part"
        )
    with steps.timed("train"):
        most = (memory - needed) // (3 * vectors.dim * 4)
        parts, rotation, inverted = _as_in(like) if like else _train(vectors, lists, most)
    with steps.timed("add"):
        order = _add(vectors, parts, rotation, inverted)
    built = faiss.IndexPreTransform(rotation, inverted)
    with steps.timed("write"):
        _write_ordered(vectors, order, path, memory // 4)
    return built


def _train(vectors: Vectors, lists: int, most: int) -> tuple[partition.Partition, Any, Any]:
    import faiss

    count = min(vectors.rows, max(2 * lists, min(most, SAMPLE_PER_LIST * lists)))
    # the first rows of a set are rarely like the rest of it
    rows = np.random.default_rng(0).choice(vectors.rows, count, replace=False, shuffle=False)
    rotation = faiss.RandomRotationMatrix(vectors.dim, vectors.dim)
    rotation.init(1)
    parts = partition.train(rotation.apply(vectors.take(np.sort(rows))), lists)
    return parts, rotation, _empty(parts.centroids)


def _as_in(path: str) -> tuple[partition.Partition, Any, Any]:
    """The lists and the rotation of an index that is there."""
    import faiss

    index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    rotation = faiss.RandomRotationMatrix(index.d, index.d)
    rotation.init(1)
    faiss.copy_array_to_vector(faiss.vector_to_array(faiss.downcast_VectorTransform(index.chain.at(0)).A), rotation.A)
    inverted = faiss.downcast_index(index.index)
    centroids = faiss.downcast_index(inverted.quantizer).reconstruct_n(0, inverted.nlist)
    return partition.Partition(centroids), rotation, _empty(centroids)


def _empty(centroids: np.ndarray) -> Any:
    import faiss

    lists, dim = centroids.shape
    if lists >= _HNSW_LISTS:
        quantizer = faiss.IndexHNSWFlat(dim, _HNSW_LINKS, faiss.METRIC_L2)
        quantizer.hnsw.efConstruction = _HNSW_CONSTRUCTION
        quantizer.hnsw.efSearch = 4 * _HNSW_CONSTRUCTION
    else:
        quantizer = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
    quantizer.add(centroids)
    inverted = faiss.IndexIVFRaBitQ(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
    inverted.qb, inverted.nprobe = QUERY_BITS, min(_DEFAULT_PROBES, lists)
    inverted.train(centroids)
    return inverted


def _add(vectors: Vectors, parts: partition.Partition, rotation: Any, inverted: Any) -> np.ndarray:
    """Add all rows; the rows in the order of the lists, int64 [rows]."""
    import faiss

    lists = np.empty(vectors.rows, np.int32)
    for start, block in vectors.blocks(_BLOCK_ROWS):
        block = rotation.apply(block)
        rows, assigned = np.arange(start, start + len(block)), parts.assign(block)
        pointers = (faiss.swig_ptr(array) for array in (block, rows, assigned))
        inverted.add_core(len(block), *pointers)
        lists[rows] = assigned
    return np.argsort(lists, kind="stable")


def _write_ordered(vectors: Vectors, order: np.ndarray, path: Callable[[str], str], memory: int) -> None:
    np.save(path(ROWS), order.astype(np.uint32 if vectors.rows < 2**32 else np.int64))
    block = max(1, memory // (4 * vectors.dim))
    with open(path(VECTORS), "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (vectors.rows, vectors.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, vectors.rows, block):
            file.write(vectors.take(order[start : start + block], np.float16).data)
