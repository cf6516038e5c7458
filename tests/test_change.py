"""The commands that change an index, as people run them; what they do is tested in test_upkeep."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_fakes import make_embeddings, metadata_rows, random_rows

from clip_index import cli
from clip_index.index import build_index, verify_index
from clip_index.search import Searcher

ROWS = random_rows(60)


@pytest.fixture
def index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, first, last in (("a", 0, 30), ("b", 30, 60)):
        make_embeddings(tmp_path / f"e{name}", {"image": ROWS[first:last]}, rows=metadata_rows(first, last - first))
        build_index(str(tmp_path / f"e{name}"), str(tmp_path / f"parts/{name}"))
    return tmp_path / "parts/a"


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def keys(index):
    return {int(hit.key[4:]) for hit in Searcher(str(index)).search(vector=np.ones(16), k=60)}


def test_append(index, capsys, tmp_path):
    status, out, err = run(capsys, "append", index, tmp_path / "eb")
    assert status == 0 and f"{index}: 60 rows of 16 dimensions" in out and "recall@10" in out
    assert err == f'next: clip-index query "a dog" --index {index}\n'
    assert keys(index) == set(range(60)) and verify_index(str(index)) == []


def test_merge(index, capsys, tmp_path):
    status, out, _ = run(capsys, "merge", tmp_path / "parts/*", tmp_path / "all", "--json")
    assert status == 0 and json.loads(out)["rows"] == 60
    assert keys(tmp_path / "all") == set(range(60))
    status, _, err = run(capsys, "merge", tmp_path / "nothing*", tmp_path / "none")
    assert status == 1 and "nothing matches" in err


def test_delete_and_compact(index, capsys, tmp_path):
    status, out, err = run(capsys, "delete", index, "--key", "key-7", "--where", "key in ('key-8', 'key-9')")
    assert (status, out) == (0, f"{index}: 3 rows deleted, 27 of 30 left\n")
    assert err == f"next: clip-index delete {index} --compact\n"
    assert keys(index) == set(range(30)) - {7, 8, 9}
    status, out, _ = run(capsys, "delete", index, "--row", "0", "--compact", "--json")
    told = json.loads(out)
    assert (status, told["deleted"], told["deleted_in_all"]) == (0, 1, 4)
    assert keys(index) == set(range(30)) - {0, 7, 8, 9} and Searcher(str(index)).rows == 26


def test_delete_what_is_listed(index, capsys, tmp_path):
    pq.write_table(pa.table({"row": [1, 2], "key": ["key-1", "key-2"]}), tmp_path / "dropped.parquet")
    (tmp_path / "keys.txt").write_text("key-3\nkey-4\n")
    for name in ("dropped.parquet", "keys.txt"):
        assert run(capsys, "delete", index, "--listed", tmp_path / name)[0] == 0
    assert keys(index) == set(range(30)) - {1, 2, 3, 4}
    pq.write_table(pa.table({"row": [1]}), tmp_path / "rows.parquet")
    status, _, err = run(capsys, "delete", index, "--listed", tmp_path / "rows.parquet")
    assert status == 2 and "has no column `key`, only row" in err


def test_nothing_to_delete_is_refused(index, capsys):
    status, out, err = run(capsys, "delete", index)
    assert (status, out) == (2, "") and "nothing to delete" in err
