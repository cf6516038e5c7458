from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_fakes import brute_force, make_embeddings, random_rows

from clip_index.index import build_index
from clip_index.search import Searcher
from clip_index.types import ClipIndexError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def theirs(folder, vectors, *, table="metadata", lengths=(70, 50)):
    """Files as clip-retrieval writes them; a modality of "" is a folder of .npy files alone."""
    start = 0
    for shard, length in enumerate(lengths):
        part = slice(start, start + length)
        for name, rows in vectors.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"{name or 'rows'}_{shard}.npy", rows[part])
        if table is not None:
            (folder / table).mkdir(exist_ok=True)
            columns = {"image_path": [f"{row}.jpg" for row in range(part.start, part.stop)]}
            columns["caption"] = [f"caption {row}" for row in range(part.start, part.stop)]
            pq.write_table(pa.table(columns), folder / table / f"metadata_{shard}.parquet")
        start += length


def rows_of(folder, query):
    return [hit.row for hit in Searcher(str(folder)).search(vector=query)]


def test_a_folder_of_clip_retrieval(tmp_path):
    image, text = (random_rows(120, seed=seed).astype(np.float16) for seed in (0, 1))
    theirs(tmp_path / "e", {"img_emb": image, "text_emb": text})
    report = build_index(str(tmp_path / "e"), str(tmp_path / "i"), model="ViT-B-32/openai")
    assert (report["rows"], report["encoder"], set(report["indices"])) == (120, "ViT-B-32/openai", {"image", "text"})
    query = random_rows(1, seed=5)
    assert rows_of(tmp_path / "i", query[0]) == list(brute_force(image, query, 10)[0])
    hit = Searcher(str(tmp_path / "i")).search(vector=query[0])[0]
    assert (hit.key, hit.meta["caption"]) == (f"{hit.row}.jpg", f"caption {hit.row}")


@pytest.mark.parametrize("table", [None, ""])
def test_npy_files_alone_of_any_length_and_precision(tmp_path, table):
    rows = 3 * random_rows(120).astype(np.float32)
    theirs(tmp_path / "e", {"": rows}, table=table)
    for key in (None, "IVF4,RaBitQ"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), index_key=key)
        searcher, query = Searcher(str(tmp_path / "i")), random_rows(1, seed=5)
        options = {"nprobe": 4, "rerank": 120} if key else {}
        hits = searcher.search(vector=query[0], **options)
        assert [hit.row for hit in hits] == list(brute_force(rows, query, 10)[0])
        assert hits[0].score == pytest.approx(float(rows[hits[0].row] @ query[0]) / 3, abs=1e-3)
        assert hits[0].key == (str(hits[0].row) if table is None else f"{hits[0].row}.jpg")


def test_without_a_model_the_index_answers_vectors_alone(tmp_path):
    theirs(tmp_path / "e", {"": random_rows(120)})
    build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    with pytest.raises(UsageError, match="names no model"):
        Searcher(str(tmp_path / "i")).search("a dog")


def test_a_model_of_other_dimensions_is_refused(tmp_path, monkeypatch):
    theirs(tmp_path / "e", {"": random_rows(120)})
    build_index(str(tmp_path / "e"), str(tmp_path / "i"), model="any")
    encoder = SimpleNamespace(dim=8, encode_text=lambda texts: random_rows(len(texts)))
    loader = SimpleNamespace(load_encoder=lambda *_, **__: encoder)
    monkeypatch.setitem(sys.modules, "clip_index.encoders", loader)
    with pytest.raises(ClipIndexError, match="dim: 16 -> 8"):
        Searcher(str(tmp_path / "i")).search("a dog")
    encoder.dim = 16
    assert len(Searcher(str(tmp_path / "i")).search("a dog")) == 10


def test_folders_that_do_not_fit_together(tmp_path):
    theirs(tmp_path / "a", {"img_emb": random_rows(120), "text_emb": random_rows(120, dim=8)})
    with pytest.raises(ClipIndexError, match="not row by row"):
        build_index(str(tmp_path / "a"), str(tmp_path / "i"))
    theirs(tmp_path / "b", {"img_emb": random_rows(120)})
    np.save(tmp_path / "b/img_emb/img_emb_2.npy", random_rows(3))
    with pytest.raises(ClipIndexError, match="123 vectors, but 120 rows of metadata"):
        build_index(str(tmp_path / "b"), str(tmp_path / "i"))
    np.save(tmp_path / "b/img_emb/img_emb_2.npy", random_rows(3, dim=8))
    with pytest.raises(ClipIndexError, match=r"img_emb_2\.npy has 8 dimensions"):
        build_index(str(tmp_path / "b"), str(tmp_path / "i"))
    np.save(tmp_path / "b/img_emb/img_emb_2.npy", np.zeros(3, int))
    with pytest.raises(ClipIndexError, match="not rows of floats"):
        build_index(str(tmp_path / "b"), str(tmp_path / "i"))


def test_a_model_that_the_manifest_contradicts(tmp_path):
    make_embeddings(tmp_path / "e", {"image": random_rows(30)})
    with pytest.raises(UsageError, match="was embedded with fake"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), model="other")
