"""The parts of the benchmarks that can be wrong without anyone seeing it in a figure."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
import dedup  # noqa: E402
import embed_vs_clip_retrieval as peer  # noqa: E402
import memory  # noqa: E402


def write(folder, part, column, names, vectors):
    for kind in ("img", "text"):
        (folder / f"{kind}_emb").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{kind}_emb" / f"{kind}_emb_{part}.npy", np.float16(vectors))
    (folder / "metadata").mkdir(exist_ok=True)
    pq.write_table(pa.table({column: names}), folder / "metadata" / f"metadata_{part}.parquet")


def test_rows_are_matched_by_the_names_of_their_samples(tmp_path):
    write(tmp_path / "ours", "00000", "key", ["a/1", "a/2"], [[1, 0], [0, 1]])
    write(tmp_path / "ours", "00001", "key", ["b/3"], [[0.6, 0.8]])
    write(tmp_path / "theirs", "0", "image_path", ["3", "1", "2"], [[0.6, 0.8], [2, 0], [0.6, 0.8]])
    mean, least, other = peer.compare(tmp_path / "ours", tmp_path / "theirs", "img", 3)
    # 1 and 1, 2 and a vector 0.8 away, 3 and 3; the next ones: (0, 1) to (1, 0), (0.6, 0.8) to itself
    assert (mean, least, other) == pytest.approx(((1 + 0.8 + 1) / 3, 0.8, 0.5), abs=1e-3)


def test_missing_samples_are_no_agreement(tmp_path):
    write(tmp_path / "ours", "00000", "key", ["1"], [[1, 0]])
    write(tmp_path / "theirs", "0", "image_path", ["2"], [[1, 0]])
    with pytest.raises(SystemExit, match="other samples"):
        peer.compare(tmp_path / "ours", tmp_path / "theirs", "img", 1)


def test_all_pairs_are_dealt_to_the_tars(tmp_path, monkeypatch):
    monkeypatch.setattr("embed.picture", lambda rng: b"picture")
    peer.make_tars(tmp_path, 6)
    found = []
    for path in sorted(tmp_path.iterdir()):
        with tarfile.open(path) as tar:
            found.append(tar.getnames())
    assert [len(names) for names in found] == [4, 2, 4, 2]
    assert [name for names in found for name in names] == [
        f"{i:09d}.{kind}" for i in range(6) for kind in ("jpg", "txt")
    ]


def test_without_a_gpu_nothing_is_measured():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "no CUDA device here: not measured\n", "")


def test_planted_copies_are_as_similar_as_they_are_said_to_be():
    rows = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    before = rows.copy()
    planted = dedup.plant(rows)
    copies, originals = planted.T
    assert len(np.unique(planted)) == 60  # 1% exact and 2% noisy of 1,000, each of another row
    np.testing.assert_array_equal(rows[originals], before[originals])
    np.testing.assert_array_equal(rows[copies[:10]], rows[originals[:10]])
    cosines = np.einsum("nd,nd->n", rows[copies[10:]], rows[originals[10:]])
    assert 0.9849 < cosines.min() < 0.99 < cosines.max() < 0.9996
    untouched = np.setdiff1d(np.arange(1000), copies)
    np.testing.assert_array_equal(rows[untouched], before[untouched])


def test_pairs_count_in_either_order_and_others_are_false():
    told = dedup.measure(lambda: {(1, 2), (4, 3), (5, 6)}, np.array([[2, 1], [4, 3], [7, 8]]))
    assert (told["planted"], told["found"], told["false"]) == (3, 2, 1)


def test_pictures_are_as_large_as_asked_and_still_pictures():
    pixels = np.full((48, 64, 3), 7, np.uint8)
    small, large = memory.jpeg(pixels, 0), memory.jpeg(pixels, 300_000)
    assert len(small) < 1000 and 300_000 <= len(large) < 370_000
    np.testing.assert_array_equal(memory.Means.preprocess(large)[0], memory.Means.preprocess(small)[0])


def test_the_same_tars_come_in_many_names_and_are_counted(tmp_path):
    inputs = memory.make_inputs(tmp_path, 1 << 20, (1000, 2000))
    assert [len(list(folder.iterdir())) for folder, _ in inputs.values()] == [4, 16, 1, 17]
    for folder, pairs in inputs.values():
        names = []
        for path in folder.iterdir():
            with tarfile.open(path) as tar:
                names += tar.getnames()
        assert len(names) == 2 * pairs
    (_, eighth), (_, half), (_, one), (_, all_) = inputs.values()
    assert half == 4 * eighth and all_ == half + one


def test_memory_of_children_counts():
    held = "import time; x = bytearray(50_000_000); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert child.pid in memory.family(os.getpid())
        assert 50_000_000 < memory.own_bytes(child.pid) < 80_000_000
        child.kill()
