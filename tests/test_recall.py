from __future__ import annotations

import numpy as np
import pytest
from embedding_fakes import brute_force, make_embeddings, random_rows, stored

from clip_index.recall import Queries, exact_neighbours, measure, scores_of, tie_aware_recall, without_own
from clip_index.vectors import Vectors


def matrix(tmp_path, rows, **options):
    return Vectors(str(tmp_path), make_embeddings(tmp_path, {"image": rows}, **options), "image")


def test_ties_count_as_found():
    exact = np.array([[0.9, 0.8, 0.8, 0.5]])
    # by hand: at k=2 the second best is 0.8, which two rows share; either is right
    assert tie_aware_recall(exact, np.array([[0.9, 0.8, 0.1]]), 2) == [1.0]
    assert tie_aware_recall(exact, np.array([[0.8, 0.8, 0.1]]), 2) == [1.0]
    assert tie_aware_recall(exact, np.array([[0.9, 0.5, 0.1]]), 2) == [0.5]
    assert tie_aware_recall(exact, np.array([[0.8, 0.8, 0.1]]), 1) == [0.0]
    assert tie_aware_recall(exact, np.array([[0.9, 0.8, 0.5]]), 3) == [2 / 3]


def test_fewer_rows_than_k():
    exact = np.array([[0.9, 0.8, -np.inf], [-np.inf] * 3])
    found = np.array([[0.8, -np.inf, -np.inf], [-np.inf] * 3])
    np.testing.assert_array_equal(tie_aware_recall(exact, found, 3), [0.5, 1.0])


def test_own_row_is_left_out_and_the_order_kept():
    rows = np.array([[7, 3, 5, 1], [2, 4, 6, 8]])
    np.testing.assert_array_equal(without_own(rows, np.array([3, 9]), 3), [[7, 5, 1], [2, 4, 6]])
    np.testing.assert_array_equal(without_own(rows, None, 2), [[7, 3], [2, 4]])


@pytest.mark.parametrize("block", [7, 16384])
def test_exact_neighbours_agree_with_brute_force(tmp_path, monkeypatch, block):
    rows, queries = random_rows(200), random_rows(20, seed=1)
    vectors = matrix(tmp_path, rows, shard_rows=[50, 0, 149, 1])
    blocks = vectors.blocks
    monkeypatch.setattr(vectors, "blocks", lambda _: blocks(block))
    scores, found = exact_neighbours(vectors, Queries("image", queries), 10)
    np.testing.assert_array_equal(found, brute_force(stored(rows), queries, 10))
    np.testing.assert_allclose(scores, scores_of(vectors, queries, found), atol=1e-6)
    own = np.arange(20)
    _, found = exact_neighbours(vectors, Queries("image", vectors.take(own), own), 10)
    np.testing.assert_array_equal(found, brute_force(stored(rows), stored(rows)[:20], 11)[:, 1:])


def test_exact_neighbours_pad_where_there_are_too_few_rows(tmp_path):
    vectors = matrix(tmp_path, random_rows(3), shard_rows=[3])
    scores, found = exact_neighbours(vectors, Queries("image", vectors.take([1]), np.array([1])), 5)
    assert list(np.isfinite(scores[0])) == [True, True, False, False, False]
    assert set(found[0, :2]) == {0, 2}
    assert list(found[0, 2:]) == [-1, -1, -1]


def test_scores_are_inner_products_and_padding_is_nothing(tmp_path):
    rows, queries = random_rows(40), random_rows(33, seed=1)
    vectors = matrix(tmp_path, rows)
    asked = np.tile([5, 0, -1], (33, 1))
    expected = queries.astype(np.float64) @ stored(rows).astype(np.float64)[[5, 0]].T
    scores = scores_of(vectors, queries, asked)
    np.testing.assert_allclose(scores[:, :2], expected, atol=1e-12)
    assert (scores[:, 2] == -np.inf).all()


def test_measure_of_a_search_that_misses_half(tmp_path):
    rows = random_rows(120)
    vectors = matrix(tmp_path, rows)
    kept = np.arange(0, 120, 2)

    def half(queries, k):  # sees every other row alone
        found = kept[brute_force(stored(rows)[kept], queries, min(k, 60))]
        return np.zeros(found.shape), found

    queries = Queries("text", random_rows(30, seed=1))
    truth = brute_force(stored(rows), queries.vectors, 10)
    report = measure(half, vectors, queries, ks=(1, 10))
    assert report["queries"] == 30
    assert report["recall@10"]["mean"] == pytest.approx((truth % 2 == 0).mean())
    assert report["recall@1"]["mean"] == pytest.approx((truth[:, 0] % 2 == 0).mean())
    each = (truth % 2 == 0).mean(axis=1)
    assert report["recall@10"]["interval"] == pytest.approx(1.96 * each.std() / np.sqrt(30))


def test_copies_of_a_row_do_not_lower_recall(tmp_path):
    rows = np.repeat(random_rows(4), 30, axis=0)
    vectors = matrix(tmp_path, rows)

    def last_copies_first(queries, k):
        order = np.lexsort((-np.arange(120)[None].repeat(len(queries), 0), -(queries @ stored(rows).T)), axis=1)
        return np.zeros((len(queries), k)), order[:, :k]

    own = np.array([0, 30, 119])
    report = measure(last_copies_first, vectors, Queries("image", vectors.take(own), own), ks=(10,))
    assert report["recall@10"]["mean"] == 1.0
