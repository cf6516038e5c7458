"""Searches that leave rows out, on each family of index, against a scan of the rows that are left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
from embedding_fakes import make_embeddings, metadata_rows, random_rows, stored

from clip_index import selection
from clip_index.index import build_index
from clip_index.search import Searcher
from clip_index.types import UsageError, normalize

pytestmark = pytest.mark.usefixtures("one_thread")

pytestmark = pytest.mark.filterwarnings("ignore:'pipes' is deprecated:DeprecationWarning")  # fire imports it
COUNT = 2000
KEYS = ("SQfp16", "IVF32,RaBitQ", "HNSW16", "IVF32,SQ8")
WIDTHS = [100 + (37 * row) % 1000 for row in range(COUNT)]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(selection, "_FEW_ROWS", 10)


@pytest.fixture(scope="module")
def vectors():
    """Half of the rows are copies of the other half."""
    rows = random_rows(COUNT // 2)
    return stored(np.concatenate([rows, normalize(rows + 0.02 * random_rows(COUNT // 2, seed=1))]))


@pytest.fixture(scope="module", params=KEYS)
def searcher(request, tmp_path_factory, vectors):
    folder = tmp_path_factory.mktemp("narrow")
    rows = [{**row, "width": width} for row, width in zip(metadata_rows(0, COUNT), WIDTHS, strict=True)]
    make_embeddings(folder / "e", {"image": vectors}, rows=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        build_index(str(folder / "e"), str(folder / "i"), index_key=request.param, engine="faiss", queries=20)
    opened = Searcher(str(folder / "i"))
    if request.param.startswith("HNSW"):  # autofaiss would have tuned it, and taken most of the time of this file
        faiss.downcast_index(opened._index("image")._index).hnsw.efSearch = 64
    opened.approximate = request.param not in ("SQfp16", "IVF32,RaBitQ")
    return opened


def scan(vectors, query, allowed):
    rows = np.flatnonzero(allowed)
    return rows[np.argsort(-(vectors[rows].astype(np.float64) @ query), kind="stable")]


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ("width < 1000", np.array(WIDTHS) < 1000),
        ("width < 500", np.array(WIDTHS) < 500),
        ("width < 250", np.array(WIDTHS) < 250),
        ("width = 100", np.array(WIDTHS) == 100),
        ("false", np.zeros(COUNT, bool)),
    ],
)
def test_where_finds_the_nearest_that_match(searcher, vectors, where, allowed):
    recalls, queries = [], random_rows(10, seed=4)
    answers = searcher.search_many(vectors=queries, k=20, where=where, **deep(searcher))
    for query, hits in zip(queries, answers, strict=True):
        assert len(hits) == min(20, allowed.sum())
        assert all(allowed[hit.row] for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        truth = scan(vectors, query, allowed)[:20]
        recalls.append(len(set(truth) & {hit.row for hit in hits}) / max(1, len(truth)) if len(truth) else 1)
    assert np.mean(recalls) >= (0.9 * usual(searcher, vectors) if searcher.approximate else 1.0)


def usual(searcher, vectors):
    """Recall where every row may be found."""
    recalls, queries = [], random_rows(10, seed=4)
    for query, hits in zip(queries, searcher.search_many(vectors=queries, k=20), strict=True):
        truth = scan(vectors, query, np.ones(COUNT, bool))[:20]
        recalls.append(len(set(truth) & {hit.row for hit in hits}) / 20)
    return np.mean(recalls)


def deep(searcher):
    """What makes an index of two stages look at everything."""
    return {"nprobe": 32, "rerank": COUNT} if searcher._folder.marker.search["image"] else {}


@pytest.mark.parametrize("searcher", KEYS[:2], indirect=True)  # whose vectors are exact
def test_dedup_fills_k_with_distinct_rows(searcher, vectors):
    for query in random_rows(5, seed=4):
        hits = searcher.search(vector=query, k=12, dedup=0.99, where="width < 900", **deep(searcher))
        expected = []
        for row in scan(vectors, query, np.array(WIDTHS) < 900)[:100]:
            if all(vectors[row] @ vectors[other] < 0.99 for other in expected):
                expected.append(int(row))
        assert [hit.row for hit in hits] == expected[:12]
        assert len({row % (COUNT // 2) for row in expected[:12]}) == 12


@pytest.mark.parametrize("searcher", KEYS[:2], indirect=True)  # whose vectors are exact
def test_all_that_is_distinct_is_less_than_k(searcher):
    hits = searcher.search(vector=np.ones(16), k=50, dedup=0.99, where="key in ('key-1', 'key-1001', 'key-7')")
    assert {hit.row % 1000 for hit in hits} == {1, 7}
    assert len(hits) == 2


def test_concurrent_searches_with_different_conditions_agree_with_serial_ones(searcher):
    options = [
        {"vector": query, "k": 5, "where": f"width > {100 * (row % 9)}", "dedup": None if row % 2 else 0.99}
        for row, query in enumerate(random_rows(16, seed=6))
        if row % 2 or not searcher.approximate
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda option: searcher.search(**option), options))
    assert found == [searcher.search(**option) for option in options]


def test_what_cannot_be_asked_is_refused(searcher):
    with pytest.raises(UsageError, match=r"--where 'wide > 3'.*the columns are image_path, caption"):
        searcher.search(vector=np.ones(16), where="wide > 3")
    for wrong in (0, 1.5, 95):
        with pytest.raises(UsageError, match="between 0 and 1"):
            searcher.search(vector=np.ones(16), dedup=wrong)
