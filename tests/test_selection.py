from __future__ import annotations

import faiss
import numpy as np
import pytest
from embedding_fakes import make_embeddings, random_rows, stored

from clip_index import selection
from clip_index.selection import Selection, compare, plan, search_among
from clip_index.vectors import Vectors

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 3000


class Lists:
    """An inverted-file index as a `Search`, with a note of each call."""

    def __init__(self, vectors, nprobe=8):
        quantizer = faiss.IndexFlatIP(vectors.shape[1])
        self.index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], 64, faiss.METRIC_INNER_PRODUCT)
        self.quantizer, self.nprobe, self.calls = quantizer, nprobe, []
        self.index.train(vectors)
        self.index.add(vectors)

    def __call__(self, queries, k, *, selector=None, widen=1.0):
        self.calls.append((len(queries), k, selector is not None, widen))
        nprobe = 64 if widen == np.inf else min(64, int(self.nprobe * widen))
        return self.index.search(queries, k, params=faiss.SearchParametersIVF(sel=selector, nprobe=nprobe))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(selection, "_FEW_ROWS", 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    rows = stored(random_rows(COUNT))
    manifest = make_embeddings(folder, {"image": rows})
    return rows, Vectors(str(folder), manifest, "image"), Lists(rows)


def allow(share, seed=3):
    allowed = np.zeros(COUNT, bool)
    allowed[np.random.default_rng(seed).permutation(COUNT)[: round(share * COUNT)]] = True
    return Selection(allowed)


def scan(rows, chosen, queries, k):
    """Brute force over the chosen rows alone."""
    places = np.flatnonzero(chosen.allowed)
    scores = queries.astype(np.float64) @ rows[places].astype(np.float64).T
    return places[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def test_the_plan_follows_the_share():
    assert plan(allow(0.0)) == plan(allow(0.005)) == plan(allow(20 / COUNT)) == "compare"
    assert plan(allow(0.011)) == plan(allow(0.29)) == "skip"
    assert plan(allow(0.31)) == plan(allow(1.0)) == "leave out"


def test_a_small_share_of_very_many_rows_is_not_compared(monkeypatch):
    monkeypatch.setattr(selection, "_MANY_ROWS", 25)
    assert plan(allow(0.009)) == "skip"


@pytest.mark.parametrize("share", [0.001, 0.009, 0.02, 0.1, 0.29, 0.35, 0.9, 1.0])
@pytest.mark.parametrize("exact", [True, False])
def test_as_many_are_found_as_match_and_they_are_near(data, share, exact):
    rows, vectors, search = data
    chosen, queries = allow(share), random_rows(40, seed=5)
    scores, found = search_among(chosen, search, vectors if exact else None, queries, 10)
    truth = scan(rows, chosen, queries, 10)
    assert found.shape == truth.shape == (40, min(10, chosen.count))
    assert chosen.allowed[found].all()
    assert all(len(set(row)) == len(row) for row in found)
    np.testing.assert_allclose(scores, np.einsum("nd,nkd->nk", queries, rows[found]), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)])
    unfiltered = search(queries, 10)[1]
    usual = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(unfiltered, scan(rows, allow(1.0), queries, 10), strict=True)]
    )
    assert recall >= min(1.0, usual) - 0.1
    if plan(chosen) == "compare":
        np.testing.assert_array_equal(found, truth)


def test_matches_far_from_the_query_are_found_all_the_same(data):
    """The rows least like the query are in lists that no probe reaches."""
    rows, vectors, _ = data
    query = random_rows(1, seed=8)
    order = np.argsort(rows @ query[0])
    for count in (60, 2000):
        allowed = np.zeros(COUNT, bool)
        allowed[order[:count]] = True
        for exact in (vectors, None):
            search = Lists(rows, nprobe=1)
            _, found = search_among(Selection(allowed), search, exact, query, 50)
            assert found.shape == (1, 50)
            assert set(found[0]) <= set(order[:count])
            assert np.unique(found).size == 50
            assert (search.calls[-1][3] == np.inf) == (exact is None)


def test_only_queries_that_found_too_few_go_on(data):
    rows, vectors, _ = data
    search = Lists(rows)
    near = rows[search.index.quantizer.search(rows, 1)[1][:, 0] == 0]  # of one list
    chosen = Selection(np.isin(np.arange(COUNT), np.flatnonzero((rows @ near[0]) > 0.4)))
    queries = np.stack([near[0], -near[0]])
    _, found = search_among(chosen, search, vectors, queries, 8)
    assert found.shape == (2, 8)
    np.testing.assert_array_equal(found[1], scan(rows, chosen, queries, 8)[1])


def test_nothing_matches(data):
    _, vectors, search = data
    scores, found = search_among(allow(0), search, vectors, random_rows(3, seed=5), 10)
    assert scores.shape == found.shape == (3, 0)


def test_compare_reads_block_by_block(data, monkeypatch):
    rows, vectors, _ = data
    monkeypatch.setattr(selection, "BLOCK_ROWS", 7)
    chosen, queries = allow(0.02), random_rows(5, seed=5)
    np.testing.assert_array_equal(
        compare(vectors, queries, np.flatnonzero(chosen.allowed), 12)[1], scan(rows, chosen, queries, 12)
    )


def test_selections_are_combined():
    both = Selection(np.array([True, True, False])) & Selection(np.array([False, True, True]))
    assert both.allowed.tolist() == [False, True, False]
    assert (both.count, both.share) == (1, 1 / 3)
