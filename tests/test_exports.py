"""An index's rows for other engines, read back and searched by them."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
import warnings

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_fakes import brute_force, make_embeddings, metadata_rows, random_rows, stored

from clip_index import cli, upkeep
from clip_index.exports import lance as lance_table
from clip_index.exports import milvus as milvus_collection
from clip_index.exports import parquet, rows
from clip_index.exports.plain import plain, unique
from clip_index.exports.rows import export_rows
from clip_index.index import build_index
from clip_index.search import Searcher
from clip_index.types import ClipIndexError, UsageError

VECTORS = {"image": random_rows(300), "text": random_rows(300, seed=1)}
LEFT = np.delete(np.arange(300), [0, 77])
QUERY = random_rows(1, seed=5)[0]
ROWS = [
    {**row, "id": f"theirs {at}", "exif.iso": at / 4 if at % 5 else None, "9lives": bool(at % 2) if at % 3 else None}
    for at, row in enumerate(metadata_rows(0, 300))
]
ROWS[9]["caption"], ROWS[8]["caption"] = "é" * 40_000, None


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        make_embeddings(folder / "e", VECTORS, rows=ROWS)
        build_index(str(folder / "e"), str(folder / "i"), index_key="IVF4,RaBitQ", queries=20)
        upkeep.delete(str(folder / "i"), rows=[0, 77])
    return str(folder / "i")


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    monkeypatch.setattr(rows, "_BLOCK_ROWS", 64)


def nearest(modality, k=5):
    return LEFT[brute_force(stored(VECTORS[modality])[LEFT], QUERY[None], k)[0]].tolist()


def found_by_us(index, modality, k=5):
    hits = Searcher(index).search(vector=QUERY, k=k, modality=modality, nprobe=4, rerank=300)
    return [hit.row for hit in hits]


def metadata(row, **renamed):
    """What is to be read back of a row, under the names that an engine gives its columns."""
    told = {**ROWS[row], **renamed}
    return {**{name: told[name] for name in told if name != "id"}, "meta_id": told["id"]}


def check(table, names):
    assert table["id"].to_pylist() == LEFT.tolist()
    for modality, vectors in VECTORS.items():
        np.testing.assert_array_equal(np.stack(table[f"{modality}_vector"].to_pylist()), stored(vectors)[LEFT])
    wanted = [{names.get(name, name): value for name, value in metadata(row).items()} for row in LEFT.tolist()]
    assert table.select(list(wanted[0])).to_pylist() == wanted


def test_parquet(index, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_FILE_BLOCKS", 2)
    told = export_rows(index, str(tmp_path / "out"), "parquet")
    assert told == {"output": str(tmp_path / "out"), "format": "parquet", "rows": 298, "notes": []}
    files = sorted((tmp_path / "out").iterdir())
    # 300 rows in blocks of 64, two blocks a file; two rows of the first four blocks are deleted
    assert [pq.read_metadata(path).num_rows for path in files] == [126, 128, 44]
    assert [path.name for path in files] == [f"rows_0000{n}.parquet" for n in range(3)]
    check(pq.read_table(tmp_path / "out"), {})
    with pytest.raises(UsageError, match="is not empty"):
        export_rows(index, str(tmp_path / "out"), "parquet")


def test_lance_takes_over_our_lists(index, tmp_path, monkeypatch):
    lance = pytest.importorskip("lance", reason="the extra `lance` is not installed")
    told = export_rows(index, str(tmp_path / "out.lance"), "lance")
    assert told["notes"] == [
        "exif.iso is called exif_iso",
        *(f"{name}_vector has an IVF_RQ index over our 4 lists" for name in VECTORS),
    ]
    table = lance.dataset(str(tmp_path / "out.lance"))
    assert len(table.versions()) == 3  # written at once, then two indices
    check(table.to_table(), {"exif.iso": "exif_iso"})
    monkeypatch.setenv("LANCE_INCLUDE_VECTOR_CENTROIDS", "true")
    for modality, vectors in VECTORS.items():
        told = table.stats.index_stats(f"{modality}_vector_idx")["indices"][0]
        ours = faiss.read_index(f"{index}/{modality}.index")
        inverted = faiss.downcast_index(ours.index)
        turned = faiss.downcast_VectorTransform(ours.chain.at(0)).apply(np.float32(told["centroids"]))
        held = faiss.downcast_index(inverted.quantizer).reconstruct_n(0, 4)
        np.testing.assert_allclose(turned, held, atol=1e-5)
        # each row is in the list of the nearest centroid, as faiss finds it
        lists = faiss.knn(stored(vectors)[LEFT], np.float32(told["centroids"]), 1)[1][:, 0]
        assert [part["size"] for part in told["partitions"]] == np.bincount(lists, minlength=4).tolist()
        asked = {"column": f"{modality}_vector", "q": QUERY, "k": 5, "nprobes": 4, "refine_factor": 60}
        answered = table.to_table(columns=["id", "_distance"], nearest=asked)
        assert answered["id"].to_pylist() == nearest(modality) == found_by_us(index, modality)
        scores = np.sort(stored(vectors)[LEFT] @ QUERY)[::-1][:5]
        np.testing.assert_allclose(1 - answered["_distance"].to_numpy(), scores, atol=2e-3)  # float16 rows


def test_a_lance_table_of_few_rows_has_no_lists(tmp_path, monkeypatch):
    lance = pytest.importorskip("lance", reason="the extra `lance` is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_embeddings(tmp_path / "e", {"text": VECTORS["text"][:50]})
    build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    told = export_rows(str(tmp_path / "i"), str(tmp_path / "out"), "lance")
    assert told["notes"] == ["text_vector has no index: ours compares every row, and has no lists"]
    table = lance.dataset(str(tmp_path / "out"))
    assert table.describe_indices() == [] and table.count_rows() == 50


def test_centroids_of_dimensions_that_are_no_whole_bytes(tmp_path):
    vectors = random_rows(500, dim=12)
    index = faiss.index_factory(12, "IVF5,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    faiss.write_index(index, str(tmp_path / "x.index"))
    np.testing.assert_array_equal(lance_table.centroids(str(tmp_path / "x.index")), index.quantizer.reconstruct_n(0, 5))
    faiss.write_index(faiss.IndexFlatIP(12), str(tmp_path / "flat.index"))
    assert lance_table.centroids(str(tmp_path / "flat.index")) is None


def test_milvus(index, tmp_path):
    pymilvus = pytest.importorskip("pymilvus", reason="the extra `milvus` is not installed")
    output = str(tmp_path / "new" / "out.db")
    told = export_rows(index, output, "milvus", collection="mine")
    assert told["rows"] == 298
    assert told["notes"] == [
        "9lives is called _9lives",
        "exif.iso is called exif_iso",
        "rows whose texts are cut to the 65,535 bytes that Milvus holds: 1",
    ]
    client = pymilvus.MilvusClient(output)
    client.load_collection("mine")
    assert client.query("mine", output_fields=["count(*)"])[0]["count(*)"] == 298
    fields = ["id", *metadata(0), "image_vector", "text_vector"]
    names = {"exif.iso": "exif_iso", "9lives": "_9lives"}
    fields = [names.get(name, name) for name in fields]
    held = {row["id"]: row for row in client.query("mine", filter="id >= 0", output_fields=fields)}
    assert sorted(held) == LEFT.tolist()
    for row in LEFT.tolist():
        wanted = metadata(row, **({"caption": "é" * 32_767} if row == 9 else {}))
        assert {name: held[row][names.get(name, name)] for name in wanted} == wanted
        for modality, vectors in VECTORS.items():
            np.testing.assert_array_equal(np.float32(held[row][f"{modality}_vector"]), stored(vectors)[row])
    for modality in VECTORS:
        hits = client.search("mine", [QUERY.tolist()], anns_field=f"{modality}_vector", limit=5)[0]
        assert [hit["id"] for hit in hits] == nearest(modality) == found_by_us(index, modality)
    client.close()
    with pytest.raises(UsageError, match="has a collection 'mine'"):
        export_rows(index, output, "milvus", collection="mine")
    with pytest.raises(UsageError, match=r"a new file that ends in \.db"):
        export_rows(index, str(tmp_path / "out"), "milvus")


def test_what_milvus_refuses_is_one_line(index, tmp_path, monkeypatch, capfd):
    pytest.importorskip("pymilvus", reason="the extra `milvus` is not installed")
    monkeypatch.setattr(milvus_collection, "_TEXT_BYTES", 100)
    monkeypatch.setattr(milvus_collection, "_fitting", lambda value: value)
    assert cli.main(["export", index, str(tmp_path / "out.db"), "--format", "milvus"]) == 1
    said = capfd.readouterr().err
    assert (
        said.startswith(f"clip-index: Milvus at {tmp_path}/out.db does not take the rows: ") and said.count("\n") == 1
    )


def test_qdrant(index, tmp_path):
    qdrant = pytest.importorskip("qdrant_client", reason="the extra `qdrant` is not installed")
    assert export_rows(index, str(tmp_path / "out"), "qdrant", collection="mine")["notes"] == []
    client = qdrant.QdrantClient(path=str(tmp_path / "out"))
    assert client.count("mine").count == 298
    for modality, vectors in VECTORS.items():
        points = client.query_points("mine", query=QUERY.tolist(), using=modality, limit=5, with_vectors=True).points
        assert [point.id for point in points] == nearest(modality) == found_by_us(index, modality)
        assert [point.payload for point in points] == [metadata(point.id) for point in points]
        for point in points:
            np.testing.assert_allclose(
                point.vector[modality], stored(vectors)[point.id], atol=2e-3
            )  # scaled to length 1
    client.close()
    with pytest.raises(UsageError, match="has a collection 'mine'"):
        export_rows(index, str(tmp_path / "out"), "qdrant", collection="mine")


@pytest.mark.parametrize(
    ("format", "library"), [("lance", "lance"), ("milvus", "pymilvus"), ("qdrant", "qdrant_client")]
)
def test_a_missing_library_is_named(index, tmp_path, monkeypatch, format, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"pip install 'clip-index\[{format}\]'"):
        export_rows(index, str(tmp_path / "out.db"), format)


@pytest.mark.parametrize("format", ["milvus", "qdrant"])
def test_a_server_that_is_not_there(index, format):
    pytest.importorskip({"milvus": "pymilvus", "qdrant": "qdrant_client"}[format], reason=f"no extra `{format}`")
    with pytest.raises(ClipIndexError, match=r"at http://127\.0\.0\.1:9 does not take the rows: .") as told:
        export_rows(index, "http://127.0.0.1:9", format)
    assert "\n" not in str(told.value)


def test_codes_alone_are_no_vectors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_embeddings(tmp_path / "e", {"image": VECTORS["image"]})
    build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key="IVF2,SQ8", queries=20)
    with pytest.raises(ClipIndexError, match="codes of its vectors alone"):
        export_rows(str(tmp_path / "i"), str(tmp_path / "out"), "parquet")


def test_every_type_becomes_a_plain_one():
    when = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)
    table = pa.table(
        {
            "small": pa.array([-3, None], pa.int8()),
            "hash": pa.array([2**64 - 1, None], pa.uint64()),
            "half": pa.array(np.float16([0.5, np.inf])),
            "number": pa.array([float("nan"), None]),
            "flag": pa.array([True, None]),
            "large": pa.array(["x", None], pa.large_string()),
            "words": pa.array(["x", None]).dictionary_encode(),
            "nothing": pa.nulls(2),
            "day": pa.array([datetime.date(2024, 2, 29), None]),
            "time": pa.array([when, None], pa.timestamp("s", "UTC")),
            "money": pa.array([decimal.Decimal("1.50"), None]),
            "bytes": pa.array([b"\xff\x00", None]),
            "fixed": pa.array([b"\xff\x00", None], pa.binary(2)),
            "list": pa.array([[1.5, float("inf"), None], None]),
            "struct": pa.array([{"a": "é", "b": b"\x01", "c": [when]}, None]),
        }
    )
    got = pa.table({name: plain(table[name]) for name in table.column_names})
    assert {str(kind) for kind in got.schema.types} == {"int64", "double", "bool", "string"}
    assert got.to_pylist() == [
        {
            "small": -3, "hash": "18446744073709551615", "half": 0.5, "number": None, "flag": True, "large": "x",
            "words": "x", "nothing": None, "day": "2024-02-29", "time": "2024-02-29 12:00:00Z", "money": "1.50",
            "bytes": "ff00", "fixed": "ff00", "list": "[1.5, null, null]",
            "struct": '{"a": "é", "b": "01", "c": ["2024-02-29 12:00:00+00:00"]}',
        },
        dict.fromkeys(table.column_names),
    ]  # fmt: skip


def test_names_stay_apart():
    assert unique(["a.b", "a_b", "id", "x"], {"id"}, r"\.") == ["a_b", "meta_a_b", "meta_id", "x"]


def test_texts_are_cut_between_characters():
    for text, kept in (
        ("x" * 65_535, 65_535),
        ("x" * 65_536, 65_535),
        ("é" * 32_768, 32_767),
        ("x" + "é" * 40_000, 32_768),
    ):
        assert milvus_collection._fitting(text) == text[:kept]
    assert milvus_collection._fitting(None) is None and milvus_collection._fitting(7) == 7


def run(capsys, *argv):
    with warnings.catch_warnings():
        status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def test_the_command(index, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, "export", index, out, "--format", "parquet") == (0, f"{out}: 298 rows\n", "")
    status, said, _ = run(capsys, "export", index, tmp_path / "json", "--format", "parquet", "--json")
    assert status == 0
    assert json.loads(said) == {"output": str(tmp_path / "json"), "format": "parquet", "rows": 298, "notes": []}
    assert run(capsys, "export", index, out, "--format", "parquet")[0] == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "is an index: say what to make of it with --format parquet, lance, milvus or qdrant"),
        (["--format", "onnx"], "is an index: say what to make of it with --format parquet, lance, milvus or qdrant"),
        (["--format", "lance", "--precision", "int8"], "--precision is for models"),
        (["--format", "lance", "--collection", "x"], "--collection is for milvus and qdrant, not lance"),
        (["--format", "faiss"], "faiss"),
    ],
)
def test_what_does_not_fit_an_index(index, tmp_path, capsys, argv, says):
    status, out, err = run(capsys, "export", index, tmp_path / "out", *argv)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--format", "parquet"], "--format parquet is for an index, and there is none in ViT-B-32/openai"),
        (["--collection", "x"], "--collection is for the rows of an index"),
    ],
)
def test_what_does_not_fit_a_model(tmp_path, capsys, argv, says):
    status, out, err = run(capsys, "export", "ViT-B-32/openai", tmp_path / "out", *argv)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1
