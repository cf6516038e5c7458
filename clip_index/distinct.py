"""Results without near-copies of better results: more is fetched until as many are distinct as are wanted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Fetch = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""n to (scores [m], rows [m]) of the n nearest by falling score; m is less than n where there are no more."""

_STEP = 4


def distinct(
    fetch: Fetch, vectors_of: Callable[[np.ndarray], np.ndarray], k: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) of the k nearest rows that are each less similar than `threshold` to every better one of them.

    Fewer where there are no more. `vectors_of` gives the unit rows float32 [n, dim] of row numbers.
    """
    wanted = 2 * k
    while True:
        scores, rows = fetch(wanted)
        kept = _first_of_each(vectors_of(rows), threshold, k)
        if len(kept) == k or len(rows) < wanted:
            return scores[kept], rows[kept]
        wanted *= _STEP


def _first_of_each(vectors: np.ndarray, threshold: float, k: int) -> np.ndarray:
    """Places of the first k rows that are not covered by one before them."""
    covered = np.zeros(len(vectors), bool)
    kept: list[int] = []
    for place in range(len(vectors)):
        if not covered[place]:
            kept.append(place)
            if len(kept) == k:
                break
            covered |= vectors @ vectors[place] >= threshold
    return np.array(kept, np.int64)
