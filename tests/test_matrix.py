from __future__ import annotations

import numpy as np
from embedding_fakes import make_embeddings, random_rows, stored

from clip_index.matrix import IndexMatrix, JoinedMatrix
from clip_index.vectors import Vectors


class Index:
    def __init__(self, rows):
        self._held, (self.rows, self.dim), self.exact = rows, rows.shape, True

    def vectors_of(self, rows):
        return self._held[rows]

    def stored(self, start, end):
        """Stored the other way round."""
        rows = self.rows - 1 - np.arange(start, end)
        return rows, self._held[rows]


def check(matrix, expected):
    assert (matrix.rows, matrix.dim) == expected.shape
    starts, blocks = zip(*matrix.blocks(7), strict=True)
    assert list(starts) == list(np.cumsum([0, *map(len, blocks)])[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    numbers, blocks = (np.concatenate(part) for part in zip(*matrix.stored_blocks(7), strict=True))
    assert sorted(numbers) == list(range(len(expected)))
    np.testing.assert_array_equal(blocks, expected[numbers])
    wanted = np.random.default_rng(0).integers(0, len(expected), 50)
    np.testing.assert_array_equal(matrix.take(wanted), expected[wanted])
    half = matrix.take(wanted, np.float16)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, expected[wanted])


def test_all_rows_of_an_index_or_some():
    rows = stored(random_rows(40))
    check(IndexMatrix(Index(rows)), rows)
    picked = np.array([0, 3, 7, 8, 12, 30, 31])
    check(IndexMatrix(Index(rows), picked), rows[picked])


def test_one_below_the_other(tmp_path):
    first, second, third = (stored(random_rows(count, seed=count)) for count in (30, 1, 20))
    picked = np.arange(0, 30, 2)
    manifest = make_embeddings(tmp_path, {"image": third})
    parts = [IndexMatrix(Index(first), picked), IndexMatrix(Index(second)), Vectors(str(tmp_path), manifest, "image")]
    check(JoinedMatrix(parts), np.concatenate([first[picked], second, third]))
