from __future__ import annotations

import numpy as np
import pytest
from embedding_fakes import make_embeddings, random_rows, stored

from clip_index import duplicates
from clip_index.duplicates import Forest, duplicate_groups, representatives
from clip_index.types import normalize
from clip_index.vectors import Vectors


def components(rows, threshold, allowed=None):
    """The lowest row of each row's connected component, by a walk over all pairs."""
    alike = (rows @ rows.T) >= threshold
    if allowed is not None:
        alike &= allowed[:, None] & allowed[None, :]
    roots = np.full(len(rows), -1)
    for row in range(len(rows)):
        if roots[row] < 0:
            reached, roots[row] = [row], row
            while reached:
                more = np.flatnonzero(alike[reached.pop()] & (roots < 0))
                roots[more] = row
                reached += more.tolist()
    return roots


def with_copies(count, extra, noise, dim=16, seed=0):
    """`count` random rows and `extra` noisy copies of some of them, shuffled."""
    rng = np.random.default_rng(seed)
    rows = random_rows(count, dim, seed)
    copies = rows[rng.integers(0, count, extra)]
    rows = np.concatenate([rows, normalize(copies + noise * rng.standard_normal(copies.shape))])
    return stored(rng.permutation(rows))


def opened(folder, rows):
    return Vectors(str(folder), make_embeddings(folder, {"image": rows}), "image")


@pytest.mark.parametrize("threshold", [0.9, 0.97, 0.999])
def test_groups_are_the_connected_components(tmp_path, threshold):
    rows = with_copies(300, 200, 0.01)
    expected = components(rows, threshold)
    found = duplicate_groups(opened(tmp_path, rows), threshold)
    np.testing.assert_array_equal(found, expected)
    assert 250 < len(set(expected)) < 500


def test_some_of_the_rows(tmp_path):
    rows = with_copies(100, 100, 0.05)
    allowed = np.arange(200) % 3 > 0
    found = duplicate_groups(opened(tmp_path, rows), 0.95, allowed=allowed)
    np.testing.assert_array_equal(found, components(rows, 0.95, allowed))


def test_pairs_are_compared_part_by_part(tmp_path, monkeypatch):
    rows = with_copies(100, 100, 0.05)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 1500)
    np.testing.assert_array_equal(duplicate_groups(opened(tmp_path, rows), 0.95), components(rows, 0.95))


def test_cells_miss_almost_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "_WHOLE_ROWS", 100)
    monkeypatch.setattr(duplicates, "_CELL_ROWS", 64)
    rows = with_copies(3000, 1000, 0.02, dim=32)
    expected = components(rows, 0.97)
    vectors = opened(tmp_path, rows)
    found = duplicate_groups(vectors, 0.97)
    dropped = expected != np.arange(len(rows))
    assert dropped.sum() > 900
    assert (found[dropped] == expected[dropped]).mean() > 0.99
    assert (found[~dropped] == expected[~dropped]).all()
    monkeypatch.setattr(duplicates, "_PASSES", 1)
    once = duplicate_groups(vectors, 0.97)
    assert (once[dropped] == expected[dropped]).mean() < (found[dropped] == expected[dropped]).mean()


def test_the_same_picture_a_thousand_times_is_compared_once(tmp_path, monkeypatch):
    compared = []
    within = duplicates._join_within
    monkeypatch.setattr(duplicates, "_join_within", lambda *given: [compared.append(len(given[2])), within(*given)])
    rows = stored(random_rows(40))
    rows = rows[np.random.default_rng(0).permutation(np.r_[np.zeros(1000, int), 0:40])]
    groups = duplicate_groups(opened(tmp_path, rows), 0.99)
    assert compared == [40]
    np.testing.assert_array_equal(groups, components(rows, 0.99))


def test_pairs_in_any_order_make_the_same_groups():
    rng = np.random.default_rng(1)
    left, right = rng.integers(0, 500, (2, 400))
    expected = np.arange(500)
    for _ in range(500):  # the lowest row of the group travels along the pairs
        before = expected.copy()
        np.minimum.at(expected, left, expected[right])
        np.minimum.at(expected, right, expected[left])
        if np.array_equal(before, expected):
            break
    for order in (np.arange(400), rng.permutation(400)):
        forest = Forest(500)
        for part in np.array_split(order, 7):
            forest.join(left[part], right[part])
        np.testing.assert_array_equal(forest.roots(), expected)


def test_one_of_each_group_stays():
    groups = np.array([0, 1, 0, 3, 1, 0])
    assert representatives(groups).tolist() == groups.tolist()
    areas = np.array([5, 2, 9, 1, 2, 9])
    assert representatives(groups, areas).tolist() == [2, 1, 2, 3, 1, 2]
