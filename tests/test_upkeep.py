"""Appending, deleting, compacting and merging, against an index that is built over the same rows."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pytest
from embedding_fakes import brute_force, make_embeddings, metadata_rows, random_rows, stored

from clip_index import families, storage, upkeep
from clip_index.index import build_index, verify_index
from clip_index.search import Searcher
from clip_index.store import EmbeddingConfig
from clip_index.types import ClipIndexError, UsageError

KEYS = (None, "IVF16,RaBitQ")
COUNT = 1000


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(upkeep, "build_from", functools.partial(upkeep.build_from, queries=40))
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


ROWS = {"image": random_rows(COUNT), "text": random_rows(COUNT, seed=1)}


def make(folder, first, last, key=None, build=True, engine="faiss", **options):
    """Embeddings of some of ROWS, in `folder`-e, and an index over them in `folder`."""
    part = {name: rows[first:last] for name, rows in ROWS.items()}
    make_embeddings(f"{folder}-e", part, rows=metadata_rows(first, last - first), **options)
    if build:
        build_index(f"{folder}-e", str(folder), index_key=key, engine=engine if key else "auto", queries=40)
    return str(folder)


def check(folder, numbers):
    """The index holds just the given rows of ROWS, in this order, and finds them exactly, looking everywhere."""
    assert verify_index(folder) == []
    searcher = Searcher(folder)
    assert searcher.rows == len(numbers)
    check_found(folder, numbers)
    hits = searcher.search(vector=random_rows(1, seed=8)[0], k=20)
    for hit in hits:
        number = int(numbers[hit.row])
        assert hit.key == f"key-{number}"
        assert {**hit.meta, "key": hit.key} == metadata_rows(number, 1)[0]
    assert not [name for name in os.listdir(folder) if name.startswith(".staging") or name.endswith(".tmp")]


def check_found(folder, numbers):
    searcher = Searcher(folder)
    for modality, rows in ROWS.items():
        deep = {"nprobe": 16, "rerank": COUNT} if searcher._folder.marker.search[modality] else {}
        for query in random_rows(5, seed=7):
            hits = searcher.search(vector=query, k=20, modality=modality, **deep)
            expected = np.asarray(numbers)[brute_force(stored(rows[numbers]), query[None], 20)[0]]
            assert [hit.key for hit in hits] == [f"key-{number}" for number in expected]


def centroids(folder):
    index = faiss.read_index(f"{folder}/image.index")
    return faiss.downcast_index(faiss.downcast_index(index.index).quantizer).reconstruct_n(0, 16)


@pytest.mark.parametrize("key", KEYS)
def test_append_is_a_build_over_all_rows(tmp_path, key):
    folder = make(tmp_path / "i", 0, 700, key)
    before = Searcher(folder)
    make(tmp_path / "more", 700, COUNT, build=False)
    report = upkeep.append(folder, str(tmp_path / "more-e"))
    check(folder, np.arange(COUNT))
    assert report == json.loads((tmp_path / "i/report.json").read_text())
    assert report["rows"] == COUNT and report["indices"]["image"]["recall"]["image"]["recall@10"]["mean"] > 0.9
    assert before.search(vector=random_rows(1, seed=3)[0])  # who had it open goes on
    if key:
        np.testing.assert_array_equal(centroids(folder), centroids(make(tmp_path / "same", 0, 700, key)))


@pytest.mark.parametrize("key", KEYS)
def test_deleted_rows_are_not_found_and_compacting_removes_them(tmp_path, key):
    folder = make(tmp_path / "i", 0, 600, key)
    inodes = os.stat(f"{folder}/image.index").st_ino
    told = upkeep.delete(folder, keys=["key-3", "key-4"], rows=[4, 500], where="key like 'key-1%'")
    gone = {3, 4, 500} | {number for number in range(600) if str(number).startswith("1")}
    kept = np.array(sorted(set(range(600)) - gone))
    assert told == {"deleted": len(gone), "deleted_in_all": len(gone), "rows": 600}
    assert verify_index(folder) == []
    check_found(folder, kept)
    assert os.stat(f"{folder}/image.index").st_ino == inodes  # nothing was copied
    assert upkeep.delete(folder, keys=["key-3"], rows=[599]) == {
        "deleted": 1, "deleted_in_all": len(gone) + 1, "rows": 600,
    }  # fmt: skip
    check_found(folder, kept[:-1])
    query = random_rows(1, seed=3)[0]
    assert len(Searcher(folder).search(vector=query, k=600)) == len(kept) - 1
    assert {hit.row for hit in Searcher(folder).search(vector=query, k=9, where="key in ('key-2', 'key-3')")} == {2}
    upkeep.compact(folder)
    check(folder, kept[:-1])


@pytest.mark.parametrize("key", KEYS)
def test_merge_is_a_build_over_all_rows(tmp_path, key):
    parts = [make(tmp_path / "a", 0, 300), make(tmp_path / "b", 300, 900, key), make(tmp_path / "c", 900, COUNT, key)]
    upkeep.delete(parts[1], rows=[0, 1, 599])
    upkeep.merge(parts, str(tmp_path / "merged"))
    check(str(tmp_path / "merged"), np.r_[0:300, 302:899, 900:COUNT])
    for part in parts:
        assert verify_index(part) == []
    report = json.loads((tmp_path / "merged/report.json").read_text())
    assert report["indices"]["image"]["index_key"] == (key or "SQfp16")


def test_an_exact_index_that_grows_gets_two_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep.families, "EXACT_ROWS", 800)
    folder = make(tmp_path / "i", 0, 700)
    make(tmp_path / "more", 700, COUNT, build=False)
    report = upkeep.append(folder, str(tmp_path / "more-e"))
    assert report["indices"]["image"]["index_key"].endswith("RaBitQ")
    assert verify_index(folder) == []


OTHERS = ("IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4fs", "RR16,IVF8_HNSW8,PQ8x4", "HNSW8")
"""Families of one stage: vectors in lists, codes in lists, codes in blocks, codes of turned vectors, a graph."""


def recall_of(folder, numbers, modality="image", k=10):
    """Of the rows nearest to some queries, by brute force over ROWS, how many an index finds."""
    rows, queries = ROWS[modality], random_rows(20, seed=9)
    searcher, found = Searcher(folder), 0
    for query, right in zip(queries, brute_force(stored(rows[numbers]), queries, k), strict=True):
        keys = {hit.key for hit in searcher.search(vector=query, k=k, modality=modality)}
        assert len(keys) == k
        found += len(keys & {f"key-{number}" for number in np.asarray(numbers)[right]})
    return found / len(queries) / k


def trained(folder):
    """What was trained, or chosen, when an index was built."""
    index = faiss.read_index(f"{folder}/image.index")
    inverted = faiss.try_extract_index_ivf(index)
    return index.hnsw.efSearch if inverted is None else faiss.downcast_index(inverted.quantizer).reconstruct_n(0, 8)


def check_family(folder, numbers, key, like):
    """The index holds the rows in this order, in that family, as well as one that is built over them."""
    assert verify_index(folder) == []
    part = json.loads(storage.read_bytes(f"{folder}/report.json"))["indices"]["image"]
    assert part["index_key"] == key
    searcher = Searcher(folder)
    assert searcher.rows == len(numbers)
    hits = searcher.search(vector=ROWS["image"][numbers[-1]], k=50)
    assert hits[0].key == f"key-{numbers[-1]}" and len({hit.row for hit in hits}) == len(hits)
    for hit in hits:
        assert hit.key == f"key-{numbers[hit.row]}"
    assert recall_of(folder, numbers) > recall_of(like, np.arange(COUNT)) - 0.1
    return part


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    """Indices of each family over all of ROWS."""
    place = tmp_path_factory.mktemp("like")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return {key: make(place / str(at), 0, COUNT, key) for at, key in enumerate(OTHERS)}


@pytest.mark.parametrize("key", OTHERS)
def test_other_families_are_added_to_as_they_are(tmp_path, like, key):
    folder = make(tmp_path / "i", 0, 700, key)
    before = trained(folder)
    make(tmp_path / "more", 700, COUNT, build=False)
    upkeep.append(folder, str(tmp_path / "more-e"))
    part = check_family(folder, np.arange(COUNT), key, like[key])
    assert part["recall_against"] == "vectors"
    np.testing.assert_array_equal(trained(folder), before)
    # what the report says was measured against the vectors themselves
    assert part["recall"]["image"]["recall@10"]["mean"] == pytest.approx(recall_of(folder, np.arange(COUNT)), abs=0.2)


@pytest.mark.parametrize("key", OTHERS)
def test_other_families_lose_their_deleted_rows(tmp_path, like, key):
    folder = make(tmp_path / "i", 0, COUNT, key)
    before = trained(folder)
    gone = [0, 3, *range(400, 500)]
    upkeep.delete(folder, rows=gone)
    left = np.delete(np.arange(COUNT), gone)
    assert recall_of(folder, left) > recall_of(like[key], np.arange(COUNT)) - 0.1
    upkeep.compact(folder)
    check_family(folder, left, key, like[key])
    np.testing.assert_array_equal(trained(folder), before)


@pytest.mark.parametrize("key", OTHERS)
def test_other_families_are_merged_by_a_build_like_the_largest(tmp_path, like, key):
    parts = [make(tmp_path / "a", 0, 300), make(tmp_path / "b", 300, COUNT, key)]
    upkeep.delete(parts[1], rows=[0, 1])
    upkeep.merge(parts, str(tmp_path / "merged"))
    check_family(str(tmp_path / "merged"), np.delete(np.arange(COUNT), [300, 301]), key, like[key])


def test_what_autofaiss_built_is_built_by_it_again(tmp_path, monkeypatch):
    asked = []

    def build(folder, *, index_key, **_):
        files = sorted(os.listdir(folder))
        asked.append((index_key, np.concatenate([np.load(f"{folder}/{name}") for name in files])))
        index = faiss.index_factory(16, index_key, faiss.METRIC_INNER_PRODUCT)
        index.add(asked[-1][1].astype(np.float32))
        index.hnsw.efSearch = 77
        return index, index_key, "efSearch=77"

    monkeypatch.setattr(families.autofaiss_compat, "build", build)
    parts = [
        make(tmp_path / name, first, first + 100, "HNSW15", engine="auto") for name, first in (("a", 0), ("b", 100))
    ]
    upkeep.delete(parts[0], rows=[7])
    upkeep.merge(parts, str(tmp_path / "merged"))
    key, vectors = asked[-2]
    assert (key, vectors.dtype) == ("HNSW15", np.float16)
    np.testing.assert_array_equal(vectors, stored(np.delete(ROWS["image"][:200], 7, axis=0)))
    check_found(str(tmp_path / "merged"), np.delete(np.arange(200), 7))
    make(tmp_path / "more", 200, 300, build=False)
    upkeep.append(parts[1], str(tmp_path / "more-e"))
    check_found(parts[1], np.arange(100, 300))
    for folder in (tmp_path / "merged", tmp_path / "b"):
        told = json.loads((folder / "report.json").read_text())["indices"]["text"]
        assert (told["engine"], told["index_key"], told["index_param"]) == ("autofaiss", "HNSW15", "efSearch=77")
    assert len(asked) == 6  # not for what is appended


def test_codes_whose_embeddings_are_gone(tmp_path):
    folder = make(tmp_path / "i", 0, 700, "IVF8,SQ8")
    shutil.rmtree(f"{folder}-e")
    make(tmp_path / "more", 700, COUNT, build=True)
    with pytest.raises(ClipIndexError, match="codes of its vectors alone, and the embeddings"):
        upkeep.merge([folder, str(tmp_path / "more")], str(tmp_path / "merged"))
    report = upkeep.append(folder, str(tmp_path / "more-e"))
    assert report["indices"]["image"]["recall_against"] == "codes"
    assert [warning for warning in report["warnings"] if "it looks better than it is" in warning]
    upkeep.delete(folder, rows=[5])
    upkeep.compact(folder)
    assert Searcher(folder).rows == COUNT - 1


def test_embeddings_that_changed_say_nothing_of_an_index(tmp_path):
    folder = make(tmp_path / "i", 0, 700, "IVF8,SQ8")
    shutil.rmtree(f"{folder}-e")
    make(folder, 300, 900, build=False)
    upkeep.delete(folder, rows=[5])
    assert upkeep.compact(folder)["indices"]["image"]["recall_against"] == "codes"


def test_a_graph_of_codes_cannot_lose_rows(tmp_path):
    folder = make(tmp_path / "i", 0, 500, "HNSW8_SQ8")
    shutil.rmtree(f"{folder}-e")
    upkeep.delete(folder, rows=[5])
    with pytest.raises(ClipIndexError, match="codes of its vectors alone, and the embeddings"):
        upkeep.compact(folder)
    assert len(Searcher(folder).search(vector=ROWS["image"][5], k=500)) <= 499


def test_columns_of_both_are_kept(tmp_path):
    folder = make(tmp_path / "i", 0, 100)
    rows = [{**row, "license": "by"} for row in metadata_rows(100, 50)]
    make_embeddings(tmp_path / "more-e", {name: rows[100:150] for name, rows in ROWS.items()}, rows=rows)
    upkeep.append(folder, str(tmp_path / "more-e"))
    hits = Searcher(folder).search(vector=ROWS["image"][120], k=150)
    assert {hit.meta["license"] for hit in hits if hit.row < 100} == {None}
    assert {hit.meta["license"] for hit in hits if hit.row >= 100} == {"by"}


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    folder = make(tmp_path / "i", 0, 100)
    marker = (tmp_path / "i/clip_index.json").read_bytes()
    config = EmbeddingConfig("other", "feed", "fp32", {"size": 8}, ("image", "text"), 16)
    make(tmp_path / "other", 100, 150, config=config)
    with pytest.raises(ClipIndexError, match=r"made otherwise than.*fingerprint"):
        upkeep.append(folder, str(tmp_path / "other-e"))
    with pytest.raises(ClipIndexError, match=r"made otherwise than.*fingerprint"):
        upkeep.merge([folder, str(tmp_path / "other")], str(tmp_path / "merged"))
    with pytest.raises(UsageError, match="no row has the key 'key-1000', nor 1 more"):
        upkeep.delete(folder, keys=["key-1", "key-1000", "key-2000"])
    with pytest.raises(UsageError, match="no row 100"):
        upkeep.delete(folder, rows=[100])
    with pytest.raises(UsageError, match="would be left"):
        upkeep.delete(folder, where="true")
    with pytest.raises(UsageError, match="two indices or more"):
        upkeep.merge([folder], str(tmp_path / "merged"))
    with pytest.raises(UsageError, match="holds an index already"):
        upkeep.merge([folder, folder], folder)
    assert upkeep.delete(folder, where="false")["deleted"] == 0
    assert (tmp_path / "i/clip_index.json").read_bytes() == marker
    assert verify_index(folder) == []


def test_rows_of_other_programs_go_by_their_path(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("img_emb", "metadata"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
    np.save(tmp_path / "theirs/img_emb/img_emb_0.npy", stored(ROWS["image"][:50]).astype(np.float16))
    paths = pa.table({"image_path": [f"{row}.jpg" for row in range(50)]})
    pq.write_table(paths, tmp_path / "theirs/metadata/metadata_0.parquet")
    build_index(str(tmp_path / "theirs"), str(tmp_path / "i"))
    upkeep.delete(str(tmp_path / "i"), keys=["7.jpg"])
    hits = Searcher(str(tmp_path / "i")).search(vector=ROWS["image"][7], k=50)
    assert len(hits) == 49 and "7.jpg" not in {hit.key for hit in hits}
    upkeep.append(str(tmp_path / "i"), str(tmp_path / "theirs"))
    assert Searcher(str(tmp_path / "i")).rows == 99


def test_a_remote_index(tmp_path):
    make("memory://upkeep/i", 0, 100)
    make("memory://upkeep/more", 100, 150, build=False)
    upkeep.delete("memory://upkeep/i", rows=[5])
    upkeep.append("memory://upkeep/i", "memory://upkeep/more-e")
    assert verify_index("memory://upkeep/i") == []
    check_found("memory://upkeep/i", np.delete(np.arange(150), 5))
    assert not [name for name in storage.list_names("memory://upkeep/i") if name.startswith(".staging")]


KILL = """
import os, signal, sys
from clip_index import index_writer, storage, upkeep

def kill_at(module, name, call):
    original, calls = getattr(module, name), []
    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and (name != "write_bytes" or args[0].endswith("clip_index.json")):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "write_bytes" and not args[0].endswith("clip_index.json"):
            calls.pop()
        return original(*args, **kwargs)
    setattr(module, name, counted)

folder, step, moment = sys.argv[1:]
kill_at(*{"before": (storage, "write_bytes", 1), "after": (index_writer, "_move", 2)}[moment])
if step == "append":
    upkeep.append(folder, folder + "-more-e")
elif step == "delete":
    upkeep.delete(folder, rows=range(50))
elif step == "compact":
    upkeep.compact(folder)
else:
    upkeep.merge([folder, folder + "-more"], folder + "-merged")
"""


@pytest.mark.parametrize("step", ["append", "delete", "compact", "merge"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_leaves_one_index_whole(tmp_path, step, moment):
    folder = make(tmp_path / "i", 0, 200)
    upkeep.delete(folder, rows=[199])
    make(tmp_path / "i-more", 200, 250, build=step == "merge")
    killed = subprocess.run([sys.executable, "-c", KILL, folder, step, moment], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert verify_index(folder) == []
    old = np.arange(199)
    new = {"append": np.r_[0:199, 200:250], "delete": np.arange(50, 199)}.get(step, old)
    if step == "merge" and moment == "after":
        check_found(f"{folder}-merged", np.r_[0:199, 200:250])
    check_found(folder, old if moment == "before" else new)
    upkeep.compact(folder)
    check(folder, old if moment == "before" else new)
