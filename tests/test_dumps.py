"""What is written for other engines, read back and searched by them."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_fakes import brute_force, make_embeddings, metadata_rows, random_rows, stored

from clip_index import cli, dumps, upkeep
from clip_index.dumps import dump
from clip_index.index import build_index
from clip_index.types import UsageError

VECTORS = {"image": random_rows(300), "text": random_rows(300, seed=1)}
LEFT = np.delete(np.arange(300), [0, 77])
QUERY = random_rows(1, seed=5)[0]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        make_embeddings(folder / "e", VECTORS)
        build_index(str(folder / "e"), str(folder / "i"), index_key="IVF4,RaBitQ", queries=20)
        upkeep.delete(str(folder / "i"), rows=[0, 77])
    return str(folder / "i")


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    monkeypatch.setattr(dumps._Rows.blocks, "__defaults__", (128,))


def nearest(modality, k=5):
    rows = stored(VECTORS[modality])[LEFT]
    return LEFT[brute_force(rows, QUERY[None], k)[0]].tolist()


def check(table):
    assert table["id"].to_pylist() == LEFT.tolist()
    for modality, rows in VECTORS.items():
        np.testing.assert_array_equal(np.stack(table[f"{modality}_vector"].to_pylist()), stored(rows)[LEFT])
    assert table.select(list(metadata_rows(0, 1)[0])).to_pylist() == [metadata_rows(row, 1)[0] for row in LEFT.tolist()]


def test_parquet(index, tmp_path):
    assert dump(index, str(tmp_path / "out")) == 298
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"rows_0000{n}.parquet" for n in range(3)]
    check(pq.read_table(tmp_path / "out"))
    with pytest.raises(UsageError, match="is not empty"):
        dump(index, str(tmp_path / "out"))


def test_lance(index, tmp_path):
    lance = pytest.importorskip("lance", reason="the extra `lance` is not installed")
    dump(index, str(tmp_path / "out.lance"), "lance")
    table = lance.dataset(str(tmp_path / "out.lance"))
    check(table.to_table())
    for modality in VECTORS:
        asked = {"column": f"{modality}_vector", "q": QUERY, "k": 5, "metric": "dot"}
        assert table.to_table(columns=["id"], nearest=asked)["id"].to_pylist() == nearest(modality)


def test_qdrant(index, tmp_path):
    qdrant = pytest.importorskip("qdrant_client", reason="the extra `qdrant` is not installed")
    dump(index, str(tmp_path / "out"), "qdrant", collection="mine")
    client = qdrant.QdrantClient(path=str(tmp_path / "out"))
    assert client.count("mine").count == 298
    for modality in VECTORS:
        points = client.query_points("mine", query=QUERY.tolist(), using=modality, limit=5).points
        assert [point.id for point in points] == nearest(modality)
        assert [point.payload for point in points] == [metadata_rows(point.id, 1)[0] for point in points]
    client.close()
    with pytest.raises(UsageError, match="has a collection 'mine'"):
        dump(index, str(tmp_path / "out"), "qdrant", collection="mine")


@pytest.mark.parametrize(("kind", "library"), [("lance", "lance"), ("qdrant", "qdrant_client")])
def test_a_missing_library_is_named(index, tmp_path, monkeypatch, kind, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"pip install 'clip-index\[{kind}\]'"):
        dump(index, str(tmp_path / "out"), kind)


def test_the_command(index, tmp_path, capsys):
    assert cli.main(["dump", index, str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 298 rows\n"
    assert cli.main(["dump", index, str(tmp_path / "out")]) == 2
