"""Two-stage search: one bit a dimension in memory finds candidates, the float16 rows on disk rank them exactly.

1. `train` splits a random sample among lists (`clip_index.partition`) after a random rotation, which RaBitQ needs.
2. `add` streams all rows: the list of each, then its code of one bit a dimension. `NAME.index` is a faiss index that
   any faiss reads: rotation, IVF lists, RaBitQ codes, the row numbers.
3. `order` writes `NAME.vectors.npy`, the rows in the order of the lists, and `NAME.rows.npy`, the row number of each
   place. Candidates of one query lie together, and no row number is needed before the last k: of the index, codes and
   centroids alone are read into memory.
4. `TwoStage` opens the three, memory-mapped, and searches with a `Point`: how many lists, how many candidates.

A list is chosen by the distance of its centroid, not by its inner product, although rows are compared by inner
product: with unit rows both say the same of rows, but a centroid of widely spread rows is short. At 1M x 512 that
halves the lists that text queries need.

RaBitQ: Gao and Long, arXiv 2405.12497.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clip_index import partition
from clip_index.points import Point
from clip_index.steps import Steps
from clip_index.types import ClipIndexError
from clip_index.vectors import Vectors

VECTORS, ROWS = "vectors.npy", "rows.npy"
QUERY_BITS = 4
"""Bits of a query's components while codes are scanned; 8 find no more, 4 take half the time."""
SAMPLE_PER_LIST = 32
_DEFAULT_PROBES = 64  # of those who open NAME.index with faiss alone
_HNSW_LISTS = 16384  # from here on looking at every centroid takes longer than scanning the lists
_HNSW_LINKS, _HNSW_CONSTRUCTION, _HNSW_SEARCH = 32, 200, 2
_BLOCK_ROWS = 65536
_BATCH = 64


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


class TwoStage:
    """The three files of an index, opened. Safe to share between threads: a search changes nothing."""

    exact = True

    def __init__(self, index: Any, vectors: str, rows: str):
        import faiss

        self.rows, self.dim = index.ntotal, index.d
        self._index = index  # owns the parts below
        self._rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        self._inverted = faiss.downcast_index(index.index)
        self._quantizer = faiss.downcast_index(self._inverted.quantizer)
        self._hnsw = isinstance(self._quantizer, faiss.IndexHNSW)
        self.lists = self._inverted.nlist
        invlists = self._inverted.invlists
        self.sizes = np.array([invlists.list_size(number) for number in range(self.lists)])
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._vectors, self._rows = np.load(vectors, mmap_mode="r"), np.load(rows, mmap_mode="r")
        if self._vectors.shape != (self.rows, self.dim) or self._rows.shape != (self.rows,):
            raise ClipIndexError(f"{vectors} does not have the rows of its index: build the index again")
        self._half = faiss.IndexScalarQuantizer(self.dim, faiss.ScalarQuantizer.QT_fp16)  # converts, holds nothing
        self._places: np.ndarray | None = None
        self._lock = threading.Lock()

    def search(
        self, queries: np.ndarray, k: int, point: Point, *, selector: Any = None, widen: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(exact scores float32 [n, k], rows int64 [n, k]) by falling score; -1 where the index has fewer than k.

        Of the rows that a faiss IDSelector lets through, where there is one. `widen` times as many lists are looked at.
        """
        point = Point(int(min(self.lists, point.nprobe * widen)), point.rerank)
        scores, places = self._ranked(queries, k, point, selector)
        short = np.flatnonzero(places[:, min(k, self.rows) - 1] < 0)
        if len(short):  # the lists that were looked at hold fewer than k rows
            everywhere = Point(self.lists, point.rerank)
            scores[short], places[short] = self._ranked(queries[short], k, everywhere, selector)
        return scores, self._row_of(places)

    def coarse(self, queries: np.ndarray, k: int, point: Point) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, but by the codes alone: scores are estimates."""
        scores, places = self._candidates(queries, k, point.nprobe)
        return scores, self._row_of(places)

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 [n, dim] of rows."""
        return self._vectors[self._places_of(rows)].astype(np.float32)

    def _places_of(self, rows: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._places is None:
                places = np.empty(self.rows, np.int64)
                places[self._rows] = np.arange(self.rows)
                self._places = places
        return self._places[rows]

    def _ranked(self, queries: np.ndarray, k: int, point: Point, selector: Any = None) -> tuple[np.ndarray, np.ndarray]:
        wanted = min(self.rows, max(point.rerank, 2 * k))
        scores = np.full((len(queries), k), -np.inf, np.float32)
        places = np.full((len(queries), k), -1, np.int64)
        queries = np.ascontiguousarray(queries, np.float32)

        def rank(start: int) -> None:
            part = slice(start, start + _BATCH)
            candidates = self._candidates(queries[part], wanted, point.nprobe, selector)[1]
            for at, found in enumerate(candidates, start):
                found = np.sort(found[found >= 0])  # near each other on disk
                exact = self._exact(found, queries[at])
                best = np.argpartition(-exact, k)[:k] if len(exact) > k else np.arange(len(exact))
                best = best[np.argsort(-exact[best], kind="stable")]
                scores[at, : len(best)], places[at, : len(best)] = exact[best], found[best]

        starts = range(0, len(queries), _BATCH)
        if len(starts) == 1:
            rank(0)
        else:
            import faiss

            def alone(start: int) -> None:
                faiss.omp_set_num_threads(1)  # of this thread alone
                rank(start)

            with ThreadPoolExecutor(max(1, faiss.omp_get_max_threads())) as pool:
                list(pool.map(alone, starts))
        return scores, places

    def _candidates(
        self, queries: np.ndarray, k: int, nprobe: int, selector: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(estimated scores, places in the order of the lists) [n, k]."""
        import faiss

        nprobe = min(nprobe, self.lists)
        turned = self._rotation.apply(np.ascontiguousarray(queries, np.float32))
        depth = faiss.SearchParametersHNSW(efSearch=_HNSW_SEARCH * nprobe) if self._hnsw else None
        distances, lists = self._quantizer.search(turned, nprobe, params=depth)
        scores = np.empty((len(turned), k), np.float32)
        pairs = np.empty((len(turned), k), np.int64)
        options = faiss.IVFRaBitQSearchParameters()
        options.nprobe, options.qb = nprobe, QUERY_BITS
        pointers = [faiss.swig_ptr(array) for array in (lists, distances, scores, pairs)]
        if selector is not None:  # it is asked about row numbers
            options.sel = selector
            self._inverted.search_preassigned_c(len(turned), faiss.swig_ptr(turned), k, *pointers, False, options)
            return scores, np.where(pairs < 0, -1, self._places_of(np.maximum(pairs, 0)))
        # list and offset in place of the row number, which would have to be in memory too
        self._inverted.search_preassigned_c(len(turned), faiss.swig_ptr(turned), k, *pointers, True, options)
        return scores, np.where(pairs < 0, -1, self._starts[np.maximum(pairs, 0) >> 32] + (pairs & 0xFFFFFFFF))

    def _exact(self, places: np.ndarray, query: np.ndarray) -> np.ndarray:
        import faiss

        exact = np.empty(len(places), np.float32)
        if len(places):
            rows = self._half.sa_decode(np.take(self._vectors, places, axis=0).view(np.uint8))
            # numpy's product would start threads for so little, which wait for each other on a busy machine
            pointers = (faiss.swig_ptr(array) for array in (exact, query, rows))
            faiss.fvec_inner_products_ny(*pointers, self.dim, len(rows))
        return exact

    def _row_of(self, places: np.ndarray) -> np.ndarray:
        return np.where(places < 0, -1, self._rows[np.maximum(places, 0)].astype(np.int64))
