"""Two-stage search: one bit a dimension in memory finds candidates, the float16 rows on disk rank them exactly.

`TwoStage` opens the three files that `clip_index.two_stage_build` writes, memory-mapped, and searches with a `Point`:
how many lists, how many candidates. Candidates of one query lie together in NAME.vectors.npy, and no row number is
needed before the last k: of NAME.index, codes and centroids alone are read into memory.

A list is chosen by the distance of its centroid, not by its inner product, although rows are compared by inner
product: with unit rows both say the same of rows, but a centroid of widely spread rows is short. At 1M x 512 that
halves the lists that text queries need.

RaBitQ: Gao and Long, arXiv 2405.12497.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clip_index.points import Point
from clip_index.types import ClipIndexError

VECTORS, ROWS = "vectors.npy", "rows.npy"
QUERY_BITS = 4
"""Bits of a query's components while codes are scanned; 8 find no more, 4 take half the time."""
_HNSW_SEARCH = 2  # centroids looked at for each list
_BATCH = 64


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
