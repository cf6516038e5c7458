from __future__ import annotations

import numpy as np
import pytest

from clip_index.points import FIRST, Point, cheapest, grid, outcomes, widest
from clip_index.recall import reaching


def tried(found, truth, good, k, *, estimates=None, exact=None):
    estimates = np.zeros(found.shape) if estimates is None else estimates
    exact = np.zeros((len(found), FIRST)) if exact is None else exact
    return {(depth, margin): entry for depth, margin, *entry in outcomes(estimates, exact, found, truth, good, k)}


def test_recall_by_depth_counted_by_hand():
    found = np.full((1, 300), -1)
    found[0, 0], found[0, 150], found[0, 250] = 7, 8, 9
    truth, good = np.array([[7, 8, 9, 5]]), np.array([[True, True, True, True]])
    reached = tried(found, truth, good, 4)
    assert [reached[depth, None] for depth in (100, 200, 300, 1600)] == [
        [0.25, 100],
        [0.5, 200],
        [0.75, 300],
        [0.75, 300],
    ]


def test_a_margin_saves_the_rows_whose_estimate_is_too_far_below():
    found = np.arange(400)[None]
    truth, good = np.array([[0, 110, 250]]), np.array([[True, True, True]])
    # the exact scores of the first: 1.0 and 0.9 in turn, so that estimates of 0.9 and 1.0 err by 0.1, half of them
    exact = np.where(np.arange(FIRST) % 2, 0.9, 1.0)[None]
    estimates = np.full((1, 400), 1.0)
    spread = (estimates[:, :FIRST] - exact).std()
    assert spread == pytest.approx(0.05)
    estimates[0, FIRST:200], estimates[0, 200:] = 1.0 - 1.7 * spread, 1.0 - 2.5 * spread
    reached = {
        margin / spread: entry
        for (depth, margin), entry in tried(found, truth, good, 3, estimates=estimates, exact=exact).items()
        if depth == 400 and margin is not None
    }
    by_margin = {round(deviations, 3): entry for deviations, entry in reached.items()}
    assert by_margin == {
        1.5: [pytest.approx(1 / 3), 100],
        2.0: [pytest.approx(2 / 3), 200],
        3.0: [pytest.approx(1), 400],
    }


def test_what_ties_with_the_last_neighbour_counts_once():
    exact = np.array([[0.9, 0.8, 0.8, 0.5]])
    good = reaching(exact, 2)
    assert good.tolist() == [[True, True, True, False]]
    found = np.array([[2, 3] + [-1] * 98, [1, 2] + [-1] * 98])
    truth = np.array([[1, 2, 3, 4]])
    reached = tried(found, truth.repeat(2, 0), good.repeat(2, 0), 2)
    assert reached[100, None][0] == 1.0  # either two of the three


def test_the_cheapest_point_that_reaches_the_target():
    measured = [
        (Point(8, 100), 0.9, 100),
        (Point(64, 100), 0.99, 100),
        (Point(32, 400), 0.99, 400),
        (Point(1024, 1600), 1.0, 1600),
        (Point(32, 800, 0.1), 0.99, 200),
    ]
    assert cheapest(measured[:4], 0.99, 1_000_000, 4096, 512) == Point(32, 400)
    assert cheapest(measured, 0.99, 1_000_000, 4096, 512) == Point(32, 800, 0.1)  # it compares less
    assert cheapest(measured, 0.995, 1_000_000, 4096, 512) == Point(1024, 1600)
    assert cheapest(measured[:2], 0.999, 1_000_000, 4096, 512) == Point(64, 100)


def test_the_widest_serves_all_and_the_grid_ends_with_every_list():
    assert widest([Point(8, 400), Point(64, 100)]) == Point(64, 400)
    assert widest([Point(8, 400, 0.1), Point(64, 100, 0.2)]) == Point(64, 400, 0.2)
    assert widest([Point(8, 400, 0.1), Point(64, 100)]).margin is None
    assert grid(20) == [4, 8, 12, 16, 20]
    assert grid(5000)[-1] == 1024
