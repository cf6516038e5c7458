"""The on-disk format: what is written when, what is read back, and what `verify` finds."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_index import markers, storage, store
from clip_index.cli import main
from clip_index.markers import Shard, ShardTable, read_markers
from clip_index.shard_writer import EmbeddingWriter
from clip_index.types import ClipIndexError, Task, normalize
from clip_index.verify import verify

CONFIG = store.EmbeddingConfig("mini", "mini-1:abc", "fp32", {"size": 224}, ("image", "text"), dim=8)


def unit_rows(n: int, seed: int = 0, dim: int = 8) -> np.ndarray:
    return normalize(np.random.default_rng(seed).standard_normal((n, dim)))


def metadata(n: int, prefix: str = "k") -> list[dict]:
    return [
        {
            "image_path": f"/p/{prefix}{i}.jpg",
            "caption": f"c{i}",
            "key": f"{prefix}{i}",
            "source": f"/p/{prefix}{i}.jpg",
        }
        for i in range(n)
    ]


def write_shard(folder: str, shard: int, n: int, failed: int = 0, config: store.EmbeddingConfig = CONFIG) -> Shard:
    task = Task(shard, ((f"in{shard}",),), n)
    with EmbeddingWriter(folder, task, config) as writer:
        for start in range(0, n, 3):
            rows = metadata(n)[start : start + 3]
            vectors = {name: unit_rows(n, shard)[start : start + 3] for name in config.modalities}
            writer.append(vectors, rows)
        for i in range(failed):
            writer.fail(f"bad{i}", f"/p/bad{i}.jpg", "truncated")
        return writer.commit()


def write_folder(folder: Path, rows: list[int], config: store.EmbeddingConfig = CONFIG) -> store.Manifest:
    for shard, n in enumerate(rows):
        write_shard(str(folder), shard, n, config=config)
    return store.finalize(str(folder), store.Manifest(config, tasks=len(rows)))


def test_a_shard_on_disk(tmp_path):
    shard = write_shard(str(tmp_path), 42, 7, failed=2)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "done/00042.json",
        "failed/failed_00042.parquet",
        "img_emb/img_emb_00042.npy",
        "metadata/metadata_00042.parquet",
        "text_emb/text_emb_00042.npy",
    ]
    vectors = np.load(tmp_path / "img_emb/img_emb_00042.npy")
    assert vectors.dtype == np.dtype("<f2") and vectors.flags.c_contiguous
    np.testing.assert_array_equal(vectors, unit_rows(7, 42).astype(np.float16))
    header = (tmp_path / "img_emb/img_emb_00042.npy").read_bytes()[:128]
    assert header.startswith(b"\x93NUMPY\x01\x00") and header.endswith(b"\n") and b"'shape': (7, 8)" in header
    table = pq.read_table(tmp_path / "metadata/metadata_00042.parquet")
    assert table.to_pylist() == metadata(7)
    failed = pq.read_table(tmp_path / "failed/failed_00042.parquet").to_pylist()
    assert failed[1] == {"key": "bad1", "source": "/p/bad1.jpg", "error": "truncated"}
    marker = json.loads((tmp_path / "done/00042.json").read_bytes())
    assert (marker["id"], marker["rows"], marker["failed"], shard.rows) == (42, 7, 2, 7)
    for name, recorded in marker["files"].items():
        data = (tmp_path / name).read_bytes()
        assert recorded == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(marker["files"]) == {name for name in files if not name.startswith("done/")}


def test_nothing_has_its_name_before_commit(tmp_path):
    task = Task(0, (("a", 1),), 3)
    with pytest.raises(RuntimeError, match="killed"), EmbeddingWriter(str(tmp_path), task, CONFIG) as writer:
        writer.append({"image": unit_rows(3), "text": unit_rows(3)}, metadata(3))
        names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
        assert len(names) == 2 and all(name.endswith(".tmp") for name in names)
        raise RuntimeError("killed")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_marker_is_written_last(tmp_path, monkeypatch):
    order = []
    commit = storage.Spool.commit
    monkeypatch.setattr(
        storage.Spool, "commit", lambda spool: (order.append(os.path.basename(spool.target)), commit(spool))
    )
    write_shard(str(tmp_path), 1, 2, failed=1)
    assert order[-1] == "00001.json" and len(order) == 5


def test_a_shard_without_rows_has_no_vectors(tmp_path):
    shard = write_shard(str(tmp_path), 0, 0, failed=1)
    assert set(shard.files) == {"failed/failed_00000.parquet"}
    assert not (tmp_path / "img_emb").exists() or list((tmp_path / "img_emb").iterdir()) == []
    assert store.finalize(str(tmp_path), store.Manifest(CONFIG, tasks=1)).rows == 0
    assert verify(str(tmp_path)) == []


def test_a_shard_written_again_leaves_nothing_of_the_old_one(tmp_path):
    write_shard(str(tmp_path), 0, 5, failed=1)
    write_shard(str(tmp_path), 0, 2)
    assert not (tmp_path / "failed/failed_00000.parquet").exists()
    assert len(np.load(tmp_path / "img_emb/img_emb_00000.npy")) == 2


def test_a_shard_that_another_run_has_finished_is_left_alone(tmp_path):
    write_shard(str(tmp_path), 0, 5, failed=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert write_shard(str(tmp_path), 0, 5, failed=1).rows == 5
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_shard_that_another_run_has_made_from_other_inputs_is_not_replaced(tmp_path):
    write_shard(str(tmp_path), 0, 5)
    task = Task(0, (("other",),), 2)
    with (
        pytest.raises(ClipIndexError, match="another run embeds other inputs"),
        EmbeddingWriter(str(tmp_path), task, CONFIG) as writer,
    ):
        writer.append({name: unit_rows(2) for name in CONFIG.modalities}, metadata(2))
        writer.commit()
    assert len(store.read_vectors(str(tmp_path), "image", 0)) == 5 and not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(ClipIndexError, match="has embedded other inputs"):
        store.finalize(str(tmp_path), store.Manifest(CONFIG, tasks=1), [task.digest.encode()])


def test_the_markers_of_a_rank(tmp_path):
    for shard in range(7):
        write_shard(str(tmp_path), shard, 2)
    assert [shard.id for shard in read_markers(str(tmp_path), rank=1, world=3)] == [1, 4]
    assert [(shard.id, shard.rows, len(shard.files)) for shard in read_markers(str(tmp_path))] == [
        (number, 2, 3) for number in range(7)
    ]


def test_wrong_shapes_are_refused(tmp_path):
    with (
        EmbeddingWriter(str(tmp_path), Task(0, ()), CONFIG) as writer,
        pytest.raises(ValueError, match="expected"),
    ):
        writer.append({"image": unit_rows(3), "text": unit_rows(2)}, metadata(3))


def test_columns_of_mixed_kinds(tmp_path):
    rows = metadata(5)
    rows[0] |= {"a": 1, "b": 1, "c": True, "d": 2**70}
    rows[1] |= {"a": 2.5, "b": "x", "c": None, "d": 1}
    rows[4] |= {"late": "z", "b": True}
    with EmbeddingWriter(str(tmp_path), Task(0, ()), CONFIG) as writer:
        writer.append({"image": unit_rows(5), "text": unit_rows(5)}, rows)
        writer.commit()
    table = store.read_metadata(str(tmp_path), 0)
    assert table.column_names == ["image_path", "caption", "key", "source", "a", "b", "c", "d", "late"]
    assert table["a"].to_pylist() == [1.0, 2.5, None, None, None]
    assert table["b"].to_pylist() == ["1", "x", None, None, "true"]
    assert table["c"].to_pylist() == [True, None, None, None, None]
    assert table["d"].to_pylist() == [str(2**70), "1", None, None, None]
    assert table["late"].to_pylist() == [None, None, None, None, "z"]


def test_columns_settle_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(store.columns, "_BLOCK", 2)
    rows = metadata(6)
    for i, value in enumerate([1, 2, None, None, 0.5, 3]):
        rows[i]["n"] = value
    with EmbeddingWriter(str(tmp_path), Task(0, ()), CONFIG) as writer:
        for start in range(0, 6, 2):
            writer.append({"image": unit_rows(2), "text": unit_rows(2)}, rows[start : start + 2])
        writer.commit()
    assert store.read_metadata(str(tmp_path), 0)["n"].to_pylist() == [1.0, 2.0, None, None, 0.5, 3.0]


def test_a_name_that_is_not_utf8_is_kept_readable(tmp_path):
    rows = metadata(1)
    rows[0]["key"] = os.fsdecode(b"caf\xe9.jpg")
    with EmbeddingWriter(str(tmp_path), Task(0, ((os.fsdecode(b"caf\xe9.jpg"), 1),)), CONFIG) as writer:
        writer.append({"image": unit_rows(1), "text": unit_rows(1)}, rows)
        writer.commit()
    assert store.read_metadata(str(tmp_path), 0)["key"].to_pylist() == ["caf\\udce9.jpg"]
    assert [shard.rows for shard in read_markers(str(tmp_path))] == [1]


def test_manifest_maps_rows_to_shards(tmp_path):
    manifest = write_folder(tmp_path, [3, 0, 2])
    again = store.Manifest.load(str(tmp_path))
    assert again.config == CONFIG and again.complete and (again.rows, again.failed) == (5, 0)
    assert [again.locate(row) for row in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert again.digest == manifest.digest
    for row in (-1, 5):
        with pytest.raises(IndexError):
            again.locate(row)


def test_finalize_names_what_is_missing(tmp_path):
    write_shard(str(tmp_path), 0, 1)
    write_shard(str(tmp_path), 2, 1)
    with pytest.raises(ClipIndexError, match=r"lacks 2 of 4 shards \(00001, 00003\)"):
        store.finalize(str(tmp_path), store.Manifest(CONFIG, tasks=4))


def test_finalize_removes_what_killed_writers_left(tmp_path):
    write_shard(str(tmp_path), 0, 1)
    (tmp_path / "img_emb/img_emb_00000.npy.host-1-aa.tmp").write_bytes(b"half")
    store.finalize(str(tmp_path), store.Manifest(CONFIG, tasks=1))
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    ("contents", "says"),
    [(b"{", "is not a manifest"), (b"{}", "is not a manifest"), (b'{"version": 99}', "format version 99")],
)
def test_a_manifest_that_cannot_be_understood(tmp_path, contents, says):
    (tmp_path / "manifest.json").write_bytes(contents)
    with pytest.raises(ClipIndexError, match=says):
        store.Manifest.load(str(tmp_path))
    with pytest.raises(ClipIndexError, match=r"manifest\.json is missing"):
        store.Manifest.load(str(tmp_path / "elsewhere"))


def test_differences_name_the_fields():
    other = store.EmbeddingConfig("mini", "mini-1:abc", "bf16", {"size": 256}, ("image", "text"), dim=8)
    assert CONFIG.differences(other) == ["precision: fp32 -> bf16", "preprocess.size: 224 -> 256"]
    assert CONFIG.differences(CONFIG) == []


def spoil_vectors(folder: Path) -> str:
    """Change a value and keep the marker honest: only the contents are wrong."""
    path = folder / "img_emb/img_emb_00001.npy"
    vectors = np.load(path)
    vectors[1] *= 2
    np.save(path, vectors)
    rewrite_marker(folder, "img_emb/img_emb_00001.npy")
    return "img_emb_00001.npy has 1 rows that are not of unit norm, the first is row 1"


def drop_a_row(folder: Path) -> str:
    path = folder / "metadata/metadata_00001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 3), path)
    rewrite_marker(folder, "metadata/metadata_00001.parquet")
    return "metadata_00001.parquet has 3 rows, its marker says 4"


def rewrite_marker(folder: Path, name: str) -> None:
    marker = json.loads((folder / "done/00001.json").read_bytes())
    data = (folder / name).read_bytes()
    marker["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "done/00001.json").write_text(json.dumps(marker))


def flip_a_bit(folder: Path) -> str:
    path = folder / "text_emb/text_emb_00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "text_emb_00001.npy was altered"


def truncate(folder: Path) -> str:
    path = folder / "text_emb/text_emb_00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    return "text_emb_00001.npy has 190 bytes, its marker says 192"


def lose_a_file(folder: Path) -> str:
    (folder / "metadata/metadata_00000.parquet").unlink()
    return "metadata_00000.parquet is missing"


def lose_a_marker(folder: Path) -> str:
    (folder / "done/00001.json").unlink()
    return "shard 00001 has no marker"


def add_a_stray(folder: Path) -> str:
    (folder / "img_emb/other.npy").write_bytes(b"x")
    return "img_emb/other.npy belongs to no finished shard"


def damage_the_table(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"rows": [3, 4]', '"rows": [4, 3]'))
    return "shard 00000: manifest.json and its marker differ"


@pytest.mark.parametrize(
    "damage",
    [spoil_vectors, drop_a_row, flip_a_bit, truncate, lose_a_file, lose_a_marker, add_a_stray, damage_the_table],
)
def test_verify_names_what_is_wrong(tmp_path, damage):
    write_folder(tmp_path, [3, 4])
    assert verify(str(tmp_path)) == []
    says = damage(tmp_path)
    problems = verify(str(tmp_path))
    assert any(says in problem for problem in problems), problems


def test_the_same_folder_on_another_filesystem(tmp_path):
    write_folder(tmp_path, [3, 4])
    remote = "memory://embeddings"
    for shard, n in enumerate([3, 4]):
        write_shard(remote, shard, n)
    store.finalize(remote, store.Manifest(CONFIG, tasks=2))
    assert verify(remote) == []
    for name, _ in storage.list_files(str(tmp_path)):
        assert storage.read_bytes(storage.join(remote, name)) == (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(store.read_vectors(remote, "text", 1), store.read_vectors(str(tmp_path), "text", 1))
    assert store.read_metadata(remote, 1) == store.read_metadata(str(tmp_path), 1)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(ClipIndexError, match=r"cannot write to .*: No space left on device"):
        write_shard(str(tmp_path), 0, 2)
    assert not any((tmp_path / "done").glob("*"))
    assert list(tmp_path.rglob("*.tmp")) == []


def delete_vectors(folder: Path) -> str:
    (folder / "img_emb/img_emb_00001.npy").unlink()
    return "img_emb/img_emb_00001.npy is missing"


def delete_a_folder(folder: Path) -> str:
    for path in (folder / "text_emb").iterdir():
        path.unlink()
    (folder / "text_emb").rmdir()
    return "text_emb/text_emb_00001.npy is missing"


def truncate_vectors(folder: Path) -> str:
    truncate(folder)
    return "text_emb/text_emb_00001.npy has 190 bytes, its marker says 192"


def lose_a_row_and_say_so(folder: Path) -> str:
    path = folder / "img_emb/img_emb_00001.npy"
    np.save(path, np.load(path)[:3])
    rewrite_marker(folder, "img_emb/img_emb_00001.npy")
    return "img_emb/img_emb_00001.npy has 176 bytes, which is not 4 rows"


def name_no_metadata(folder: Path) -> str:
    path = folder / "done/00001.json"
    marker = json.loads(path.read_bytes())
    del marker["files"]["metadata/metadata_00001.parquet"]
    path.write_text(json.dumps(marker))
    return "metadata/metadata_00001.parquet is not in its marker"


def empty_a_table(folder: Path) -> str:
    (folder / "failed/failed_00001.parquet").write_bytes(b"")
    return "failed/failed_00001.parquet has 0 bytes, its marker says"


@pytest.mark.parametrize(
    "damage",
    [delete_vectors, delete_a_folder, truncate_vectors, lose_a_row_and_say_so, name_no_metadata, empty_a_table],
)
def test_finalize_refuses_files_that_are_not_as_their_markers_say(tmp_path, damage, capsys):
    manifest = store.Manifest(CONFIG, tasks=3)
    for shard, rows in enumerate([3, 4, 0]):
        write_shard(str(tmp_path), shard, rows, failed=1)
    manifest.write(str(tmp_path))
    says = damage(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    assert main(["finalize", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert says in told and "00002" not in told and told.count("\n") == 1
    assert (tmp_path / "manifest.json").read_bytes() == before
    (tmp_path / "done/00000.json").unlink(missing_ok=True)  # what the message says to do
    (tmp_path / "done/00001.json").unlink()
    for shard, rows in enumerate([3, 4]):
        write_shard(str(tmp_path), shard, rows, failed=1)
    assert store.finalize(str(tmp_path), manifest).rows == 7 and verify(str(tmp_path)) == []


def test_finalize_names_ten_and_says_that_there_are_more(tmp_path):
    for shard in range(12):
        write_shard(str(tmp_path), shard, 1)
    for path in (tmp_path / "metadata").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ClipIndexError, match=r"metadata_00009.parquet has 0 bytes.*says \d+; \.\.\.;.*00009 \.\.\.\)"):
        store.finalize(str(tmp_path), store.Manifest(CONFIG, tasks=12))


def test_a_table_of_shards(tmp_path):
    """Shards come in any order, and two of the numbers that are asked for are not there."""
    shards = [Shard(7, "b" * 16, 5, 0), Shard(2, "a" * 16, 3, 1, {"img_emb/img_emb_00002.npy": {"bytes": 9}})]
    table = ShardTable(shards, width=5)
    assert (table.ids.tolist(), table.rows.tolist(), table.failed.tolist()) == ([2, 7], [3, 5], [1, 0])
    assert table.inputs.tolist() == [b"a" * 16, b"b" * 16]
    assert table.sizes.tolist() == [[9, -1, -1, -1], [-1, -1, -1, -1]]
    assert table.positions(np.array([7, 0, 2, 9])).tolist() == [1, -1, 0, -1]
    chosen = table.select(np.array([False, True]))
    assert (chosen.ids.tolist(), chosen.sizes.tolist(), len(chosen)) == ([7], [[-1] * 4], 1)
    assert ShardTable().positions(np.arange(2)).tolist() == [-1, -1]


@pytest.mark.parametrize("slow", [False, True])
def test_markers_come_in_order_whether_storage_is_slow_or_not(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(markers, "_SLOW_S", 0.0 if slow else 1e9)
    monkeypatch.setattr(markers, "_AT_ONCE", 2)
    for shard in range(9):
        write_shard(str(tmp_path), shard, 0)
    assert [shard.id for shard in read_markers(str(tmp_path))] == list(range(9))
