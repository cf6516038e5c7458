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

import numpy as np

from clip_index.vectors import Vectors

_TIE = 1e-6  # scores are recomputed in float64; what is left is the order of float32 sums in the exact search
_QUERY_BLOCK = 32

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(float32 [n, dim], k) to (scores [n, k], rows int64 [n, k], -1 where there are fewer)."""


@dataclass(frozen=True)
class Queries:
    """Held-out queries: `kind` says of which modality, `own` which row of the index each one is, if any."""

    kind: str
    vectors: np.ndarray
    own: np.ndarray | None = None


def exact_neighbours(vectors: Vectors, queries: Queries, k: int) -> np.ndarray:
    """Rows int64 [n, k] by falling inner product over the whole matrix, without the queries' own rows; -1 pads."""
    import faiss

    count, wanted = len(queries.vectors), k + (queries.own is not None)
    best_scores = np.full((count, wanted), -np.inf, np.float32)
    best_rows = np.full((count, wanted), -1, np.int64)
    for start, block in vectors.blocks():
        scores, rows = faiss.knn(queries.vectors, block, min(wanted, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([best_scores, scores], axis=1)
        rows = np.concatenate([best_rows, rows + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
        best_scores, best_rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return without_own(best_rows, queries.own, k)


def without_own(rows: np.ndarray, own: np.ndarray | None, k: int) -> np.ndarray:
    """The first k columns of rows [n, more than k] once each query's own row is taken out."""
    if own is None:
        return rows[:, :k]
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1)[:, :k]


def scores_of(vectors: Vectors, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact inner products float64 [n, k] of each query with its rows; -inf where the row is -1."""
    scores = np.empty(rows.shape, np.float64)
    for start in range(0, len(rows), _QUERY_BLOCK):
        part = slice(start, start + _QUERY_BLOCK)
        found = vectors.take(np.maximum(rows[part], 0).ravel()).reshape(*rows[part].shape, vectors.dim)
        scores[part] = np.einsum("nkd,nd->nk", found.astype(np.float64), queries[part].astype(np.float64))
    return np.where(rows < 0, -np.inf, scores)


def tie_aware_recall(exact: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
    """Recall@k of each query, float64 [n], from the exact scores of the exact and of the found rows, falling or not.

    Where there are fewer than k rows altogether, recall is over those that there are.
    """
    truth = -np.sort(-exact[:, :k], axis=1)
    available = np.isfinite(truth).sum(axis=1)
    threshold = np.take_along_axis(truth, np.maximum(available, 1)[:, None] - 1, 1)
    hits = ((found[:, :k] >= threshold - _TIE) & np.isfinite(found[:, :k])).sum(axis=1)
    return np.where(available == 0, 1.0, np.minimum(hits, available) / np.maximum(available, 1))


def measure(search: Search, vectors: Vectors, queries: Queries, ks: tuple[int, ...] = (1, 10, 100)) -> dict:
    """Recall at each k: `{"queries": n, "recall@10": {"mean": 0.98, "interval": 0.01}}`, the interval being 95%."""
    k = max(ks)
    wanted = min(k + (queries.own is not None), vectors.rows)
    found = without_own(search(queries.vectors, wanted)[1], queries.own, k)
    truth = exact_neighbours(vectors, queries, k)
    exact_scores = scores_of(vectors, queries.vectors, truth)
    found_scores = scores_of(vectors, queries.vectors, found)
    report: dict = {"queries": len(queries.vectors)}
    for at in ks:
        each = tie_aware_recall(exact_scores, found_scores, at)
        interval = 1.96 * float(each.std()) / math.sqrt(len(each))
        report[f"recall@{at}"] = {"mean": float(each.mean()), "interval": interval}
    return report
