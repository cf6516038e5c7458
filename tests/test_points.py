from __future__ import annotations

import numpy as np

from clip_index.points import Point, cheapest, found_at, grid, widest
from clip_index.recall import reaching


def test_recall_by_depth_counted_by_hand():
    found = np.full((1, 300), -1)
    found[0, 0], found[0, 150], found[0, 250] = 7, 8, 9
    truth, good = np.array([[7, 8, 9, 5]]), np.array([[True, True, True, True]])
    reached = found_at(found, truth, good, 4)
    assert [reached[depth] for depth in (100, 200, 300, 1600)] == [0.25, 0.5, 0.75, 0.75]


def test_what_ties_with_the_last_neighbour_counts_once():
    exact = np.array([[0.9, 0.8, 0.8, 0.5]])
    good = reaching(exact, 2)
    assert good.tolist() == [[True, True, True, False]]
    found = np.array([[2, 3] + [-1] * 98, [1, 2] + [-1] * 98])
    truth = np.array([[1, 2, 3, 4]])
    reached = found_at(found, truth.repeat(2, 0), good.repeat(2, 0), 2)
    assert reached[100] == 1.0  # either two of the three


def test_the_cheapest_point_that_reaches_the_target():
    measured = [(Point(8, 100), 0.9), (Point(64, 100), 0.99), (Point(32, 400), 0.99), (Point(1024, 1600), 1.0)]
    assert cheapest(measured, 0.99, 1_000_000, 4096, 512) == Point(32, 400)
    assert cheapest(measured, 0.995, 1_000_000, 4096, 512) == Point(1024, 1600)
    assert cheapest(measured[:2], 0.999, 1_000_000, 4096, 512) == Point(64, 100)


def test_the_widest_serves_all_and_the_grid_ends_with_every_list():
    assert widest([Point(8, 400), Point(64, 100)]) == Point(64, 400)
    assert grid(20) == [4, 8, 12, 16, 20]
    assert grid(5000)[-1] == 1024
