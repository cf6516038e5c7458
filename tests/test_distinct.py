from __future__ import annotations

import numpy as np
from embedding_fakes import random_rows

from clip_index.distinct import distinct
from clip_index.types import normalize


def search(vectors, query):
    """A fetch over the rows by falling score, and the sizes that it was asked for."""
    order = np.argsort(-(vectors @ query), kind="stable")
    asked = []

    def fetch(count):
        asked.append(count)
        return (vectors @ query)[order[:count]], order[:count]

    return fetch, asked


def greedy(vectors, query, k, threshold):
    """The definition, pair by pair."""
    kept = []
    for row in np.argsort(-(vectors @ query), kind="stable"):
        if all(float(vectors[row] @ vectors[other]) < threshold for other in kept):
            kept.append(int(row))
    return kept[:k]


def with_copies(count, copies, noise=0.02):
    rows = np.repeat(random_rows(count), copies, axis=0)
    return normalize(rows + noise * random_rows(count * copies, seed=1))


def test_as_many_as_wanted_are_distinct():
    vectors, query = with_copies(40, 25), random_rows(1, seed=2)[0]
    fetch, asked = search(vectors, query)
    scores, rows = distinct(fetch, lambda rows: vectors[rows], 10, 0.95)
    assert rows.tolist() == greedy(vectors, query, 10, 0.95)
    assert len(set(rows // 25)) == 10
    np.testing.assert_array_equal(scores, (vectors @ query)[rows])
    assert asked == [20, 80, 320]


def test_fewer_where_there_are_no_more():
    vectors, query = with_copies(3, 7), random_rows(1, seed=2)[0]
    fetch, _ = search(vectors, query)
    _, rows = distinct(fetch, lambda rows: vectors[rows], 10, 0.95)
    assert len(rows) == 3
    assert rows.tolist() == greedy(vectors, query, 10, 0.95)


def test_a_chain_of_copies_is_cut_by_the_best_of_it():
    """b is like a and like c, but a is not like c: b goes, c stays."""
    angles = np.deg2rad([0, 15, 30])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    fetch, _ = search(vectors, np.float32([1, 0]))
    _, rows = distinct(fetch, lambda rows: vectors[rows], 3, 0.95)
    assert rows.tolist() == [0, 2]


def test_nothing_is_left_out_above_any_similarity():
    vectors, query = random_rows(30), random_rows(1, seed=2)[0]
    fetch, asked = search(vectors, query)
    _, rows = distinct(fetch, lambda rows: vectors[rows], 5, 1.1)
    assert rows.tolist() == np.argsort(-(vectors @ query))[:5].tolist()
    assert asked == [10]
