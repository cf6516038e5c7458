from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_fakes import make_embeddings, metadata_rows, random_rows

from clip_index import metadata
from clip_index.metadata import Metadata, write_metadata
from clip_index.types import ClipIndexError


def written(tmp_path, rows, shard_rows):
    manifest = make_embeddings(tmp_path / "e", {"image": random_rows(len(rows))}, rows=rows, shard_rows=shard_rows)
    write_metadata(str(tmp_path / "e"), manifest, str(tmp_path / "metadata.arrow"))
    return Metadata(str(tmp_path / "metadata.arrow"))


@pytest.mark.parametrize("few", [0, 64])
def test_rows_keep_their_order_whatever_the_batches(tmp_path, monkeypatch, few):
    monkeypatch.setattr(metadata, "BATCH_ROWS", 7)
    monkeypatch.setattr(metadata, "_FEW_ROWS", few)
    rows = metadata_rows(0, 40)
    table = written(tmp_path, rows, [11, 0, 28, 1])
    assert table.rows == 40
    assert table.take(range(40)) == rows
    wanted = [39, 0, 13, 14, 0, 6, 7]
    assert table.take(wanted) == [rows[row] for row in wanted]
    assert table.take(np.array(wanted), ["caption"]) == [{"caption": rows[row]["caption"]} for row in wanted]
    assert table.take([]) == []


@pytest.mark.parametrize("few", [0, 64])
def test_columns_that_differ_between_shards(tmp_path, monkeypatch, few):
    monkeypatch.setattr(metadata, "_FEW_ROWS", few)
    sidecars = [
        {"score": 1, "id": 7, "note": "x", "empty": None},
        {"score": 0.5, "id": "seven", "empty": None},
        {"score": float("nan"), "id": 9, "tag": True},
    ]
    rows = [{**row, **sidecar} for row, sidecar in zip(metadata_rows(0, 3), sidecars, strict=True)]
    table = written(tmp_path, rows, [1, 1, 1])
    assert table.names == [*metadata_rows(0, 1)[0], "empty", "id", "note", "score", "tag"]
    assert table.take(range(3), table.names[6:]) == [
        {"empty": None, "id": "7", "note": "x", "score": 1.0, "tag": None},
        {"empty": None, "id": "seven", "note": None, "score": 0.5, "tag": None},
        {"empty": None, "id": "9", "note": None, "score": None, "tag": True},
    ]
    assert math.isnan(pq.read_table(tmp_path / "e/metadata/metadata_00002.parquet")["score"][0].as_py())


def test_odd_characters(tmp_path):
    rows = metadata_rows(0, 3)
    rows[1]["caption"] = 'um "cão", 犬\n\x00 🐕'
    assert written(tmp_path, rows, [2, 1]).take([1])[0]["caption"] == rows[1]["caption"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"PAR1"), "not a parquet file"),
        (lambda path: pq.write_table(pq.read_table(path).slice(1), path), "has 9 rows, the manifest says 10"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, message):
    manifest = make_embeddings(tmp_path, {"image": random_rows(30)})
    damage(tmp_path / "metadata/metadata_00001.parquet")
    with pytest.raises(ClipIndexError, match=f"metadata_00001.parquet.*{message}"):
        write_metadata(str(tmp_path), manifest, str(tmp_path / "metadata.arrow"))
