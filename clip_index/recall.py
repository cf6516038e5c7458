"""Recall against exact search, for queries that the index has not seen.

Every row is in the index, so no row is held out by itself. A query made of a row of the index leaves that row out of
both answers, the exact one and the index's; a query of the other modality is not in the index in the first place.

Recall is tie-aware: what the index returned counts if its exact score reaches that of the k-th exact neighbour. Where
many rows are equally near, as copies of one picture are, any of them is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_index.vectors import Vectors

_TIE = 2e-6  # a float32 sum of some thousand products of unit vectors is this exact, in whatever order
_SCORE_BLOCK = 4096

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(float32 [n, dim], k) to (scores [n, k], rows int64 [n, k], -1 where there are fewer)."""


@dataclass(frozen=True)
class Queries:
    """Held-out queries: `kind` says of which modality, `own` which row of the index each one is, if any."""

    kind: str
    vectors: np.ndarray
    own: np.ndarray | None = None


def exact_neighbours(vectors: Vectors, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32 [n, k], rows int64 [n, k]) by falling inner product over all rows but the queries' own.

    Where there are fewer, scores are -inf and rows -1.
    """
    import faiss

    count, wanted = len(queries.vectors), k + (queries.own is not None)
    scores = np.full((count, wanted), -np.inf, np.float32)
    rows = np.full((count, wanted), -1, np.int64)
    for numbers, block in vectors.stored_blocks():
        near, offsets = faiss.knn(queries.vectors, block, min(wanted, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = best(np.concatenate([scores, near], 1), np.concatenate([rows, numbers[offsets]], 1), wanted)
    if queries.own is not None:
        mine = rows == queries.own[:, None]
        scores[mine], rows[mine] = -np.inf, -1
    return best(scores, rows, k)


def best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k columns by falling score."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def without_own(rows: np.ndarray, own: np.ndarray | None, k: int, *beside: np.ndarray) -> Any:
    """The first k columns of rows [n, more than k] once each query's own row is taken out, and of arrays beside it."""
    arrays = (rows, *beside)
    if own is not None:
        order = np.argsort(rows == own[:, None], axis=1, kind="stable")
        arrays = tuple(np.take_along_axis(array, order, 1) for array in arrays)
    return tuple(array[:, :k] for array in arrays) if beside else arrays[0][:, :k]


def scores_of(vectors: Vectors, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact inner products float64 [n, k] of each query with its rows; -inf where the row is -1."""
    scores = np.full(rows.shape, -np.inf)
    query, column = np.nonzero(rows >= 0)
    for start in range(0, len(query), _SCORE_BLOCK):
        part = slice(start, start + _SCORE_BLOCK)
        found = vectors.take(rows[query[part], column[part]]).astype(np.float64)
        scores[query[part], column[part]] = np.einsum("nd,nd->n", found, queries[query[part]].astype(np.float64))
    return scores


def reaching(exact: np.ndarray, k: int) -> np.ndarray:
    """Which of the exact neighbours, by falling score [n, m], score no less than the k-th, ties included: bool."""
    available = np.isfinite(exact[:, :k]).sum(axis=1)
    threshold = np.take_along_axis(exact, np.maximum(available, 1)[:, None] - 1, 1)
    return (exact >= threshold - _TIE) & np.isfinite(exact)


def tie_aware_recall(exact: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
    """Recall@k of each query, float64 [n], from the exact scores of the exact and of the found rows, falling or not.

    Where there are fewer than k rows altogether, recall is over those that there are.
    """
    truth = -np.sort(-exact[:, :k], axis=1)
    available = np.isfinite(truth).sum(axis=1)
    threshold = np.take_along_axis(truth, np.maximum(available, 1)[:, None] - 1, 1)
    hits = ((found[:, :k] >= threshold - _TIE) & np.isfinite(found[:, :k])).sum(axis=1)
    return np.where(available == 0, 1.0, np.minimum(hits, available) / np.maximum(available, 1))


def measure(
    search: Search,
    vectors: Vectors,
    queries: Queries,
    ks: tuple[int, ...] = (1, 10, 100),
    truth: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict:
    """Recall at each k: `{"queries": n, "recall@10": {"mean": 0.98, "interval": 0.01}}`, the interval being 95%.

    `truth` is what `exact_neighbours` gives for the largest k, where that is known already.
    """
    k = max(ks)
    wanted = min(k + (queries.own is not None), vectors.rows)
    found = without_own(search(queries.vectors, wanted)[1], queries.own, k)
    exact_scores, exact_rows = truth or exact_neighbours(vectors, queries, k)
    # most of what was found is among the true neighbours, whose scores are known
    known = found[:, :, None] == exact_rows[:, None, :]
    unknown = ~known.any(axis=2)
    found_scores = np.take_along_axis(exact_scores, known.argmax(axis=2), 1).astype(np.float64)
    found_scores[unknown] = scores_of(vectors, queries.vectors, np.where(unknown, found, -1))[unknown]
    report: dict = {"queries": len(queries.vectors)}
    for at in ks:
        each = tie_aware_recall(exact_scores, found_scores, at)
        interval = 1.96 * float(each.std()) / math.sqrt(len(each))
        report[f"recall@{at}"] = {"mean": float(each.mean()), "interval": interval}
    return report
