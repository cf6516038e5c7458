from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from embedding_fakes import FINGERPRINT, brute_force, make_embeddings, random_rows, stored
from PIL import Image

from clip_index.index import build_index
from clip_index.locations import find_index
from clip_index.search import Searcher
from clip_index.types import ClipIndexError, Hit, SampleError, UsageError, normalize

DIM = 16


class AverageColour:
    size = 8

    def describe(self):
        return {"size": self.size}

    def __call__(self, data):
        try:
            picture = Image.open(io.BytesIO(data))
        except OSError as error:
            raise SampleError("not a picture") from error
        colour = np.asarray(picture.convert("RGB").resize((1, 1)), np.uint8).ravel()
        return np.resize(colour, (4, 4, 3)), picture.size


class FakeEncoder:
    """Texts become the row that their digits name; pictures the average colour."""

    dim = DIM
    fingerprint = FINGERPRINT
    preprocess = AverageColour()

    def __init__(self, rows):
        self.rows = rows

    def encode_text(self, texts):
        return np.stack([self.rows[int(text.split()[-1])] for text in texts])

    def encode_image(self, pixels):
        assert pixels.dtype == np.uint8
        return normalize(pixels.reshape(len(pixels), -1)[:, :DIM].astype(np.float32) + 1)


@pytest.fixture(scope="module")
def vectors():
    return {"image": random_rows(90), "text": random_rows(90, seed=1)}


@pytest.fixture(scope="module")
def index(tmp_path_factory, vectors):
    folder = tmp_path_factory.mktemp("search")
    make_embeddings(folder / "e", vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        build_index(str(folder / "e"), str(folder / "i"))
    return str(folder / "i")


@pytest.fixture
def loaded(monkeypatch, vectors):
    """What was asked of load_encoder."""
    calls = []

    def load_encoder(name, **options):
        calls.append((name, options))
        return FakeEncoder(vectors["text"])

    monkeypatch.setitem(sys.modules, "clip_index.encoders", SimpleNamespace(load_encoder=load_encoder))
    return calls


def rows_of(hits):
    return [hit.row for hit in hits]


def expected(vectors, query, modality="image", k=10):
    return list(brute_force(stored(vectors[modality]), np.asarray(query)[None], k)[0])


def test_a_vector_finds_its_neighbours_with_their_metadata(index, vectors):
    query = random_rows(1, seed=5)[0]
    hits = Searcher(index).search(vector=query * 7, k=5)
    assert rows_of(hits) == expected(vectors, query, k=5)
    row = hits[0].row
    assert hits[0].key == f"key-{row}"
    assert hits[0].meta == {
        "image_path": f"pictures/{row}.jpg",
        "caption": f"caption {row}" if row % 3 else "",
        "source": f"/data/{row}.jpg",
        "width": 640,
        "height": 480,
    }
    assert hits[0].score == pytest.approx(float(stored(vectors["image"])[row] @ query), abs=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(isinstance(hit, Hit) and json.dumps(hit.to_dict()) for hit in hits)


def test_scores_do_not_exceed_one(index, vectors):
    searcher = Searcher(index)
    for row in range(90):
        (hit,) = searcher.search(vector=stored(vectors["image"])[row], k=1)
        assert hit.row == row
        assert 0.999 < hit.score <= 1.0


def test_text_searches_pictures_with_the_text_tower_alone(index, vectors, loaded):
    searcher = Searcher(index, device="cpu")
    assert loaded == []
    assert rows_of(searcher.search(text="caption 7")) == expected(vectors, vectors["text"][7])
    assert rows_of(searcher.search("caption 7", modality="text"))[0] == 7
    assert loaded == [("fake", {"device": "cpu", "towers": ("text",), "decode": "exact"})]


def test_a_text_is_not_an_expression(index, vectors, loaded):
    hits = Searcher(index).search(text="dog - 7", modality="text")
    assert rows_of(hits)[0] == 7


def test_an_expression_adds_and_subtracts(index, vectors, loaded):
    wanted = normalize((2 * vectors["text"][7] - vectors["text"][8] * 0.5)[None])[0]
    searcher = Searcher(index)
    assert rows_of(searcher.search("2:caption 7 - 0.5:caption 8")) == expected(vectors, wanted)
    np.testing.assert_allclose(searcher.vector_of("2:caption 7 - 0.5:caption 8"), wanted, atol=1e-6)
    with pytest.raises(ClipIndexError, match="cancel"):
        searcher.search("caption 7 - caption 7")


def test_pictures_as_paths_bytes_and_pil_images(index, vectors, loaded, tmp_path, monkeypatch):
    picture = Image.new("RGB", (9, 5), (200, 30, 90))
    picture.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    wanted = normalize(np.resize(np.float32([201, 31, 91]), DIM)[None])[0]
    searcher = Searcher(index)
    for given in ("a.png", tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), picture, picture.convert("RGBA")):
        assert rows_of(searcher.search(image=given)) == expected(vectors, wanted)
    assert rows_of(searcher.search("./a.png")) == expected(vectors, wanted)
    assert loaded == [("fake", {"device": "auto", "towers": ("image",), "decode": "exact"})]
    mixed = normalize((wanted + vectors["text"][7])[None])[0]
    assert rows_of(searcher.search("./a.png + caption 7")) == expected(vectors, mixed)
    assert rows_of(searcher.search("caption 7", image="a.png")) == expected(vectors, mixed)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "HSV"])
def test_pil_images_of_every_mode(index, loaded, mode):
    assert len(Searcher(index).search(image=Image.new(mode, (3, 2)), k=3)) == 3


def test_a_turned_pil_image_is_the_same_as_its_file(index, loaded, tmp_path):
    from clip_index.given_image import image_bytes

    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    assert Image.open(io.BytesIO(image_bytes(Image.open(tmp_path / "turned.png")))).size == (2, 4)


def test_pictures_that_are_none(index, loaded, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    searcher = Searcher(index)
    with pytest.raises(ClipIndexError, match=r"broken\.jpg is not a picture"):
        searcher.search(image=str(tmp_path / "broken.jpg"))
    loaded.clear()
    for missing in ({"image": "missing.jpg"}, {"query": "dog + ./missing.jpg"}, {"query": "missing.jpg"}):
        with pytest.raises(ClipIndexError, match=r"no picture at .*missing\.jpg"):
            Searcher(index).search(**missing)
    with pytest.raises(ClipIndexError, match="cannot be read"):
        searcher.search(image=str(tmp_path))
    with pytest.raises(UsageError, match="not int"):
        searcher.search(image=3)


def test_k_beyond_the_rows_gives_them_all(index, vectors):
    hits = Searcher(index).search(vector=np.ones(DIM), k=1000)
    assert sorted(rows_of(hits)) == list(range(90))


def test_many_vectors_at_once(index, vectors):
    queries = random_rows(20, seed=6)
    searcher = Searcher(index)
    assert [rows_of(hits) for hits in searcher.nearest(queries, k=7, modality="text")] == brute_force(
        stored(vectors["text"]), queries, 7
    ).tolist()


def test_bad_queries_are_refused(index, loaded):
    searcher = Searcher(index)
    for wrong in (
        {},
        {"query": "  "},
        {"vector": np.ones(3)},
        {"vector": np.zeros(DIM)},
        {"vector": np.full(DIM, np.nan)},
        {"vector": np.ones(DIM), "k": 0},
        {"vector": np.ones(DIM), "k": True},
        {"vector": np.ones(DIM), "k": 2.5},
        {"vector": np.ones(DIM), "modality": "audio"},
    ):
        with pytest.raises(UsageError):
            searcher.search(**wrong)


def test_an_index_of_texts_alone(tmp_path, vectors, loaded, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_embeddings(tmp_path / "e", {"text": vectors["text"]})
    build_index(str(tmp_path / "e"), str(tmp_path / "i"))
    searcher = Searcher(str(tmp_path / "i"))
    assert rows_of(searcher.search("caption 7"))[0] == 7
    with pytest.raises(UsageError, match="no 'image' vectors, it has text"):
        searcher.search("caption 7", modality="image")


def test_another_model_of_the_same_name_is_refused(index, loaded, monkeypatch):
    searcher = Searcher(index)
    monkeypatch.setattr(FakeEncoder, "fingerprint", "fedcba9876543210")
    assert len(searcher.search(vector=np.ones(DIM))) == 10
    with pytest.raises(ClipIndexError, match="fingerprint: 0123456789abcdef -> fedcba9876543210"):
        searcher.search("caption 7")


def test_another_preprocessing_is_refused_for_pictures(index, loaded, monkeypatch):
    searcher = Searcher(index)
    monkeypatch.setattr(AverageColour, "size", 9)
    assert len(searcher.search("caption 7")) == 10
    with pytest.raises(ClipIndexError, match="size: 8 -> 9"):
        searcher.search(image=Image.new("RGB", (3, 3)))


def test_concurrent_searches_agree_with_serial_ones(index, vectors, loaded):
    searcher = Searcher(index)
    queries = random_rows(64, seed=7)
    options = [
        {"vector": query, "k": 1 + row % 20, "modality": ("image", "text")[row % 2]}
        for row, query in enumerate(queries)
    ]
    options += [{"query": f"caption {row}", "modality": ("image", "text")[row % 2]} for row in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda option: searcher.search(**option), options))
    fresh = Searcher(index)
    assert found == [fresh.search(**option) for option in options]
    assert [call[1]["towers"] for call in loaded] == [("text",), ("text",)]  # once for each searcher


def test_which_index(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIP_INDEX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"no index found.*build-index"):
        find_index()
    make_embeddings(tmp_path / "e", {"image": random_rows(30)})
    build_index("e", "built")
    assert find_index() == str(tmp_path / "built")
    build_index("e", "index")
    assert find_index() == str(tmp_path / "index")
    build_index("e", "last")
    assert find_index() == str(tmp_path / "index")
    monkeypatch.setenv("CLIP_INDEX", "built")
    assert find_index() == str(tmp_path / "built")
    assert find_index("last") == str(tmp_path / "last")
    with pytest.raises(UsageError, match=r"--index names .*nowhere"):
        find_index("nowhere")
    monkeypatch.setenv("CLIP_INDEX", "gone")
    with pytest.raises(UsageError, match=r"\$CLIP_INDEX names .*gone"):
        find_index()
    monkeypatch.delenv("CLIP_INDEX")
    (tmp_path / "index/clip_index.json").unlink()
    (tmp_path / "last/clip_index.json").unlink()
    with pytest.raises(UsageError, match="no index found"):
        find_index()


def test_a_marker_that_cannot_be_understood(index, tmp_path, monkeypatch):
    for contents in (b"", b"[]", b"{", b'{"version": 1}', b'{"version": 99}'):
        (tmp_path / "clip_index.json").write_bytes(contents)
        with pytest.raises(ClipIndexError, match=r"clip_index\.json"):
            Searcher(str(tmp_path))


def test_opening_imports_no_torch_and_searching_a_vector_neither(index):
    program = (
        "import sys, numpy as np\n"
        "from clip_index import Searcher\n"
        "hits = Searcher(sys.argv[1]).search(vector=np.ones(16))\n"
        "assert len(hits) == 10\n"
        "heavy = {'torch', 'pandas', 'autofaiss', 'pyarrow.parquet', 'pyarrow.dataset', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program, index], check=True)
