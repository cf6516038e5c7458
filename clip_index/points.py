"""Operating points: how much of an index a query looks at, chosen by measurement to reach a recall target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_PROBES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_DEPTHS = (100, 200, 300, 400, 600, 800, 1200, 1600)
# Microseconds on one thread at 512 dimensions; the choice depends on their ratios alone.
_LIST_US, _CODE_US, _ROW_US = 1.5, 0.024, 0.3
_MARGINS = (1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Point:
    """Look into the `nprobe` nearest lists and compare the best `rerank` candidates exactly.

    With a `margin`, after the first `FIRST` candidates (or two for each result) those alone whose estimate is at most
    that much below the k-th best exact score so far: most queries then read a part of the rows that a few need.
    """

    nprobe: int
    rerank: int
    margin: float | None = None


DEEPEST, FIRST = max(_DEPTHS), min(_DEPTHS)


def grid(lists: int) -> list[int]:
    """The numbers of lists to try, rising; all of them at the end where that is affordable."""
    return [probes for probes in _PROBES if probes < lists] + ([lists] if lists <= _PROBES[-1] else [])


def outcomes(
    estimates: np.ndarray, exact: np.ndarray, found: np.ndarray, truth: np.ndarray, good: np.ndarray, k: int
) -> list[tuple[int, float | None, float, float]]:
    """(depth, margin, mean recall@k, mean rows compared) of each way to re-rank candidates by falling estimate.

    `found` int [n, deepest] are the candidates, `estimates` float [n, deepest] their estimated scores and `exact` float
    [n, FIRST] the exact ones of the first. `good` bool [n, m] says which of the exact neighbours `truth` int [n, m]
    score no less than the k-th. Margins are tried in standard deviations of the estimates' error.
    """
    queries, deepest = np.arange(len(found)), found.shape[1]
    hits = np.zeros((len(found), deepest + 1), np.int64)
    for query, (candidates, rows, wanted) in enumerate(zip(found, truth, good, strict=True)):
        hits[query, 1:] = np.cumsum(np.isin(candidates, rows[wanted]))
    available = np.maximum(1, np.minimum(k, good.sum(axis=1)))
    kth = -np.sort(-exact, axis=1)[:, min(k, exact.shape[1]) - 1]
    known = np.isfinite(exact)
    spread = float((estimates[:, : exact.shape[1]] - exact)[known].std()) if known.any() else 0.0
    tried = []
    for margin in (None, *(spread * deviations for deviations in _MARGINS)):
        ends = np.full(len(found), deepest)
        if margin is not None:
            ends = np.maximum(FIRST, (estimates >= (kth - margin)[:, None]).sum(axis=1))
        for depth in _DEPTHS:
            compared = np.minimum(np.minimum(depth, ends), deepest)
            recall = np.minimum(hits[queries, compared], available) / available
            tried.append((depth, margin, float(recall.mean()), float(compared.mean())))
    return tried


def cheapest(measured: Iterable[tuple[Point, float, float]], target: float, rows: int, lists: int, dim: int) -> Point:
    """The point of least cost that reaches the target, else the one of highest recall.

    Of each point `measured` says the recall and the mean number of rows compared.
    """

    def cost(point: Point, compared: float) -> float:
        scan = point.nprobe * (_LIST_US + rows / lists * _CODE_US)
        return (scan + compared * _ROW_US) * dim / 512

    table = [(point, recall, cost(point, compared)) for point, recall, compared in measured]
    enough = [entry for entry in table if entry[1] >= target]
    if enough:
        return min(enough, key=lambda entry: entry[2])[0]
    return max(table, key=lambda entry: (entry[1], -entry[2]))[0]


def widest(points: Iterable[Point]) -> Point:
    """A point that serves every kind of query: for one of which nothing is known."""
    points = list(points)
    margins = [point.margin for point in points]
    margin = None if None in margins else max(margins)
    return Point(max(point.nprobe for point in points), max(point.rerank for point in points), margin)
