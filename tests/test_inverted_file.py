"""Files of inverted lists against those that faiss writes itself."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from clip_index import inverted_file
from clip_index.inverted_file import InvertedFile
from clip_index.types import ClipIndexError

DIM, LISTS = 16, 8


def empty(hnsw=False, seed=0):
    centroids = np.random.default_rng(seed).standard_normal((LISTS, DIM), dtype=np.float32)
    if hnsw:
        quantizer = faiss.IndexHNSWFlat(DIM, 4, faiss.METRIC_L2)
    else:
        quantizer = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
    quantizer.add(centroids)
    inverted = faiss.IndexIVFRaBitQ(quantizer, DIM, LISTS, faiss.METRIC_INNER_PRODUCT)
    inverted.train(centroids)
    rotation = faiss.RandomRotationMatrix(DIM, DIM)
    rotation.init(1)
    index = faiss.IndexPreTransform(rotation, inverted)
    return index, inverted, (rotation, quantizer)  # faiss holds the addresses of the parts alone


def pointers(*arrays):
    return [faiss.swig_ptr(array) for array in arrays]


@pytest.mark.parametrize("hnsw", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        [5, 7, 1, 12, 3, 4, 9, 2],
        [0, 7, 0, 12, 3, 0, 9, 2],  # five of eight lists: just full
        [0, 7, 0, 12, 3, 0, 9, 0],  # four of eight: just sparse
        [0, 0, 0, 0, 0, 0, 0, 43],
        [43, 0, 0, 0, 0, 0, 0, 0],
        [0] * 8,
    ],
)
@pytest.mark.parametrize("block", [1, 10, 100])
def test_the_bytes_are_those_of_faiss(tmp_path, hnsw, sizes, block):
    rng = np.random.default_rng(1)
    count = sum(sizes)
    vectors = rng.standard_normal((count, DIM), dtype=np.float32)
    lists = rng.permutation(np.repeat(np.arange(LISTS), sizes))
    theirs, inverted, _parts = empty(hnsw)
    inverted.add_core(count, *pointers(vectors, np.arange(count), lists))
    theirs.ntotal = count
    faiss.write_index(theirs, str(tmp_path / "theirs"))
    order = np.argsort(lists, kind="stable")
    vectors, lists, codes = vectors[order], lists[order], np.empty((count, inverted.code_size), np.uint8)
    inverted.encode_vectors(count, *pointers(vectors, lists, codes))
    ours, *_parts_of_ours = empty(hnsw)
    with InvertedFile(str(tmp_path / "ours"), ours, np.array(sizes), order) as file:
        for start in range(0, count, block):
            file.append(codes[start : start + block])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_another_format_of_faiss_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inverted_file, "_LISTS", inverted_file.struct.Struct(">4sQQ4sQ"))
    index, *_parts = empty()
    with pytest.raises(ClipIndexError, match=r"faiss .* writes lists otherwise"):
        InvertedFile(str(tmp_path / "i"), index, np.zeros(LISTS, np.int64), np.empty(0, np.int64))
