from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
from embedding_fakes import brute_force, make_embeddings, metadata_rows, random_rows, stored

from clip_index import two_stage_build, upkeep
from clip_index.index import build_index, verify_index
from clip_index.index_folder import IndexFolder
from clip_index.opened import open_index
from clip_index.points import FIRST, Point
from clip_index.report import format_report
from clip_index.search import Searcher
from clip_index.two_stage_build import lists_for
from clip_index.types import ClipIndexError, UsageError, normalize

ROWS, DIM, LISTS = 3000, 32, 16
KEY = f"IVF{LISTS},RaBitQ"
EVERYTHING = Point(LISTS, ROWS)


def clustered(count, seed):
    """Rows around 40 centres, far from even: where codes of one list look alike."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, DIM))
    return normalize(centres[(40 * rng.random(count) ** 2).astype(int)] + 0.6 * rng.standard_normal((count, DIM)))


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        yield
        faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def vectors():
    return {"image": clustered(ROWS, 0), "text": normalize(clustered(ROWS, 1) + 0.3)}


@pytest.fixture(scope="module")
def made(tmp_path_factory, vectors):
    folder = tmp_path_factory.mktemp("two_stage")
    make_embeddings(folder / "e", vectors, shard_rows=[1000, 0, 1999, 1])
    report = build_index(str(folder / "e"), str(folder / "i"), index_key=KEY, queries=400)
    return str(folder / "i"), report


def opened(made, modality="image"):
    return open_index(IndexFolder(made[0]), modality)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_looking_everywhere_is_exact_search(made, vectors, modality):
    queries = clustered(70, 5)
    scores, rows = opened(made, modality).search(queries, 10, EVERYTHING)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored(vectors[modality]))
    expected_scores, expected_rows = flat.search(queries, 10)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_a_margin_compares_a_part_of_the_candidates_and_a_wide_one_all(made, vectors, monkeypatch):
    index, queries, compared = opened(made), clustered(30, 15), []
    best = index._best
    monkeypatch.setattr(index, "_best", lambda places, *args: compared.append(len(places)) or best(places, *args))

    def search(margin):
        compared.clear()
        return index.search(queries, 10, Point(LISTS, ROWS, margin))[1], sum(compared) / len(queries)

    everything, rows = search(None)
    assert rows == ROWS
    found, rows = search(10.0)
    np.testing.assert_array_equal(found, everything)
    assert rows == ROWS
    assert search(-10.0)[1] == FIRST
    found, rows = search(0.2)
    assert FIRST < rows < ROWS / 2
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, everything, strict=True)]) > 9.7


def test_recall_against_flat_at_the_chosen_points(made, vectors):
    folder, report = made
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored(vectors["image"]))
    marker = IndexFolder(folder).marker
    for kind, seed in (("image", 6), ("text", 7)):
        queries = clustered(200, seed) if kind == "image" else normalize(clustered(200, seed) + 0.3)
        point = Point(**marker.search["image"][kind])
        assert report["indices"]["image"]["points"][kind] == marker.search["image"][kind]
        found, truth = opened(made).search(queries, 10, point)[1], flat.search(queries, 10)[1]
        recall = np.mean([len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)]) / 10
        assert recall > 0.97
        coarse = opened(made).coarse(queries, 10, point)[1]
        by_codes = np.mean([len(set(a) & set(b)) for a, b in zip(coarse, truth, strict=True)]) / 10
        assert by_codes < recall - 0.1


def test_the_report_says_both_stages(made):
    _, report = made
    part = report["indices"]["image"]
    assert (part["engine"], part["index_key"]) == ("faiss", KEY)
    for kind in ("image", "text"):
        assert part["recall"][kind]["queries"] == 200  # the other half chose the points
        assert part["coarse_recall"][kind]["recall@10"]["mean"] < part["recall"][kind]["recall@10"]["mean"]
    assert part["lists"]["count"] == LISTS
    assert {"train", "add", "write", "tune", "measure"} <= set(part["seconds"]) == set(part["peak_memory_bytes"])
    assert {"one_thread", "all_threads", "cold", "batch_queries_per_s"} <= set(part["speed"])
    # by hand: 32 bits and two factors of 4 bytes; 16 centroids of float16 and a rotation are shared by 3,000 rows
    assert part["memory_bytes_per_vector"] == pytest.approx(12 + (16 * 32 * 2 + 32 * 32 * 4) / 3000)
    table = format_report(report)
    for words in ("bytes a vector in memory", "recall@10 by codes alone", "lists looked at, re-ranked", "imbalance"):
        assert words in table


def test_the_folder_and_what_other_programs_read(made, vectors):
    folder, _ = made
    names = [f"{name}.{kind}" for name in ("image", "text") for kind in ("index", "json", "rows.npy", "vectors.npy")]
    assert set(names) <= set(os.listdir(folder))
    index = faiss.read_index(f"{folder}/image.index")
    rows = stored(vectors["image"])
    assert np.mean(index.search(rows[:50], 5)[1] == np.arange(50)[:, None]) >= 0.15  # a row finds itself, by number
    order = np.load(f"{folder}/image.rows.npy")
    assert sorted(order) == list(range(ROWS))
    np.testing.assert_array_equal(np.load(f"{folder}/image.vectors.npy"), rows[order])


def test_k_is_filled_when_few_lists_are_looked_at(made):
    query = clustered(1, 8)
    scores, rows = opened(made).search(query, ROWS, Point(1, 10))
    assert sorted(rows[0]) == list(range(ROWS))
    assert (np.diff(scores[0]) <= 0).all()
    assert len(Searcher(made[0]).search(vector=query[0], k=ROWS + 5)) == ROWS


def test_a_search_takes_its_own_parameters(made, vectors):
    searcher = Searcher(made[0])
    query = clustered(1, 9)[0]
    exact = list(brute_force(stored(vectors["image"]), query[None], 10)[0])
    found = searcher.search(vector=query, nprobe=LISTS, rerank=ROWS)
    assert [hit.row for hit in found] == exact
    for wrong in ({"nprobe": 0}, {"rerank": True}, {"kind": "audio"}):
        with pytest.raises(UsageError):
            searcher.nearest(query[None], **wrong)


def test_the_kind_of_query_decides_how_far_to_look(made, monkeypatch):
    searcher = Searcher(made[0])
    marker = searcher._folder.marker
    marker.search["image"] = {"image": {"nprobe": 1, "rerank": 20}, "text": {"nprobe": 2, "rerank": 10}}
    asked = []
    index = searcher._index("image")
    search = index.search
    monkeypatch.setattr(index, "search", lambda *args: asked.append(args[2]) or search(*args))
    for kind in ("image", "text", None):
        searcher.nearest(clustered(1, 10), kind=kind)
    searcher.nearest(clustered(1, 10), kind="text", nprobe=7)
    assert asked == [Point(1, 20), Point(2, 10), Point(2, 20), Point(7, 10)]


def test_concurrent_searches_with_different_parameters_agree_with_serial_ones(made):
    index, queries = opened(made), clustered(64, 11)
    asked = [(query[None], 1 + at % 20, Point(1 + at % LISTS, 10 + 7 * at)) for at, query in enumerate(queries)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda options: index.search(*options), asked * 3))
    fresh = opened(made)
    for options, found in zip(asked * 3, together, strict=True):
        for ours, expected in zip(found, fresh.search(*options), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_a_batch_agrees_with_one_by_one(made):
    index, queries, point = opened(made), clustered(150, 12), Point(3, 40)
    together = index.search(queries, 10, point)[1]
    np.testing.assert_array_equal(together, [index.search(query[None], 10, point)[1][0] for query in queries])


def test_vectors_are_returned_on_request(made, vectors):
    query = clustered(1, 13)[0]
    for hit in Searcher(made[0]).search(vector=query, embeddings=True):
        np.testing.assert_array_equal(np.float32(hit.meta["embedding"]), stored(vectors["image"])[hit.row])
        assert json.dumps(hit.to_dict())


def test_many_vectors_at_once(made):
    searcher, queries = Searcher(made[0]), clustered(20, 14)
    together = searcher.search_many(vectors=queries, k=3)
    for hits, query in zip(together, queries, strict=True):
        assert [hit.key for hit in hits] == [hit.key for hit in searcher.search(vector=query, k=3)]
    assert searcher.search_many(vectors=queries[:0]) == []
    with pytest.raises(UsageError, match="one of them alone"):
        searcher.search_many(texts=["a"], vectors=queries)


def test_too_little_memory_is_refused_before_any_work(made, tmp_path, vectors):
    make_embeddings(tmp_path / "e", {"image": vectors["image"]})
    with pytest.raises(ClipIndexError, match=r"take 0\.48 MB to build, more than the 0\.41 MB of --memory: give more"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key=KEY, memory="400K")
    assert not (tmp_path / "i/clip_index.json").exists()


def test_memory_that_the_codes_exceed(tmp_path, monkeypatch):
    monkeypatch.setattr(two_stage_build, "_LEAST_BLOCK_ROWS", 64)
    rows, dim, memory = 25_000, 64, 560 << 10
    assert (rows - 1000) * (dim // 8 + 8 + 8) > memory  # codes with their row numbers
    vectors, folder = random_rows(rows, dim), str(tmp_path / "i")
    make_embeddings(tmp_path / "e", {"image": vectors[:-1000]})
    make_embeddings(tmp_path / "more", {"image": vectors[-1000:]}, rows=metadata_rows(rows - 1000, 1000))
    build_index(str(tmp_path / "e"), folder, index_key=KEY, memory=memory, queries=20)
    check_exact(folder, vectors[:-1000])
    upkeep.append(folder, str(tmp_path / "more"), memory=memory)
    check_exact(folder, vectors)


def check_exact(folder, vectors):
    """Looking everywhere, the index finds what a scan of the vectors finds, and all of its files are whole."""
    queries = random_rows(20, vectors.shape[1], seed=1)
    found = open_index(IndexFolder(folder), "image").search(queries, 10, Point(LISTS, len(vectors)))[1]
    np.testing.assert_array_equal(found, brute_force(stored(vectors), queries, 10))
    assert verify_index(folder) == []


def test_damage_beside_the_index_is_found(tmp_path, vectors):
    make_embeddings(tmp_path / "e", {"image": vectors["image"]})
    folder = tmp_path / "i"
    build_index(str(tmp_path / "e"), str(folder), index_key=KEY, queries=20)
    data = bytearray((folder / "image.vectors.npy").read_bytes())
    data[-1] ^= 1
    (folder / "image.vectors.npy").write_bytes(data)
    os.truncate(folder / "image.rows.npy", 1000)
    problems = verify_index(str(folder))
    assert problems[1] == "image.vectors.npy was altered: its checksum is not the marker's"
    assert "image.rows.npy has 1000 bytes, its marker says" in problems[0]
    with pytest.raises(ClipIndexError, match=r"image\.rows\.npy has 1000 bytes"):
        Searcher(str(folder))


KILL = """
import os, signal, sys
from clip_index import two_stage_build
from clip_index.index import build_index
two_stage_build.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
build_index(sys.argv[1], sys.argv[2], index_key=sys.argv[3])
"""


def test_a_kill_during_the_build_leaves_the_old_index(tmp_path, vectors):
    make_embeddings(tmp_path / "e", {"image": vectors["image"][:300]})
    folder = str(tmp_path / "i")
    build_index(str(tmp_path / "e"), folder)
    killed = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "e"), folder, KEY], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    query = clustered(1, 15)
    expected = brute_force(stored(vectors["image"][:300]), query, 10)[0]
    assert [hit.row for hit in Searcher(folder).search(vector=query[0])] == list(expected)
    assert verify_index(folder) == []


def test_how_many_lists():
    assert [lists_for(rows) for rows in (10, 100_000, 1_000_000, 100_000_000)] == [1, 1024, 4096, 32768]
