from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from embedding_fakes import brute_force, make_embeddings, metadata_rows, random_rows, stored

from clip_index import autofaiss_compat, storage
from clip_index.families import EXACT_ROWS, choose
from clip_index.index import build_index, parse_memory, verify_index
from clip_index.index_writer import IndexWriter
from clip_index.metadata import Metadata
from clip_index.report import format_report
from clip_index.search import Searcher
from clip_index.types import ClipIndexError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:'pipes' is deprecated:DeprecationWarning")  # fire imports it
COMPRESSED = "OPQ8_16,IVF16,PQ8"
INFOS = {
    "index_key",
    "index_param",
    "index_path",
    "size in bytes",
    "avg_search_speed_ms",
    "99p_search_speed_ms",
    "reconstruction error %",
    "nb vectors",
    "vectors dimension",
    "compression ratio",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """So little work is done that threads would do nothing but wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture
def both(tmp_path):
    vectors = {"image": random_rows(120), "text": random_rows(120, seed=1)}
    make_embeddings(tmp_path / "e", vectors, shard_rows=[50, 0, 69, 1])
    return vectors


def nearest(folder, modality, queries, k):
    return faiss.read_index(f"{folder}/{modality}.index").search(queries, k)


def test_an_exact_index_agrees_with_brute_force_and_reports_so(tmp_path, both):
    report = build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    queries = random_rows(40, seed=2)
    for modality, vectors in both.items():
        scores, rows = nearest(tmp_path / "i", modality, queries, 10)
        flat = faiss.IndexFlatIP(16)
        flat.add(stored(vectors))
        expected_scores, expected_rows = flat.search(queries, 10)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(rows, brute_force(stored(vectors), queries, 10))
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
        part = report["indices"][modality]
        assert (part["index_key"], part["engine"]) == ("SQfp16", "faiss")
        assert {kind: found["queries"] for kind, found in part["recall"].items()} == {"image": 100, "text": 80}
        for found in part["recall"].values():
            assert all(found[f"recall@{k}"] == {"mean": 1.0, "interval": 0.0} for k in (1, 10, 100))
    assert (report["rows"], report["dim"], report["warnings"]) == (120, 16, [])
    assert report == json.loads((tmp_path / "i/report.json").read_text())


def test_the_folder_is_what_clip_retrieval_expects(tmp_path, both):
    build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    names = [name for name, _ in storage.list_files(str(tmp_path / "i"))]
    tables = [f"metadata/metadata_{shard:05d}.parquet" for shard in (0, 2, 3)]
    singles = ["image.index", "image.json", "text.index", "text.json", "metadata.arrow", "report.json"]
    assert names == sorted([*singles, *tables, "clip_index.json"])
    infos = json.loads((tmp_path / "i/image.json").read_text())
    assert set(infos) == INFOS
    assert (infos["nb vectors"], infos["vectors dimension"]) == (120, 16)
    assert infos["size in bytes"] == os.path.getsize(tmp_path / "i/image.index")
    assert infos["index_path"] == str(tmp_path / "i/image.index")
    # clip-retrieval reads every parquet file below metadata/, sorted by name, as one table
    import pyarrow.parquet as pq

    read = [row for name in tables for row in pq.read_table(tmp_path / "i" / name).to_pylist()]
    assert read == metadata_rows(0, 120)
    assert Metadata(str(tmp_path / "i/metadata.arrow")).take(range(120)) == read


def test_rows_without_captions_are_no_text_queries(tmp_path):
    rows = [{**row, "caption": " "} for row in metadata_rows(0, 30)]
    rows[7]["caption"] = "a dog"
    make_embeddings(tmp_path / "e", {"image": random_rows(30), "text": random_rows(30)}, rows=rows)
    report = build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    assert report["indices"]["image"]["recall"]["text"]["queries"] == 1
    rows = [{**row, "caption": ""} for row in rows]
    make_embeddings(tmp_path / "e2", {"text": random_rows(30)}, rows=rows)
    assert build_index(str(tmp_path / "e2"), str(tmp_path / "i2"))["indices"]["text"]["recall"] == {}


def test_a_single_row(tmp_path):
    make_embeddings(tmp_path / "e", {"image": random_rows(1)}, shard_rows=[1])
    build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    assert [hit.key for hit in Searcher(str(tmp_path / "i")).search(vector=np.ones(16), k=5)] == ["key-0"]


def test_below_the_target_the_report_warns(tmp_path):
    make_embeddings(tmp_path / "e", {"image": random_rows(1000)})
    report = build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key=COMPRESSED, recall_target=0.99)
    (warning,) = report["warnings"]
    assert "image queries" in warning
    assert "--memory" in warning
    table = format_report(report)
    assert f"warning: {warning}" in table
    mean = report["indices"]["image"]["recall"]["image"]["recall@10"]["mean"]
    assert f"recall@10, 1,000 image queries   {mean:.3f}" in table


@pytest.mark.parametrize(
    ("key", "engine"),
    [
        (COMPRESSED, "autofaiss"),
        ("OPQ8_16,IVF16_HNSW8,PQ8", "autofaiss"),
        ("OPQ8_16,IVF16_HNSW8,PQ8x8", "autofaiss"),
        ("IVF8,Flat", "autofaiss"),
        ("IVF8,SQ8", "faiss"),
        ("IVF8,RaBitQ", "faiss"),
    ],
)
def test_index_keys(tmp_path, key, engine):
    vectors = random_rows(600)
    make_embeddings(tmp_path / "e", {"image": vectors})
    report = build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key=key, queries=50)
    part = report["indices"]["image"]
    assert (part["index_key"], part["engine"]) == (key, engine)
    built = faiss.read_index(str(tmp_path / "i/image.index"))
    assert (built.ntotal, built.d, built.metric_type) == (600, 16, faiss.METRIC_INNER_PRODUCT)
    found = built.search(stored(vectors)[:20], 10)[1].tolist()
    exact = brute_force(stored(vectors), stored(vectors)[:20], 10).tolist()
    hits = [len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)]
    assert np.mean(hits) > 2  # ten of 600 at random would be 0.2


def test_what_is_wrong_with_faiss_and_autofaiss_is_still_wrong():
    """When this fails, faiss takes keywords again or autofaiss gives none: `opq_keywords` can go."""
    with pytest.raises(TypeError):
        faiss.OPQMatrix(16, M=8, d2=16)
    from autofaiss.indices import index_factory

    with pytest.raises(TypeError):
        index_factory.index_factory(16, COMPRESSED, faiss.METRIC_INNER_PRODUCT)
    with autofaiss_compat.opq_keywords():
        made = index_factory.index_factory(16, COMPRESSED, faiss.METRIC_INNER_PRODUCT)
    assert (made.d, made.is_trained) == (16, False)
    assert index_factory.faiss is faiss


def test_autofaiss_failing_is_an_error_with_its_reason(tmp_path, capsys):
    make_embeddings(tmp_path / "e", {"image": random_rows(600)})
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(ClipIndexError, match=r"autofaiss cannot build.*memory"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), engine="autofaiss", memory="1K")
    with pytest.raises(ClipIndexError, match="autofaiss cannot build"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), engine="autofaiss", index_key="bogus")
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger("autofaiss").handlers == []
    assert capsys.readouterr() == ("", "")
    assert not os.path.exists(tmp_path / "i/clip_index.json")


def test_without_autofaiss_its_keys_are_built_by_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "autofaiss", None)
    make_embeddings(tmp_path / "e", {"image": random_rows(600)})
    report = build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key="IVF8,Flat")
    assert report["indices"]["image"]["engine"] == "faiss"
    with pytest.raises(ClipIndexError, match="autofaiss is not installed: --engine autofaiss needs it"):
        build_index(str(tmp_path / "e"), str(tmp_path / "j"), engine="autofaiss")


def test_faiss_failing_is_an_error_with_its_reason(tmp_path):
    make_embeddings(tmp_path / "e", {"image": random_rows(30)})
    with pytest.raises(ClipIndexError, match=r"faiss cannot build bogus.*could not parse"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key="bogus", engine="faiss")


def test_a_stray_file_among_the_vectors_is_noticed(tmp_path):
    make_embeddings(tmp_path / "e", {"image": random_rows(600)})
    np.save(tmp_path / "e/img_emb/other.npy", np.zeros((3, 16), np.float16))
    with pytest.raises(ClipIndexError, match=r"603 vectors.*the manifest says 600"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key="Flat", engine="autofaiss")


def test_embeddings_that_are_not_whole_are_refused(tmp_path, both):
    with pytest.raises(ClipIndexError, match=r"manifest.json is missing"):
        build_index(str(tmp_path), str(tmp_path / "i"))
    os.truncate(tmp_path / "e/text_emb/text_emb_00002.npy", 500)
    with pytest.raises(ClipIndexError, match=r"text_emb_00002\.npy"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    manifest = json.loads((tmp_path / "e/manifest.json").read_text())
    (tmp_path / "e/manifest.json").write_text(json.dumps({**manifest, "tasks": 9}))
    with pytest.raises(ClipIndexError, match="lacks 5 of 9 shards"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    make_embeddings(tmp_path / "empty", {"image": random_rows(1)[:0]}, shard_rows=[0])
    with pytest.raises(ClipIndexError, match="no rows"):
        build_index(str(tmp_path / "empty"), str(tmp_path / "i"))
    assert not os.path.exists(tmp_path / "i/clip_index.json")


def test_bad_arguments_are_refused(tmp_path):
    for wrong in ({"engine": "annoy"}, {"recall_target": 95}, {"memory": "much"}, {"queries": 0}):
        with pytest.raises(UsageError):
            build_index(str(tmp_path), str(tmp_path / "i"), **wrong)


def test_amounts_of_memory():
    assert parse_memory("4G") == 4 * 2**30
    assert parse_memory("1.5 gb") == 3 * 2**29
    assert parse_memory("512MiB") == 2**29
    assert parse_memory("2T") == 2**41
    assert parse_memory(1000) == parse_memory("1000") == parse_memory("1000B") == 1000
    for wrong in ("", "G", "-4G", "4X", "4G4", "0"):
        with pytest.raises(UsageError, match="amount of memory"):
            parse_memory(wrong)


def test_what_is_chosen():
    assert choose(EXACT_ROWS - 1, "auto", None) == ("faiss", "SQfp16")
    assert choose(EXACT_ROWS, "auto", None) == ("faiss", "IVF1024,RaBitQ")
    assert choose(10**6, "auto", None) == ("faiss", "IVF4096,RaBitQ")
    assert choose(10, "autofaiss", None) == ("autofaiss", None)
    assert choose(EXACT_ROWS - 1, "faiss", None) == ("faiss", "SQfp16")
    assert choose(10, "auto", "HNSW32") == ("autofaiss", "HNSW32")
    assert choose(10, "auto", "IVF64,RaBitQ") == ("faiss", "IVF64,RaBitQ")
    assert choose(10, "faiss", "HNSW32") == ("faiss", "HNSW32")


def test_the_embeddings_are_read_by_embedding_reader(tmp_path, both):
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(str(tmp_path / "e/img_emb"), file_format="npy")
    assert (reader.count, reader.dimension) == (120, 16)
    read = np.concatenate([block for block, _ in reader(batch_size=50, show_progress=False)])
    np.testing.assert_array_equal(read, stored(both["image"]))
    reader = EmbeddingReader(
        str(tmp_path / "e/img_emb"),
        metadata_folder=str(tmp_path / "e/metadata"),
        meta_columns=["key"],
        file_format="parquet_npy",
    )
    blocks = list(reader(batch_size=50, show_progress=False))
    assert [key for _, meta in blocks for key in meta["key"]] == [f"key-{row}" for row in range(120)]


def test_the_embeddings_are_indexed_by_autofaiss_on_its_command_line(tmp_path, both):
    command = [Path(sys.executable).parent / "autofaiss", "build_index", f"--embeddings={tmp_path}/e/img_emb"]
    command += [f"--index_path={tmp_path}/knn.index", f"--index_infos_path={tmp_path}/infos.json"]
    subprocess.run(command, check=True, capture_output=True)
    queries = random_rows(40, seed=2)
    found = faiss.read_index(str(tmp_path / "knn.index")).search(queries, 10)[1]
    np.testing.assert_array_equal(found, brute_force(stored(both["image"]), queries, 10))
    assert set(json.loads((tmp_path / "infos.json").read_text())) == INFOS


def test_verify_names_what_is_missing_truncated_or_altered(tmp_path, both):
    folder = tmp_path / "i"
    build_index(str(tmp_path / "e"), str(folder))
    assert verify_index(str(folder)) == []
    (folder / "text.json").unlink()
    os.truncate(folder / "text.index", 1000)
    data = bytearray((folder / "image.index").read_bytes())
    data[-1] ^= 1
    (folder / "image.index").write_bytes(data)
    altered, truncated, missing = verify_index(str(folder))
    assert altered == "image.index was altered: its checksum is not the marker's"
    assert "text.json is missing" in missing
    assert "text.index has 1000 bytes, its marker says" in truncated
    with pytest.raises(ClipIndexError, match=r"text\.index has 1000 bytes"):
        Searcher(str(folder)).search(vector=np.ones(16), modality="text")


def test_building_again_replaces_everything(tmp_path, both):
    folder = tmp_path / "i"
    build_index(str(tmp_path / "e"), str(folder))
    other = random_rows(40, dim=8, seed=5)
    make_embeddings(tmp_path / "other", {"image": other}, shard_rows=[40])
    report = build_index(str(tmp_path / "other"), str(folder))
    assert report["rows"] == 40
    names = [name for name, _ in storage.list_files(str(folder))]
    expected = ["clip_index.json", "image.index", "image.json", "metadata.arrow", "metadata/metadata_00000.parquet"]
    assert names == [*expected, "report.json"]
    assert verify_index(str(folder)) == []
    assert not [name for name in os.listdir(folder) if name.startswith(".staging")]


def test_an_open_searcher_keeps_its_index_and_never_mixes_two(tmp_path, both):
    folder = str(tmp_path / "i")
    build_index(str(tmp_path / "e"), folder)
    searcher = Searcher(folder)
    query = random_rows(1, seed=9)[0]
    before = searcher.search(vector=query)
    changed = {modality: vectors[::-1].copy() for modality, vectors in both.items()}
    make_embeddings(tmp_path / "e2", changed)
    build_index(str(tmp_path / "e2"), folder)
    assert searcher.search(vector=query) == before
    with pytest.raises(ClipIndexError, match="rebuilt since"):
        searcher.search(vector=query, modality="text")
    assert Searcher(folder).search(vector=query)[0].row == 119 - before[0].row


def test_other_peoples_files_are_not_overwritten(tmp_path, both):
    with pytest.raises(UsageError, match="choose another folder"):
        build_index(str(tmp_path / "e"), str(tmp_path / "e"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/image.index").write_bytes(b"theirs")
    with pytest.raises(UsageError, match=r"image\.index"):
        build_index(str(tmp_path / "e"), str(tmp_path / "theirs"))
    assert (tmp_path / "theirs/image.index").read_bytes() == b"theirs"


def test_one_writer_at_a_time(tmp_path, both):
    with IndexWriter(str(tmp_path / "i")), pytest.raises(ClipIndexError, match="another process is writing"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    build_index(str(tmp_path / "e"), str(tmp_path / "i"))


def test_a_folder_that_cannot_be_written(tmp_path, both):
    (tmp_path / "file").touch()
    with pytest.raises(ClipIndexError, match="cannot write to"):
        build_index(str(tmp_path / "e"), str(tmp_path / "file/i"))


def test_a_remote_index_over_remote_embeddings(cache):
    vectors = {"image": random_rows(60), "text": random_rows(60, seed=1)}
    make_embeddings("memory://remote/e", vectors)
    for _ in range(2):  # the second build replaces the first
        build_index("memory://remote/e", "memory://remote/i")
    assert verify_index("memory://remote/i") == []
    assert not [name for name in storage.list_names("memory://remote/i") if name.startswith(".staging")]
    query = random_rows(1, seed=2)
    expected = brute_force(stored(vectors["image"]), query, 10)[0]
    assert [hit.row for hit in Searcher("memory://remote/i").search(vector=query[0])] == list(expected)
    assert [hit.row for hit in Searcher().search(vector=query[0])] == list(expected)  # the index built last
    assert len(list(cache.rglob("image.index"))) == 1
    assert list(cache.rglob("text.index")) == []


FULL = """
import resource, sys
from clip_index.index import build_index
from clip_index.types import ClipIndexError

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    build_index(sys.argv[1], sys.argv[2])
except ClipIndexError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [2_000, 25_000])
def test_no_room_for_a_file_leaves_the_old_index(tmp_path, both, limit):
    big, folder = str(tmp_path / "big"), str(tmp_path / "i")
    build_index(str(tmp_path / "e"), folder)
    make_embeddings(big, {"image": random_rows(120, dim=200)})
    full = subprocess.run([sys.executable, "-c", FULL, big, folder, str(limit)], capture_output=True, text=True)
    assert full.stdout.startswith("cannot write"), full.stderr
    assert "File too large" in full.stdout
    assert verify_index(folder) == []
    assert len(Searcher(folder).search(vector=np.ones(16))) == 10
    assert not [name for name in os.listdir(folder) if name.startswith(".staging")]


KILL = """
import os, signal, sys
import faiss
from clip_index import index_writer, storage
from clip_index.index import build_index

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at(module, name, call):
    original, calls = getattr(module, name), []
    def counted(*args, **kwargs):
        calls.append(args)
        return kill() if len(calls) == call else original(*args, **kwargs)
    setattr(module, name, counted)

moment = sys.argv[3]
if moment == "second index":
    kill_at(faiss, "write_index", 2)
elif moment == "before the marker":
    kill_at(storage, "write_bytes", 1)
elif moment == "after the marker":
    kill_at(index_writer, "_move", 1)
elif moment == "among the moves":
    kill_at(index_writer, "_move", 4)
elif moment == "after the moves":
    kill_at(index_writer, "_remove_folder", 1)
build_index(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(
    ("moment", "survivor"),
    [
        ("second index", "old"),
        ("before the marker", "old"),
        ("after the marker", "new"),
        ("among the moves", "new"),
        ("after the moves", "new"),
    ],
)
def test_a_kill_leaves_one_index_whole(tmp_path, both, moment, survivor):
    old, new, folder = str(tmp_path / "e"), str(tmp_path / "new"), str(tmp_path / "i")
    make_embeddings(new, {modality: vectors[::-1].copy() for modality, vectors in both.items()})
    build_index(old, folder)
    killed = subprocess.run([sys.executable, "-c", KILL, new, folder, moment], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    query = random_rows(1, seed=9)[0]
    expected = {"old": both["text"], "new": both["text"][::-1]}[survivor]
    hits = Searcher(folder).search(vector=query, modality="text")
    assert [hit.row for hit in hits] == list(brute_force(stored(expected), query[None], 10)[0])
    assert verify_index(folder) == []
    build_index(new, folder)
    assert verify_index(folder) == []
    assert not [name for name in os.listdir(folder) if name.startswith(".staging") or name.endswith(".tmp")]
    assert [hit.row for hit in Searcher(folder).search(vector=query)] == list(
        brute_force(stored(both["image"][::-1]), query[None], 10)[0]
    )
