"""Groups of near-duplicates over a whole set of vectors.

1. Rows with the same bytes are one to begin with: a placeholder that stands for a million pictures is looked at once.
2. The rest is split among the cells round randomly drawn rows, some 256 rows each; within a cell each row is compared
   with every other. What one split cuts apart the next one, round other rows, finds.
3. Pairs at least as similar as the threshold are joined (union-find), so a group may be a chain of such pairs.
"""

from __future__ import annotations

import numpy as np

from clip_index.matrix import Matrix

_CELL_ROWS = 256
_PASSES = 3
_WHOLE_ROWS = 8192
"""Up to so many rows are all compared with each other: nothing is missed."""
_PAIRS_AT_ONCE = 1 << 24
_SEED = 20


class Forest:
    """Union-find over rows, in arrays: the root of a group is its lowest row."""

    def __init__(self, rows: int):
        self.parents = np.arange(rows, dtype=np.int64)

    def find(self, rows: np.ndarray) -> np.ndarray:
        """The roots of rows."""
        roots = self.parents[rows]
        while True:
            above = self.parents[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Make one group of each pair's two."""
        while len(left):
            left, right = self.find(left), self.find(right)
            apart = left != right
            left, right = left[apart], right[apart]
            # of several pairs with the same higher root one wins; the others come again
            self.parents[np.maximum(left, right)] = np.minimum(left, right)

    def roots(self) -> np.ndarray:
        """The root of every row, int64 [rows]."""
        self.parents = self.find(np.arange(len(self.parents)))
        return self.parents


def duplicate_groups(vectors: Matrix, threshold: float, *, allowed: np.ndarray | None = None) -> np.ndarray:
    """int64 [rows]: the lowest row of each row's group, itself where it is like no other.

    Rows are alike whose cosine similarity is `threshold` or more. `allowed` is a mask of the rows to look at.
    """
    forest = Forest(vectors.rows)
    rows = np.arange(vectors.rows) if allowed is None else np.flatnonzero(allowed)
    rows = _join_copies(forest, vectors, rows)
    whole = len(rows) <= _WHOLE_ROWS
    for number in range(1 if whole else _PASSES):
        for cell in [rows] if whole else _cells(vectors, rows, number):
            _join_within(forest, vectors, cell, threshold)
    return forest.roots()


def _join_copies(forest: Forest, vectors: Matrix, rows: np.ndarray) -> np.ndarray:
    """Join rows of the same values, known by a hash of 64 bits; returns the first of each."""
    factors = np.random.default_rng(_SEED).integers(0, 2**64, vectors.dim, dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(vectors.rows, np.uint64)
    for start, block in vectors.blocks():
        bits = np.ascontiguousarray(block, np.float32).view(np.uint32)
        hashes[start : start + len(block)] = (bits * factors).sum(axis=1, dtype=np.uint64)
    _, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    forest.join(rows, rows[first[group]])
    return np.sort(rows[first])


def _cells(vectors: Matrix, rows: np.ndarray, number: int) -> list[np.ndarray]:
    import faiss

    drawn = np.random.default_rng([_SEED, number]).choice(rows, len(rows) // _CELL_ROWS, replace=False)
    centres = vectors.take(drawn)
    cell = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), 16384):
        block = vectors.take(rows[start : start + 16384])
        cell[start : start + len(block)] = faiss.knn(block, centres, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    order = np.argsort(cell, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(cell[order])) + 1)


def _join_within(forest: Forest, vectors: Matrix, rows: np.ndarray, threshold: float) -> None:
    values = vectors.take(rows)
    step = max(1, _PAIRS_AT_ONCE // max(1, len(rows)))
    for start in range(0, len(rows), step):
        left, right = np.nonzero(values[start : start + step] @ values[start:].T >= threshold)
        ahead = left < right
        forest.join(rows[start + left[ahead]], rows[start + right[ahead]])


def representatives(groups: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """int64 [rows]: for each row the row of its group with the highest weight, the first of those."""
    if weights is None:
        return groups
    order = np.lexsort((np.arange(len(groups)), -weights, groups))
    first = np.r_[True, np.diff(groups[order]) != 0]
    chosen = np.empty(len(groups), np.int64)
    chosen[groups[order][first]] = order[first]
    return chosen[groups]
