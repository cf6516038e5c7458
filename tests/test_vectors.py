from __future__ import annotations

import os

import numpy as np
import pytest
from embedding_fakes import make_embeddings, random_rows, stored

from clip_index.types import ClipIndexError
from clip_index.vectors import Vectors

SHARD = "img_emb/img_emb_00001.npy"


def test_blocks_and_take_are_the_matrix(tmp_path):
    rows = random_rows(50)
    manifest = make_embeddings(tmp_path, {"image": rows}, shard_rows=[20, 0, 29, 1])
    vectors = Vectors(str(tmp_path), manifest, "image")
    assert (vectors.rows, vectors.dim) == (50, 16)
    starts, blocks = zip(*vectors.blocks(8), strict=True)
    assert list(starts) == [0, 8, 16, 20, 28, 36, 44, 49]
    np.testing.assert_array_equal(np.concatenate(blocks), stored(rows))
    wanted = np.array([49, 0, 20, 19, 0, 48])
    np.testing.assert_array_equal(vectors.take(wanted), stored(rows)[wanted])
    for row in wanted:
        shard, offset = manifest.locate(int(row))
        np.testing.assert_array_equal(np.load(tmp_path / f"img_emb/img_emb_{shard:05d}.npy")[offset], stored(rows)[row])


def test_remote_vectors(tmp_path):
    rows = random_rows(30)
    manifest = make_embeddings("memory://vectors", {"image": rows})
    vectors = Vectors("memory://vectors", manifest, "image")
    vectors.check()
    np.testing.assert_array_equal(vectors.take(np.arange(30)[::-1]), stored(rows)[::-1])


def test_a_modality_that_is_not_there(tmp_path):
    manifest = make_embeddings(tmp_path, {"image": random_rows(30)})
    with pytest.raises(ClipIndexError, match="no text vectors"):
        Vectors(str(tmp_path), manifest, "text")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, 300), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.save(path, np.zeros((9, 16), np.float16)), "the manifest says"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, message):
    manifest = make_embeddings(tmp_path, {"image": random_rows(30)})
    damage(tmp_path / SHARD)
    with pytest.raises(ClipIndexError, match=f"{SHARD}.*{message}"):
        Vectors(str(tmp_path), manifest, "image").check()


def test_a_remote_shard_that_is_missing_is_named():
    from clip_index import storage

    manifest = make_embeddings("memory://damaged", {"image": random_rows(30)})
    storage.remove(f"memory://damaged/{SHARD}")
    with pytest.raises(ClipIndexError, match="missing or truncated"):
        Vectors("memory://damaged", manifest, "image").check()
