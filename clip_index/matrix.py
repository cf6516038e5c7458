"""The vectors of indices as one matrix: all rows of one index, or some rows of several, one index after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from clip_index.vectors import BLOCK_ROWS


class Matrix(Protocol):
    """Unit rows [rows, dim] in parts; `Vectors` is one too."""

    rows: int
    dim: int
    exact: bool
    """Whether these are the vectors themselves, not what codes say of them."""
    path: str | None
    """A folder whose .npy files hold just these rows, where there is one."""

    def take(self, rows: np.ndarray, dtype: type = np.float32) -> np.ndarray: ...

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]: ...

    def stored_blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...


class Stored(Protocol):
    """An index that gives its vectors back, as `clip_index.opened.Opened` does."""

    rows: int
    dim: int
    exact: bool

    def vectors_of(self, rows: np.ndarray) -> np.ndarray: ...

    def stored(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]: ...


class IndexMatrix:
    """The rows of an open index, those of a rising list where one is given. Safe to share between threads."""

    path = None

    def __init__(self, index: Stored, picked: np.ndarray | None = None):
        self._index, self._picked = index, picked
        self.rows, self.dim = index.rows if picked is None else len(picked), index.dim
        self.exact = index.exact

    def take(self, rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """[n, dim] of `dtype`: the given rows in the given order."""
        rows = np.asarray(rows, np.int64)
        return self._index.vectors_of(rows if self._picked is None else self._picked[rows]).astype(dtype, copy=False)

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 [up to `rows`, dim]) over the whole matrix, in order."""
        for start in range(0, self.rows, rows):
            yield start, self.take(np.arange(start, min(start + rows, self.rows)))

    def stored_blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers int64 [n], float32 [n, dim]) over the whole matrix, in the order in which it is stored."""
        for start in range(0, self._index.rows, rows):
            numbers, block = self._index.stored(start, min(start + rows, self._index.rows))
            if self._picked is not None:
                at = np.searchsorted(self._picked, numbers)
                kept = self._picked[np.minimum(at, len(self._picked) - 1)] == numbers
                numbers, block = at[kept], block[kept]
            yield numbers, block.astype(np.float32, copy=False)


class AsStored:
    """A matrix in place of an open index, to pick rows of."""

    def __init__(self, matrix: Matrix):
        self.rows, self.dim, self.exact, self.vectors_of = matrix.rows, matrix.dim, matrix.exact, matrix.take

    def stored(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(row numbers int64 [n], vectors float32 [n, dim]) from one row to another."""
        rows = np.arange(start, end)
        return rows, self.vectors_of(rows)


class JoinedMatrix:
    """Several matrices of the same dimension, one below the other."""

    path = None

    def __init__(self, parts: Sequence[Matrix]):
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(part.rows for part in parts)], dtype=np.int64)
        self.rows, self.dim = int(self._starts[-1]), parts[0].dim
        self.exact = all(part.exact for part in parts)

    def take(self, rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """[n, dim] of `dtype`: the given rows in the given order."""
        rows = np.asarray(rows, np.int64)
        taken = np.empty((len(rows), self.dim), dtype)
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for place in np.unique(places):
            mine = places == place
            taken[mine] = self._parts[place].take(rows[mine] - self._starts[place], dtype)
        return taken

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 [up to `rows`, dim]) over the whole matrix, in order."""
        for part, first in zip(self._parts, self._starts, strict=False):
            for start, block in part.blocks(rows):
                yield int(first) + start, block

    def stored_blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers int64 [n], float32 [n, dim]) over the whole matrix, in the order in which it is stored."""
        for part, first in zip(self._parts, self._starts, strict=False):
            for numbers, block in part.stored_blocks(rows):
                yield first + numbers, block
