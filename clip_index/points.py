"""Operating points: how much of an index a query looks at, chosen by measurement to reach a recall target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_PROBES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_DEPTHS = (100, 200, 300, 400, 600, 800, 1200, 1600)
# Microseconds on one thread at 512 dimensions; the choice depends on their ratios alone.
_LIST_US, _CODE_US, _ROW_US = 2.5, 0.014, 0.35


@dataclass(frozen=True)
class Point:
    """Look into the `nprobe` nearest lists and compare the best `rerank` candidates exactly."""

    nprobe: int
    rerank: int


DEEPEST = max(_DEPTHS)


def grid(lists: int) -> list[int]:
    """The numbers of lists to try, rising; all of them at the end where that is affordable."""
    return [probes for probes in _PROBES if probes < lists] + ([lists] if lists <= _PROBES[-1] else [])


def found_at(found: np.ndarray, truth: np.ndarray, good: np.ndarray, k: int) -> dict[int, float]:
    """Mean recall@k for each depth: of candidates int [n, deepest] by falling estimate.

    `good` bool [n, m] says which of the exact neighbours `truth` int [n, m] score no less than the k-th.
    """
    recalls = {}
    hits = np.zeros((len(found), found.shape[1] + 1), np.int64)
    for query, (candidates, rows, wanted) in enumerate(zip(found, truth, good, strict=True)):
        hits[query, 1:] = np.cumsum(np.isin(candidates, rows[wanted]))
    available = np.maximum(1, np.minimum(k, good.sum(axis=1)))
    for depth in _DEPTHS:
        reached = hits[:, min(depth, found.shape[1])]
        recalls[depth] = float((np.minimum(reached, available) / available).mean())
    return recalls


def cheapest(measured: Iterable[tuple[Point, float]], target: float, rows: int, lists: int, dim: int) -> Point:
    """The point of least cost that reaches the target, else the one of highest recall."""

    def cost(point: Point) -> float:
        scan = point.nprobe * (_LIST_US + rows / lists * _CODE_US)
        return (scan + point.rerank * _ROW_US) * dim / 512

    table = list(measured)
    enough = [point for point, recall in table if recall >= target]
    return min(enough, key=cost) if enough else max(table, key=lambda pair: (pair[1], -cost(pair[0])))[0]


def widest(points: Iterable[Point]) -> Point:
    """A point that serves every kind of query: for one of which nothing is known."""
    points = list(points)
    return Point(max(point.nprobe for point in points), max(point.rerank for point in points))
