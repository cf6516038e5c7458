"""Exact search on a torch device, which is the CPU here, against faiss and against a sort of all scores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
from embedding_fakes import make_embeddings, metadata_rows, random_rows, stored

from clip_index import exhaustive, selection
from clip_index.exhaustive import Exhaustive
from clip_index.index import build_index
from clip_index.index_folder import IndexFolder
from clip_index.opened import open_index
from clip_index.search import Searcher
from clip_index.types import ClipIndexError, UsageError

ROWS, DIM = 300, 16
WIDTHS = [100 + (37 * row) % 1000 for row in range(ROWS)]


@pytest.fixture(scope="module")
def vectors():
    """Rows of four halves and twelve zeros: their scores are exact, and many are the same."""
    rng = np.random.default_rng(0)
    rows = np.zeros((ROWS, DIM), np.float32)
    for row in rows:
        row[rng.choice(8, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    return rows


@pytest.fixture(scope="module", params=["SQfp16", "Flat", "IVF16,RaBitQ"])
def folder(request, tmp_path_factory, vectors):
    made = tmp_path_factory.mktemp("exhaustive")
    rows = [{**row, "width": width} for row, width in zip(metadata_rows(0, ROWS), WIDTHS, strict=True)]
    make_embeddings(made / "e", {"image": vectors}, rows=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made / "cache"))
        build_index(str(made / "e"), str(made / "i"), index_key=request.param, engine="faiss", queries=5)
    return str(made / "i")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(exhaustive, "_BLOCK_ROWS", 70)
    monkeypatch.setattr(exhaustive, "_QUERIES", 4)
    monkeypatch.setattr(selection, "_FEW_ROWS", 3)


def ranked(scores, rows):
    """Rows by falling score, those of one score by number."""
    return [int(rows[at]) for at in np.lexsort((rows, -scores))]


@pytest.mark.parametrize("k", [1, 10, 100, ROWS])
def test_scores_are_those_of_faiss_and_ties_go_by_row(folder, vectors, k):
    queries = vectors[::30]
    scores, rows = Exhaustive(open_index(IndexFolder(folder), "image"), "cpu").search(queries, k)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    np.testing.assert_array_equal(scores, flat.search(queries, k)[0])
    for query, found in zip(queries, rows, strict=True):
        assert list(found) == ranked(vectors @ query, np.arange(ROWS))[:k]


def test_more_than_there_are(folder, vectors):
    scores, rows = Exhaustive(open_index(IndexFolder(folder), "image"), "cpu").search(vectors[:2], ROWS + 5)
    assert (rows[:, ROWS:] == -1).all() and np.isneginf(scores[:, ROWS:]).all()
    assert sorted(rows[0, :ROWS]) == list(range(ROWS))
    assert len(Searcher(folder, device="cpu", exact=True).search(vector=vectors[0], k=ROWS + 5)) == ROWS


def test_rows_without_ties_are_those_of_faiss(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows, queries = random_rows(500), random_rows(20, seed=1)
    make_embeddings(tmp_path / "e", {"image": rows})
    build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key="IVF16,RaBitQ", queries=5)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored(rows))
    scores, found = Exhaustive(open_index(IndexFolder(str(tmp_path / "i")), "image"), "auto").search(queries, 20)
    np.testing.assert_array_equal(found, flat.search(queries, 20)[1])
    np.testing.assert_allclose(scores, flat.search(queries, 20)[0], atol=1e-6)


@pytest.mark.parametrize("least", [100, 500, 900, 1090])
def test_among_some_rows(folder, vectors, least):
    searcher = Searcher(folder, device="cpu", exact=True)
    allowed = np.flatnonzero(np.array(WIDTHS) >= least)
    for query in vectors[:5]:
        hits = searcher.search(vector=query, k=20, where=f"width >= {least}")
        scores = vectors[allowed] @ query
        assert sorted((hit.score for hit in hits), reverse=True) == sorted(scores, reverse=True)[:20]
        assert len(hits) == len({hit.row for hit in hits}) == min(20, len(allowed))
        assert all(hit.row in allowed and hit.score == vectors[hit.row] @ query for hit in hits)


def test_a_selector_leaves_rows_out(folder, vectors):
    allowed = np.arange(ROWS) % 7 == 0
    selector = selection.Selection(allowed).selector()
    scores, rows = Exhaustive(open_index(IndexFolder(folder), "image"), "cpu").search(
        vectors[:3], 60, selector=selector
    )
    count = int(allowed.sum())
    assert (rows[:, count:] == -1).all() and np.isneginf(scores[:, count:]).all()
    for query, found in zip(vectors[:3], rows, strict=True):
        assert list(found[:count]) == ranked((vectors @ query)[allowed], np.flatnonzero(allowed))


def test_deleted_rows_copies_and_vectors(folder, vectors):
    searcher = Searcher(folder, device="cpu", exact=True)
    hits = searcher.search(vector=vectors[3], k=30, dedup=0.99, embeddings=True)
    found = np.array([hit.meta["embedding"] for hit in hits])
    np.testing.assert_array_equal(found, vectors[[hit.row for hit in hits]])
    assert (np.triu(found @ found.T, 1) < 0.99).all()
    assert [hit.row for hit in searcher.above(vector=vectors[3], threshold=0.75)] == [
        row for row in ranked(vectors @ vectors[3], np.arange(ROWS)) if vectors[row] @ vectors[3] >= 0.75
    ]
    with pytest.raises(UsageError, match="nprobe is for an index of two stages"):
        searcher.search(vector=vectors[3], nprobe=2)


def test_what_a_device_holds_is_read_once(folder, vectors, monkeypatch):
    opened = open_index(IndexFolder(folder), "image")
    read = []
    stored_rows = opened.stored
    monkeypatch.setattr(opened, "stored", lambda *place: read.append(place) or stored_rows(*place))
    monkeypatch.setattr(Exhaustive, "_fits", lambda self: True)
    index = Exhaustive(opened, "cpu")
    first = index.search(vectors[:3], 10)
    assert read == [(0, 70), (70, 140), (140, 210), (210, 280), (280, 300)]
    again = index.search(vectors[:3], 10)
    assert len(read) == 5
    for ours, expected in zip(again, first, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_concurrent_searches_agree_with_serial_ones(folder, vectors):
    index = Exhaustive(open_index(IndexFolder(folder), "image"), "cpu")
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: index.search(query[None], 9)[1], vectors[:16]))
    np.testing.assert_array_equal(np.concatenate(together), index.search(vectors[:16], 9)[1])


def test_what_cannot_be_is_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"no such device 'cuda:99': this machine has \d+ CUDA devices"):
        Searcher(folder, device="cuda:99", exact=True)
    with pytest.raises(UsageError, match="unknown device 'abacus'"):
        Searcher(folder, device="abacus", exact=True)
    make_embeddings(tmp_path / "e", {"image": random_rows(600)})
    build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key="IVF8,SQ8", queries=5)
    with pytest.raises(ClipIndexError, match="codes of its vectors alone"):
        Searcher(str(tmp_path / "i"), exact=True)
