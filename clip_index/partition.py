"""Splits vectors among lists by their nearest centroid, without comparing every vector with every centroid.

1. The sample is split among few coarse groups by k-means, and each group among its share of the lists.
2. Lloyd's iterations over the whole sample correct what the split by groups cut apart.
3. A vector is compared with the centroids of the groups nearest to its own alone: with 4,096 lists that is a seventh
   of them, and one vector in thirty lands in the second nearest list or a later one instead of the nearest.

All comparisons run on the GPU where faiss finds one; what comes out is the same kind of numpy array.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

_NEAR_GROUPS = 6
_CROWDED = 1.6
_GROUP_SAMPLE = 256  # vectors a group; its centroid needs no more
_GROUP_ITERATIONS, _LIST_ITERATIONS, _LLOYD_ITERATIONS = 10, 6, 3
_SEED = 1234


class Partition:
    """Lists by their centroids, float32 [lists, dim]."""

    def __init__(self, centroids: np.ndarray):
        self.centroids = np.ascontiguousarray(centroids, np.float32)
        self._groups = _kmeans(self.centroids, group_count(len(centroids)), _GROUP_ITERATIONS)
        group = _nearest(self.centroids, self._groups)
        near = _nearest_many(self._groups, min(_NEAR_GROUPS, len(self._groups)))
        self._members = [np.flatnonzero(np.isin(group, groups)) for groups in near]
        self._candidates = [np.ascontiguousarray(self.centroids[members]) for members in self._members]

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """The list of each vector, int64 [n]."""
        lists = np.empty(len(vectors), np.int64)
        for group, rows in enumerate(_split(_nearest(vectors, self._groups), len(self._groups))):
            if len(rows):
                lists[rows] = self._members[group][_nearest(vectors[rows], self._candidates[group])]
        return lists


def train(sample: np.ndarray, lists: int) -> Partition:
    """Centroids of a sample float32 [n, dim], n at least `lists`."""
    rng = np.random.default_rng(_SEED)
    groups = group_count(lists)
    few = sample[rng.permutation(len(sample))[: groups * _GROUP_SAMPLE]]
    parts = [rows for rows in _split(_nearest(sample, _kmeans(few, groups, _GROUP_ITERATIONS)), groups) if len(rows)]
    shares = share(lists, np.array([len(rows) for rows in parts]))
    partition = Partition(
        np.concatenate(
            [_kmeans(sample[rows], count, _LIST_ITERATIONS) for rows, count in zip(parts, shares, strict=True) if count]
        )
    )
    for _ in range(_LLOYD_ITERATIONS):
        partition = Partition(_means(sample, partition.assign(sample), partition.centroids))
    return partition


def share(total: int, sizes: np.ndarray) -> np.ndarray:
    """`total` lists split in proportion to sizes, int [groups]; none has more than its size. `total` <= sum(sizes)."""
    exact = total * sizes / sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares


def group_count(lists: int) -> int:
    """Coarse groups of so many lists."""
    return max(1, round(math.sqrt(lists)))


def compared(lists: int) -> float:
    """How many centroids a vector is compared with: groups near each other have more members than others."""
    groups = group_count(lists)
    return groups + min(lists, _CROWDED * lists * min(_NEAR_GROUPS, groups) / groups)


def training(sample: int, lists: int) -> float:
    """How often a vector of the sample is compared with a centroid while `train` splits it, in all."""
    groups = group_count(lists)
    return sample * (groups + _LIST_ITERATIONS * lists / groups + _LLOYD_ITERATIONS * compared(lists))


def _means(sample: np.ndarray, lists: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The mean of each list; an empty one takes a random vector of the sample, which splits a list of many."""
    order = np.argsort(lists, kind="stable")
    counts = np.bincount(lists, minlength=len(before))
    filled = np.flatnonzero(counts)
    starts = np.concatenate([[0], np.cumsum(counts)])[filled]
    means = sample[np.random.default_rng(_SEED).integers(0, len(sample), len(before))]
    means[filled] = np.add.reduceat(sample[order], starts, axis=0) / counts[filled, None]
    return means


def _split(groups: np.ndarray, count: int) -> list[np.ndarray]:
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.searchsorted(groups[order], np.arange(1, count)))


def _kmeans(vectors: np.ndarray, count: int, iterations: int) -> np.ndarray:
    import faiss

    if count >= len(vectors):
        return vectors
    means = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=iterations,
        seed=_SEED,
        min_points_per_centroid=1,  # it would warn on stderr
        max_points_per_centroid=len(vectors),
        gpu=faiss.get_num_gpus() > 0,
    )
    means.train(vectors)
    return means.centroids


def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    import faiss

    vectors = np.ascontiguousarray(vectors)
    if faiss.get_num_gpus():
        return faiss.knn_gpu(_gpu(), vectors, centroids, 1)[1][:, 0]
    return faiss.knn(vectors, centroids, 1)[1][:, 0]


@functools.lru_cache(1)
def _gpu() -> Any:
    import faiss

    return faiss.StandardGpuResources()


def _nearest_many(centroids: np.ndarray, count: int) -> np.ndarray:
    import faiss

    return faiss.knn(centroids, centroids, count)[1]
