"""Search among some of the rows: those that a condition holds for and that are not deleted.

How depends on how many there are. Few are compared one by one with their exact vectors. Of more, the index is told to
skip the others, and looks farther, since the nearest allowed rows are farther off. Where most rows are allowed, more
are fetched than are wanted, and the others are left out. A query that finds too few that way takes the next one.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from clip_index.recall import best
from clip_index.vectors import BLOCK_ROWS, Vectors

_FEW_SHARE, _MOST_SHARE = 0.01, 0.3
_FEW_ROWS = 4096
"""So many are compared within some milliseconds, whatever their share."""
_MANY_ROWS = 500_000
"""So many are never compared one by one where the index can skip the others: a gigabyte to read."""
_SPARE = 1.5  # rows near a query are not allowed exactly as often as others


class Search(Protocol):
    """A search of the index as it is."""

    def __call__(
        self, queries: np.ndarray, k: int, *, selector: Any = None, widen: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores, rows) [n, k] by falling score, -1 where there are fewer: among what a faiss IDSelector lets through.

        `widen` is how many times as far to look as without a selector; infinite is everywhere.
        """


class Selection:
    """The rows, of all, that may be found."""

    def __init__(self, allowed: np.ndarray):
        self.allowed = allowed
        self.count = int(np.count_nonzero(allowed))

    def __and__(self, other: Selection) -> Selection:
        return Selection(self.allowed & other.allowed)

    @property
    def share(self) -> float:
        """Of all rows."""
        return self.count / max(1, len(self.allowed))

    def selector(self) -> Any:
        """A faiss IDSelector."""
        import faiss

        bits = np.packbits(self.allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        selector.bits = bits  # faiss keeps the address alone
        return selector


def parameters(index: Any, selector: Any, widen: float) -> Any:
    """What makes a faiss index search among a selector's rows, looking `widen` times as far as it is set to."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=parameters(index.index, selector, widen))
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=int(min(index.nlist, index.nprobe * widen)))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(
            sel=selector, efSearch=int(min(index.ntotal, index.hnsw.efSearch * max(1.0, widen)))
        )
    return faiss.SearchParameters(sel=selector)


def plan(selection: Selection) -> str:
    """How to search among the rows of a selection: "compare", "skip" or "leave out"."""
    if selection.count <= _FEW_ROWS or (selection.share < _FEW_SHARE and selection.count <= _MANY_ROWS):
        return "compare"
    return "skip" if selection.share < _MOST_SHARE else "leave out"


def search_among(
    selection: Selection, search: Search, vectors: Vectors | None, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) [n, min(k, rows of the selection)] by falling score, of queries float32 [n, dim] of unit rows.

    `vectors` are the exact ones, None where they are not at hand.
    """
    k = min(k, selection.count)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    if not k:
        return scores, rows
    how = plan(selection)
    if how == "leave out":
        scores, rows = _leave_out(selection, search, queries, k)
    if how != "compare" and len(short := _short(rows)):
        widen = min(1 / selection.share, 16.0)
        scores[short], rows[short] = search(queries[short], k, selector=selection.selector(), widen=widen)
    if len(short := _short(rows)):
        if vectors is not None:
            scores[short], rows[short] = compare(vectors, queries[short], np.flatnonzero(selection.allowed), k)
        else:
            scores[short], rows[short] = search(queries[short], k, selector=selection.selector(), widen=np.inf)
    return scores, rows


def compare(vectors: Vectors, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) [n, k]: the nearest of the given rows, at least k of them, by their exact vectors."""
    import faiss

    scores = np.empty((len(queries), 0), np.float32)
    found = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(rows), BLOCK_ROWS):
        part = rows[start : start + BLOCK_ROWS]
        near, places = faiss.knn(queries, vectors.take(part), min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, found = best(np.concatenate([scores, near], 1), np.concatenate([found, part[places]], 1), k)
    return scores, found


def _short(rows: np.ndarray) -> np.ndarray:
    """The queries that have not found all that they want."""
    return np.flatnonzero((rows < 0).any(axis=1))


def _leave_out(selection: Selection, search: Search, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    total = len(selection.allowed)
    # at worst all of the others come first
    fetched = k + min(total - selection.count, int(_SPARE * k / selection.share))
    scores, rows = search(queries, min(fetched, total))
    wrong = (rows < 0) | ~selection.allowed[rows]
    return best(np.where(wrong, np.float32(-np.inf), scores), np.where(wrong, -1, rows), k)
