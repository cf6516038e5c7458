"""What an index gives: recall of held-out queries, the operating points that reach a target, the time of a query.

1. Exact search finds the neighbours of all held-out queries in one pass over the vectors.
2. Half of the queries of each kind choose the operating point of that kind: text queries do not lie where images do,
   and need to look further.
3. The other half say what was reached.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from clip_index import points, recall, speed
from clip_index.opened import Opened
from clip_index.points import Point
from clip_index.recall import Queries
from clip_index.steps import Steps
from clip_index.two_stage import TwoStage
from clip_index.types import MODALITIES
from clip_index.vectors import Vectors

_KS = (1, 10, 100)
_MARGIN = 0.3  # aim that share of what is left to 1 higher: the other half of the queries may be harder
MORE_STEPS = 2  # with more lists fewer candidates may do


def measure(
    opened: Opened, vectors: Vectors, held_out: list[Queries], target: float, steps: Steps
) -> tuple[dict[str, Any], dict[str, Point]]:
    """(what report.json says, operating points by kind of query) of an opened index."""
    part: dict[str, Any] = {"recall": {}, "recall_against": "vectors" if vectors.exact else "codes"}
    with steps.timed("exact search"):
        truths = _truths(vectors, held_out)
    chosen: dict[str, Point] = {}
    if isinstance(opened, TwoStage):
        with steps.timed("tune"):
            for queries, truth in zip(held_out, truths, strict=True):
                chosen[queries.kind] = _tune(opened, vectors, *_half(queries, truth, 0), target)
        widest = points.widest(chosen.values()) if chosen else Point(min(128, opened.lists), points.DEEPEST)
        chosen = {kind: chosen.get(kind, widest) for kind in MODALITIES}
        part["points"] = {kind: asdict(point) for kind, point in chosen.items()}
        part["coarse_recall"] = {}
        part["lists"] = _lists(opened)
    with steps.timed("measure"):
        for queries, truth in zip(held_out, truths, strict=True):
            point = chosen.get(queries.kind)
            if isinstance(opened, TwoStage):
                queries, truth = _half(queries, truth, 1)
                part["coarse_recall"][queries.kind] = recall.measure(
                    lambda asked, k, at=point: opened.coarse(asked, k, at), vectors, queries, truth=truth
                )
            part["recall"][queries.kind] = recall.measure(
                lambda asked, k, at=point: opened.search(asked, k, at), vectors, queries, truth=truth
            )
        kind = held_out[0].kind if held_out else MODALITIES[0]
        sample = held_out[0].vectors if held_out else vectors.take(np.zeros(1, np.int64))
        part["speed"] = speed.measure(opened, sample, chosen.get(kind))
        part["ms"] = part["speed"]["one_thread"]
    return part, chosen


def _truths(vectors: Vectors, held_out: list[Queries]) -> list[tuple[np.ndarray, np.ndarray]]:
    if not held_out:
        return []
    own = [np.full(len(queries.vectors), -1) if queries.own is None else queries.own for queries in held_out]
    everything = Queries("all", np.concatenate([queries.vectors for queries in held_out]), np.concatenate(own))
    scores, rows = recall.exact_neighbours(vectors, everything, max(_KS))
    ends = np.cumsum([len(queries.vectors) for queries in held_out])[:-1]
    return list(zip(np.split(scores, ends), np.split(rows, ends), strict=True))


def _half(
    queries: Queries, truth: tuple[np.ndarray, np.ndarray], which: int
) -> tuple[Queries, tuple[np.ndarray, np.ndarray]]:
    """Every other query, from `which` on; all of them where there is only one."""
    part = slice(which if len(queries.vectors) > 1 else 0, None, 2)
    own = None if queries.own is None else queries.own[part]
    return Queries(queries.kind, queries.vectors[part], own), (truth[0][part], truth[1][part])


def _tune(
    opened: TwoStage, vectors: Vectors, queries: Queries, truth: tuple[np.ndarray, np.ndarray], target: float
) -> Point:
    aim = target + _MARGIN * (1 - target)
    measured, more = [], MORE_STEPS
    for nprobe in points.grid(opened.lists):
        tried = try_lists(opened, vectors, queries, truth, nprobe)
        measured += tried
        if max(reached for _, reached, _ in tried) >= aim:
            more -= 1
            if more < 0:
                break
    return points.cheapest(measured, aim, opened.rows, opened.lists, opened.dim)


def try_lists(
    opened: TwoStage, vectors: Vectors, queries: Queries, truth: tuple[np.ndarray, np.ndarray], nprobe: int
) -> list[tuple[Point, float, float]]:
    """(point, mean recall@10, mean rows compared) of each way to re-rank what is found in so many lists."""
    scores, rows = truth
    wanted = min(opened.rows, points.DEEPEST + 1)
    estimates, found = opened.coarse(queries.vectors, wanted, Point(nprobe, wanted))
    found, estimates = recall.without_own(found, queries.own, points.DEEPEST, estimates)
    exact = recall.scores_of(vectors, queries.vectors, found[:, : points.FIRST])
    tried = points.outcomes(estimates, exact, found, rows, recall.reaching(scores, 10), 10)
    return [(Point(nprobe, depth, margin), reached, compared) for depth, margin, reached, compared in tried]


def _lists(opened: TwoStage) -> dict[str, Any]:
    sizes = opened.sizes
    return {
        "count": opened.lists,
        "empty": int((sizes == 0).sum()),
        "largest": int(sizes.max()),
        # 1 where all are equal; what a scan takes more than it would take then
        "imbalance": float(opened.lists * (sizes.astype(np.float64) ** 2).sum() / sizes.sum() ** 2),
    }
