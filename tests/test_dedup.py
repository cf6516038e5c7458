from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_fakes import make_embeddings, metadata_rows, random_rows, stored

from clip_index import cli
from clip_index.index import build_index
from clip_index.types import normalize


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Row 20 + i is a copy of row i for i < 10, of a larger picture where i is even."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = random_rows(20)
    rows = np.concatenate([rows, normalize(rows[:10] + 0.02 * random_rows(10, seed=1))])
    columns = [
        {**row, "width": 640 + (number >= 20 and number % 2 == 0)} for number, row in enumerate(metadata_rows(0, 30))
    ]
    make_embeddings(tmp_path / "e", {"image": rows}, rows=columns)
    build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    return tmp_path / "i", stored(rows)


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def test_one_of_each_group_is_kept_and_the_others_say_which(index, capsys, tmp_path):
    folder, rows = index
    status, out, err = run(capsys, "dedup", folder, tmp_path / "d")
    assert (status, out) == (0, "20 rows to keep, 10 to drop in 10 groups\n")
    assert err.endswith(f"next: clip-index delete {folder} --listed {tmp_path}/d/dropped.parquet\n")
    kept, dropped = (pq.read_table(tmp_path / f"d/{name}.parquet").to_pylist() for name in ("kept", "dropped"))
    pairs = {(20 + i, i) if i % 2 else (i, 20 + i) for i in range(10)}  # (dropped, kept)
    assert {(row["row"], row["kept_row"]) for row in dropped} == pairs
    assert [row["row"] for row in kept] == sorted(set(range(30)) - {row for row, _ in pairs})
    for row in dropped:
        assert (row["key"], row["kept_key"]) == (f"key-{row['row']}", f"key-{row['kept_row']}")
        assert row["similarity"] == pytest.approx(float(rows[row["row"]] @ rows[row["kept_row"]]), abs=1e-6)
    assert sorted(row["group_rows"] for row in kept) == [1] * 10 + [2] * 10


def test_the_first_is_kept_when_asked_and_json_says_it_all(index, capsys, tmp_path):
    status, out, err = run(capsys, "dedup", index[0], tmp_path / "d", "--keep", "first", "--json")
    told = json.loads(out)
    assert (status, err) == (0, "")
    assert (told["kept"], told["dropped"], told["groups"]) == (20, 10, 10)
    assert pq.read_table(tmp_path / "d/dropped.parquet")["row"].to_pylist() == list(range(20, 30))


def test_nothing_is_alike(index, capsys, tmp_path):
    status, out, _ = run(capsys, "dedup", index[0], tmp_path / "d", "--threshold", "1.0")
    assert (status, out) == (0, "30 rows to keep, 0 to drop in 0 groups\n")
    assert pq.read_table(tmp_path / "d/dropped.parquet").num_rows == 0


def test_what_is_refused(index, capsys, tmp_path):
    for argv, says in ((["--threshold", "95"], "--threshold 95.0"), (["--modality", "text"], "the index has image")):
        status, out, err = run(capsys, "dedup", index[0], tmp_path / "d", *argv)
        assert (status, out) == (2, "") and says in err
