"""Builds the files that `clip_index.two_stage` searches, in memory that does not hold the codes.

1. `train` splits a random sample among lists (`clip_index.partition`).
2. `add` streams all rows and finds the list of each: eight bytes a row stay in memory, the list and the row number.
   Sorted, these are the rows in the order of the lists.
3. `write` reads the rows in that order, block by block, and writes `NAME.vectors.npy` as they are; after a random
   rotation, which RaBitQ needs, their codes of one bit a dimension go to `NAME.index` (`clip_index.inverted_file`), a
   faiss index that any faiss reads. `NAME.rows.npy` has the row number of each place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clip_index import partition
from clip_index.inverted_file import InvertedFile
from clip_index.steps import Steps
from clip_index.two_stage import QUERY_BITS, ROWS, VECTORS
from clip_index.types import ClipIndexError
from clip_index.vectors import Vectors

SAMPLE_PER_LIST = 32
_DEFAULT_PROBES = 64  # of those who open NAME.index with faiss alone
_HNSW_LISTS = 16384  # from here on looking at every centroid takes longer than scanning the lists
_HNSW_LINKS, _HNSW_CONSTRUCTION = 32, 200
_LEAST_PER_LIST, _LEAST_BLOCK_ROWS = 2, 1024
_BLOCK_ROWS, _PASSES = 65536, 8
_ROW_BITS = 40
_ROW_BYTES = 16  # its list and number; its number as it is written; its place in an index that is changed
# how often a vector is held as float32: in k-means; in a block that is rotated; of float16 while rows are gathered
_SAMPLE_COPIES, _BLOCK_COPIES, _GATHERED_COPIES = 3, 3, 3
_CENTROID_COPIES = 14  # those of a partition among them, which has most centroids in several groups


def lists_for(rows: int) -> int:
    """How many lists: the power of two next to four times the square root of the rows."""
    return max(1, min(2 ** round(math.log2(4 * math.sqrt(rows))), rows // SAMPLE_PER_LIST))


def code_bytes(dim: int) -> int:
    """Bytes of a row's code: a bit a dimension and two float32 factors."""
    return (dim + 7) // 8 + 8


def search_bytes(rows: int, dim: int, lists: int) -> int:
    """What searches read again and again: the code of each row, the centroids, the rotation."""
    if lists < _HNSW_LISTS:
        centroids = 2 * lists * dim
    else:  # float32, and on average little more than the links of the lowest level
        centroids = lists * (4 * dim + 4 * 2 * _HNSW_LINKS + 16)
    return rows * code_bytes(dim) + centroids + 4 * dim * dim


def disk_bytes(rows: int, dim: int, lists: int) -> int:
    """What a build writes: besides, float16 vectors, and row numbers of eight bytes and of four."""
    return search_bytes(rows, dim, lists) + rows * (2 * dim + 8 + 4)


def build_bytes(rows: int, dim: int, lists: int, memory: int | None = None) -> int:
    """What a build holds at most: the least that it needs, or what it takes where it may take `memory`."""
    room = _Room(rows, dim, lists, memory)
    return room.kept + max(room.sample_rows * _SAMPLE_COPIES, room.block_rows * _BLOCK_COPIES) * 4 * dim


class _Room:
    """How much is held at a time, in as much memory as there is."""

    def __init__(self, rows: int, dim: int, lists: int, memory: int | None = None):
        self.kept = _ROW_BYTES * rows + _CENTROID_COPIES * 4 * dim * lists + 2 * 4 * dim * dim
        free = max(0, (memory or 0) - self.kept) // (4 * dim)
        least_sample, least_block = min(rows, _LEAST_PER_LIST * lists), min(rows, _LEAST_BLOCK_ROWS)
        most_sample, most_block = min(rows, SAMPLE_PER_LIST * lists), min(rows, _BLOCK_ROWS)
        self.sample_rows = min(most_sample, max(least_sample, free // _SAMPLE_COPIES))
        self.block_rows = min(most_block, max(least_block, free // _BLOCK_COPIES))
        # each block of rows that are gathered is one more pass over vectors that no cache may hold
        spare = free - self.block_rows * _BLOCK_COPIES
        self.gathered_rows = max(self.block_rows, min(rows // _PASSES, spare // _GATHERED_COPIES))


def build(
    vectors: Vectors, path: Callable[[str], str], lists: int, memory: int, steps: Steps, like: str | None = None
) -> None:
    """Write NAME.index, NAME.vectors.npy and NAME.rows.npy, `path` giving the place of each.

    `like` is the file of an index that was built before: its lists are taken instead of trained ones. Raises
    ClipIndexError where `memory` bytes are too few.
    """
    needed = build_bytes(vectors.rows, vectors.dim, lists)
    if needed > memory:
        raise ClipIndexError(
            f"{lists} lists of {vectors.rows} rows of {vectors.dim} dimensions take {needed / 1e6:,.2f} MB to build, "
            f"more than the {memory / 1e6:,.2f} MB of --memory: give more, or split the embeddings, build an index of "
            f"each part and search them one by one"
        )
    room = _Room(vectors.rows, vectors.dim, lists, memory)
    with steps.timed("train"):
        parts, index = _as_in(like) if like else _train(vectors, lists, room.sample_rows)
    with steps.timed("add"):
        order, sizes = _assign(vectors, parts, room.block_rows)
    with steps.timed("write"):
        _write(vectors, path, index, order, sizes, room)


def _train(vectors: Vectors, lists: int, count: int) -> tuple[partition.Partition, Any]:
    import faiss

    # the first rows of a set are rarely like the rest of it
    rows = np.random.default_rng(0).choice(vectors.rows, count, replace=False, shuffle=False)
    parts = partition.train(vectors.take(np.sort(rows)), lists)
    rotation = faiss.RandomRotationMatrix(vectors.dim, vectors.dim)
    rotation.init(1)
    return parts, _empty(rotation, rotation.apply(parts.centroids))


def _as_in(path: str) -> tuple[partition.Partition, Any]:
    """The lists of an index that is there, and that index without its rows."""
    import faiss

    index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    rotation = faiss.RandomRotationMatrix(index.d, index.d)
    rotation.init(1)
    faiss.copy_array_to_vector(faiss.vector_to_array(faiss.downcast_VectorTransform(index.chain.at(0)).A), rotation.A)
    inverted = faiss.downcast_index(index.index)
    centroids = faiss.downcast_index(inverted.quantizer).reconstruct_n(0, inverted.nlist)
    return partition.Partition(rotation.reverse_transform(centroids)), _empty(rotation, centroids)


def _empty(rotation: Any, centroids: np.ndarray) -> Any:
    """The faiss index of rotated centroids, without rows."""
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
    return faiss.IndexPreTransform(rotation, inverted)


def _assign(vectors: Vectors, parts: partition.Partition, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(the rows in the order of the lists, int64 [rows]; how many each list has, int64 [lists])."""
    lists = len(parts.centroids)
    keys = np.empty(vectors.rows, np.int64)

    def assign(start: int, rows: np.ndarray, block: np.ndarray) -> None:
        keys[start : start + len(rows)] = parts.assign(block) << _ROW_BITS | rows

    with _threads(1) as pool:  # the next block is read meanwhile
        start, pending = 0, pool.submit(int)
        for rows, block in vectors.stored_blocks(block_rows):
            pending.result()
            pending = pool.submit(assign, start, rows, block)
            start += len(rows)
        pending.result()
    keys.sort()
    sizes = np.diff(np.searchsorted(keys, np.arange(lists + 1) << _ROW_BITS))
    keys &= (1 << _ROW_BITS) - 1
    return keys, sizes


def _write(
    vectors: Vectors, path: Callable[[str], str], index: Any, order: np.ndarray, sizes: np.ndarray, room: _Room
) -> None:
    import faiss

    rotation, inverted = faiss.downcast_VectorTransform(index.chain.at(0)), faiss.downcast_index(index.index)
    ends, threads = np.cumsum(sizes), max(1, faiss.omp_get_max_threads())
    each = -(-room.block_rows // threads)

    def encode(first: int, gathered: np.ndarray) -> np.ndarray:
        block = rotation.apply(gathered.astype(np.float32))
        lists = np.searchsorted(ends, np.arange(first, first + len(block)), side="right")
        codes = np.empty((len(block), inverted.code_size), np.uint8)
        inverted.encode_vectors(len(block), *(faiss.swig_ptr(array) for array in (block, lists, codes)))
        return codes

    np.save(path(ROWS), order.astype(np.uint32 if vectors.rows < 2**32 else np.int64))
    with (
        _threads(threads) as pool,
        open(path(VECTORS), "wb") as file,
        InvertedFile(path("index"), index, sizes, order) as codes_file,
    ):
        header = {"descr": "<f2", "fortran_order": False, "shape": (vectors.rows, vectors.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, vectors.rows, room.gathered_rows):
            gathered = vectors.take(order[first : first + room.gathered_rows], np.float16)
            starts = range(0, len(gathered), each)
            encoded = [pool.submit(encode, first + start, gathered[start : start + each]) for start in starts]
            file.write(gathered.data)
            for codes in encoded:
                codes_file.append(codes.result())


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads, each with its part of those that faiss may use in the calling one."""
    import faiss

    share = max(1, faiss.omp_get_max_threads() // count)
    return ThreadPoolExecutor(count, initializer=faiss.omp_set_num_threads, initargs=(share,))
