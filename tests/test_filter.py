from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_index import cli, search
from clip_index.copies import write_copies, write_list
from clip_index.embed import embed
from clip_index.index import build_index
from clip_index.search import Searcher
from clip_index.types import ClipIndexError, Hit
from clip_index.vectors import Vectors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten pictures in a folder, ten in a tar, as an index each; the model is a fake."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fakes.use(monkeypatch)
    pictures = fakes.make_pictures(tmp_path / "pictures", 10)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, f"{path.stem}{path.suffix}")
            if path.suffix == ".png":
                side = json.dumps({"score": 7, "license": "by"}).encode()
                info = tarfile.TarInfo(f"{path.stem}.json")
                info.size = len(side)
                tar.addfile(info, io.BytesIO(side))
    for source, name in (("pictures", "files"), ("shard.tar", "tars")):
        embed(str(tmp_path / source), str(tmp_path / f"e-{name}"))
        build_index(str(tmp_path / f"e-{name}"), str(tmp_path / name))
    encoders = SimpleNamespace(load_encoder=lambda *_, **__: fakes.FakeEncoder())
    monkeypatch.setitem(__import__("sys").modules, "clip_index.encoders", encoders)
    return tmp_path


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("source", ["files", "tars"])
def test_the_best_are_copied_byte_by_byte_and_can_be_embedded_again(folder, capsys, source):
    index, output = folder / source, folder / "best"
    query = folder / "pictures/0003.png"
    status, out, err = run(capsys, "filter", index, output, "--image", query, "--k", "4")
    assert (status, out) == (0, f"{output}: 4 rows\n")
    assert err == f"next: clip-index embed {output} embeddings\n"
    hits = Searcher(str(index)).search(image=str(query), k=4)
    assert hits[0].score > 0.999
    for number, hit in enumerate(hits, 1):
        picture = folder / "pictures" / f"{Path(hit.meta['image_path']).stem}.png"
        assert (output / f"{number}.png").read_bytes() == picture.read_bytes()
        assert (output / f"{number}.txt").read_text() == hit.meta["caption"]
        said = json.loads((output / f"{number}.json").read_text())
        assert (said["from_key"], said["from_source"]) == (hit.key, hit.meta["source"])
        assert said["license"] == "by" if source == "tars" else "license" not in said
    summary = embed(str(output), str(folder / "again"))
    assert (summary.rows, summary.failed) == (4, 0)
    table = pq.read_table(folder / "again/metadata/metadata_00000.parquet")
    assert table["caption"].to_pylist() == [hit.meta["caption"] for hit in hits]
    assert table["from_key"].to_pylist() == [hit.key for hit in hits]
    build_index(str(folder / "again"), str(folder / "again-index"))
    again = Searcher(str(folder / "again-index")).search(image=str(query), k=1)[0]
    assert again.score == pytest.approx(hits[0].score, abs=1e-6)


def test_all_above_a_similarity_are_listed(folder, capsys):
    index, output = folder / "files", folder / "lists/all.parquet"
    query = search.Searcher(str(index)).vector_of("picture number 3")
    from clip_index.store import Manifest

    embeddings = str(folder / "e-files")
    held = Vectors(embeddings, Manifest.load(embeddings), "text").take(np.arange(10))
    scores = held @ query
    threshold = float(np.sort(scores)[-4]) - 1e-4
    options = ["--modality", "text", "--above", threshold]
    status, out, _ = run(capsys, "filter", index, output, "picture number 3", *options)
    expected = np.argsort(-scores, kind="stable")[: (scores >= threshold).sum()]
    assert (status, out) == (0, f"{output}: {len(expected)} rows\n")
    table = pq.read_table(output)
    assert table["row"].to_pylist() == expected.tolist()
    np.testing.assert_allclose(table["score"].to_numpy(), scores[expected], atol=1e-6)
    assert table.column_names[:4] == ["row", "score", "key", "image_path"]
    run(capsys, "filter", index, folder / "all.csv", "picture number 3", *options, "--where", "caption like '%3'")
    with open(folder / "all.csv") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == ["picture number 3"]


def test_what_cannot_be_read_is_named_and_the_status_is_3(folder, capsys):
    (folder / "pictures/0003.png").unlink()
    (folder / "query.png").write_bytes((folder / "pictures/0004.png").read_bytes())
    status, out, err = run(
        capsys, "filter", folder / "files", folder / "all", "--image", folder / "query.png", "--k", 10
    )
    assert (status, out) == (3, f"{folder / 'all'}: 9 rows\n")
    assert "0003.png" in err and "1 picture could not be read" in err
    assert len(list((folder / "all").glob("*.png"))) == 9


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--k", "3"], "nothing to search for"),
        (["a dog"], "--k for the best so many, or --above"),
        (["a dog", "--k", "3", "--above", "0.3"], "one of the two"),
        (["a dog", "--k", "0"], "--k 0: expected 1"),
    ],
)
def test_what_is_refused(capsys, tmp_path, argv, says):
    status, out, err = run(capsys, "filter", tmp_path / "i", tmp_path / "o", *argv)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    status, _, err = run(capsys, "filter", tmp_path / "i", tmp_path / "full", "a dog", "--k", "3")
    assert status == 2 and "is not empty" in err


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_copy_is_named_after_what_it_is(tmp_path, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    hit = Hit(0, 0.5, "a", {"source": "s", "image_path": "wrong.xyz"})
    write_copies([hit], str(tmp_path), lambda _: buffer.getvalue())
    suffix = {"JPEG": ".jpg"}.get(kind, f".{kind.lower()}")
    assert {path.suffix for path in tmp_path.iterdir()} == {suffix, ".json"}


def test_numbers_sort_and_captions_alone_are_copied_too(tmp_path):
    hits = [Hit(row, 0.5, str(row), {"caption": f"caption {row}", "source": "gone"}) for row in range(300)]
    assert write_copies(hits, str(tmp_path), None) == []
    names = sorted(path.name for path in tmp_path.glob("*.txt"))
    assert [(tmp_path / name).read_text() for name in names] == [f"caption {row}" for row in range(300)]

    def refuse(source):
        raise ClipIndexError(f"cannot read {source}")

    assert write_copies(hits[:2], str(tmp_path / "x"), refuse) == ["0: cannot read gone", "1: cannot read gone"]


def test_a_list_without_rows(tmp_path):
    write_list([], str(tmp_path / "none.parquet"))
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
