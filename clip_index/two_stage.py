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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from clip_index.points import FIRST, Point
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
        self._places: np.ndarray | None = None
        self._lock = threading.Lock()

    def search(
        self, queries: np.ndarray, k: int, point: Point, *, selector: Any = None, widen: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(exact scores float32 [n, k], rows int64 [n, k]) by falling score; -1 where the index has fewer than k.

        Of the rows that a faiss IDSelector lets through, where there is one. `widen` times as many lists are looked at.
        """
        point = replace(point, nprobe=int(min(self.lists, point.nprobe * widen)))
        scores, places = self._ranked(queries, k, point, selector)
        short = np.flatnonzero(places[:, min(k, self.rows) - 1] < 0)
        if len(short):  # the lists that were looked at hold fewer than k rows
            everywhere = replace(point, nprobe=self.lists)
            scores[short], places[short] = self._ranked(queries[short], k, everywhere, selector)
        return scores, self._row_of(places)

    def coarse(self, queries: np.ndarray, k: int, point: Point) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, but by the codes alone: scores are estimates."""
        scores, places = self._candidates(queries, k, point.nprobe)
        return scores, self._row_of(places)

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 [n, dim] of rows."""
        places = self._places_of(rows)
        order = np.argsort(places, kind="stable")  # near each other on disk
        vectors = np.empty((len(places), self.dim), np.float32)
        vectors[order] = self._vectors[places[order]]
        return vectors

    def stored(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(row numbers int64 [n], vectors float16 [n, dim]) from one place to another in the order of the lists."""
        return self._rows[start:end].astype(np.int64), self._vectors[start:end]

    def _places_of(self, rows: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._places is None:
                places = np.empty_like(self._rows, subok=False)
                places[self._rows] = np.arange(self.rows, dtype=places.dtype)
                self._places = places
        return self._places[rows].astype(np.int64)

    def _ranked(self, queries: np.ndarray, k: int, point: Point, selector: Any = None) -> tuple[np.ndarray, np.ndarray]:
        wanted, first = min(self.rows, max(point.rerank, 2 * k)), max(FIRST, 2 * k)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        places = np.full((len(queries), k), -1, np.int64)
        queries = np.ascontiguousarray(queries, np.float32)

        def rank(start: int) -> None:
            part = slice(start, start + _BATCH)
            estimates, candidates = self._candidates(queries[part], wanted, point.nprobe, selector)
            with _one_thread():  # faiss would start more for each query, which wait for each other on a busy machine
                for at, (found, estimate) in enumerate(zip(candidates, estimates, strict=True), start):
                    found = found[found >= 0]
                    exact, best = self._best(found if point.margin is None else found[:first], queries[at], k)
                    if point.margin is not None and len(found) > first:
                        end = np.searchsorted(-estimate[: len(found)], point.margin - exact[-1], "right")
                        more = self._best(found[first:end], queries[at], k)
                        exact, best = np.concatenate([exact, more[0]]), np.concatenate([best, more[1]])
                    order = np.lexsort((best, -exact))[:k]
                    scores[at, : len(order)], places[at, : len(order)] = exact[order], best[order]

        starts = range(0, len(queries), _BATCH)
        if len(queries) == 1:
            with _one_thread():
                rank(0)
        elif len(starts) == 1:
            rank(0)
        else:
            import faiss

            def alone(start: int) -> None:
                with _one_thread():
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

    def _best(self, places: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(exact scores, places) of the best k among places, or of all where there are fewer."""
        import faiss

        if not len(places):
            return np.empty(0, np.float32), places
        places = np.sort(places)  # near each other on disk
        rows = faiss.IndexScalarQuantizer(self.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        rows.add_sa_codes(np.take(self._vectors, places, axis=0).view(np.uint8))
        scores, at = rows.search(query[None], min(k, len(places)))
        return scores[0], places[at[0]]

    def _row_of(self, places: np.ndarray) -> np.ndarray:
        return np.where(places < 0, -1, self._rows[np.maximum(places, 0)].astype(np.int64))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep faiss from starting threads; the setting belongs to the calling thread alone."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
