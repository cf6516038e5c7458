"""What a search leaves out: deleted rows, rows that a condition does not hold for, copies of better results."""

from __future__ import annotations

import numpy as np

from clip_index.distinct import distinct
from clip_index.index_folder import IndexFolder
from clip_index.matrix import IndexMatrix
from clip_index.opened import Opened
from clip_index.points import Point
from clip_index.selection import Selection, search_among
from clip_index.types import ClipIndexError

DELETED = "deleted.npy"
"""int64 [n], rising: the rows of an index that no search finds. They are gone when it is compacted."""


def live_rows(folder: IndexFolder) -> Selection | None:
    """The rows that are not deleted; None where that is all of them."""
    if not folder.has(DELETED):
        return None
    allowed = np.ones(folder.marker.rows, bool)
    allowed[np.load(folder.local(DELETED))] = False
    return Selection(allowed)


def rows_above(
    opened: Opened, query: np.ndarray, threshold: float, allowed: Selection | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) of all allowed rows of at least a score, by falling score. Raises ClipIndexError."""
    if not opened.exact:
        raise ClipIndexError("the index holds codes of its vectors alone: build it without --index_key or --engine")
    near, found = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    for numbers, block in IndexMatrix(opened).stored_blocks():
        scores = block @ query
        good = scores >= threshold
        if allowed is not None:
            good &= allowed.allowed[numbers]
        near.append(scores[good])
        found.append(numbers[good])
    scores, rows = np.concatenate(near), np.concatenate(found)
    order = np.lexsort((rows, -scores))
    return scores[order], rows[order]


def nearest_rows(
    opened: Opened,
    queries: np.ndarray,
    k: int,
    point: Point | None,
    *,
    allowed: Selection | None = None,
    dedup: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) [n, up to k] by falling score, of unit rows float32 [n, dim]; -1 where there are fewer.

    Among the allowed rows, and with `dedup` none that is so similar to a better one of them, or more.
    """

    def search(queries: np.ndarray, k: int, **options: object) -> tuple[np.ndarray, np.ndarray]:
        return opened.search(queries, min(k, opened.rows), point, **options)

    def fetch(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if allowed is None:
            return search(queries, k)
        return search_among(allowed, search, IndexMatrix(opened) if opened.exact else None, queries, k)

    if dedup is None:
        return fetch(queries, k)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for place, query in enumerate(queries):

        def found(count: int, query: np.ndarray = query) -> tuple[np.ndarray, np.ndarray]:
            near, numbers = (part[0] for part in fetch(query[None], count))
            return near[numbers >= 0], numbers[numbers >= 0]

        near, numbers = distinct(found, opened.vectors_of, k, dedup)
        scores[place, : len(near)], rows[place, : len(near)] = near, numbers
    return scores, rows
