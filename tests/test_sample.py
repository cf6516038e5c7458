"""The sample pictures: few enough bytes, every one usable, and the answers to the demo's kind of query are right."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import clip_index
from clip_index.encoders import load_encoder

SAMPLE = Path(clip_index.__file__).parent / "data" / "sample"
PICTURES = sorted(path for path in SAMPLE.rglob("*") if path.suffix in {".jpg", ".png", ".webp"})
CAPTIONS = {path: path.with_suffix(".txt").read_text(encoding="utf-8") for path in PICTURES}
PIPELINES = Path(__file__).parent.parent / "pipelines"

QUERIES = {
    "a dog": "dogs/",
    "a cat": "cats/",
    "a guitar": "-guitar.",
    "a red car": "cars/",
    "a bicycle": "bicycles/",
    "an airplane": "aircraft/",
    "a boat": "boats/",
    "a piece of fruit": "fruit/",
    "a flower": "flowers/",
    "a clock": "clocks/",
}
"""What the name of a right answer contains."""


@pytest.fixture(scope="module")
def mini():
    return load_encoder("mini")


@pytest.fixture(scope="module")
def vectors(mini) -> np.ndarray:
    pixels = [mini.preprocess(path.read_bytes())[0] for path in PICTURES]
    return np.concatenate(
        [mini.encode_image(np.stack(pixels[start : start + 64])) for start in range(0, len(pixels), 64)]
    )


@pytest.fixture(scope="module")
def pipeline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample", PIPELINES / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name(path: Path) -> str:
    return path.relative_to(SAMPLE).as_posix()


def top(mini, vectors: np.ndarray, query: str, k: int) -> list[str]:
    scores = vectors @ mini.encode_text([query])[0]
    return [name(PICTURES[row]) for row in np.argsort(-scores)[:k]]


@pytest.mark.parametrize("query", QUERIES)
def test_the_first_answer_and_two_of_the_first_three_are_right(mini, vectors, query):
    answers = top(mini, vectors, query, 3)
    right = [QUERIES[query] in answer for answer in answers]
    assert right[0] and sum(right) >= 2, answers


def test_a_red_car_finds_a_red_one_first(mini, vectors):
    assert top(mini, vectors, "a red car", 1)[0].startswith("cars/red-")


@pytest.mark.parametrize(
    ("query", "categories"),
    [
        ("a musical instrument", {"music"}),
        ("a piece of fruit", {"fruit"}),
        ("a vehicle", {"cars", "vehicles"}),
    ],
)
def test_a_whole_sheet_of_a_wide_query_is_right(mini, vectors, query, categories):
    answers = top(mini, vectors, query, 8)
    assert {answer.split("/")[0] for answer in answers} <= categories, answers


def test_captions_find_their_own_pictures(mini, vectors):
    scores = mini.encode_text([text.strip() for text in CAPTIONS.values()]) @ vectors.T
    rank = (scores > np.diag(scores)[:, None]).sum(1)
    assert np.mean(rank < 10) > 0.5  # by chance 0.03


def test_there_are_about_300_in_many_categories_and_three_formats():
    assert 280 <= len(PICTURES) <= 320
    assert len({path.parent for path in PICTURES}) >= 25
    for suffix in (".jpg", ".png", ".webp"):
        assert sum(path.suffix == suffix for path in PICTURES) >= 25


def test_they_are_small():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 4_000_000


def test_nothing_else_lies_between_them():
    files = {path for path in SAMPLE.rglob("*") if path.is_file()}
    assert files == {*PICTURES, *(path.with_suffix(".txt") for path in PICTURES)}


def test_every_caption_is_one_short_line_of_its_own():
    texts = list(CAPTIONS.values())
    assert all(text == text.strip() + "\n" and 3 <= len(text.strip()) <= 80 and text.count("\n") == 1 for text in texts)
    assert len({text.strip().casefold() for text in texts}) == len(texts)


def test_every_picture_decodes_to_what_its_name_says():
    formats = {".jpg": ("JPEG", "RGB"), ".png": ("PNG", "P"), ".webp": ("WEBP", "RGBA")}
    for path in PICTURES:
        with Image.open(path) as picture:
            picture.load()
            assert (picture.format, picture.mode) == formats[path.suffix], path
            assert min(picture.size) >= 90 and max(picture.size) <= 288, path


def test_no_two_pictures_are_the_same():
    assert len({path.read_bytes() for path in PICTURES}) == len(PICTURES)


def test_the_list_names_exactly_these_pictures_and_captions():
    with (PIPELINES / "sample.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {f"{row['category']}/{row['file']}": row["caption"] + "\n" for row in rows} == {
        name(path): text for path, text in CAPTIONS.items()
    }
    assert all(row["author"] and row["source"] for row in rows)


def test_every_author_is_named_in_the_notice():
    notice = " ".join((PIPELINES.parent / "NOTICE").read_text(encoding="utf-8").split())
    with (PIPELINES / "sample.tsv").open(newline="", encoding="utf-8") as file:
        authors = {row["author"] for row in csv.DictReader(file, delimiter="\t")}
    assert not [author for author in authors if author not in notice]


def test_a_drawing_is_trimmed_and_a_long_one_padded(pipeline):
    drawing = Image.new("RGBA", (1000, 800), (0, 0, 0, 0))
    drawing.paste((200, 0, 0, 255), (300, 380, 700, 420))  # 400 x 40, with 12 around it 424 x 64
    framed = pipeline.frame(drawing)
    assert framed.size == (288, 230)  # 424 x 339 (424 / 1.25), scaled by 288 / 424
    assert framed.getpixel((2, 115))[3] == 0 and framed.getpixel((144, 115)) == (200, 0, 0, 255)


def test_a_picture_that_fills_its_rectangle_gets_no_border(pipeline):
    photograph = Image.new("RGB", (1200, 400), (10, 120, 40))
    framed = pipeline.frame(photograph)
    assert framed.size == (288, 96)
    assert framed.getextrema() == ((10, 10), (120, 120), (40, 40), (255, 255))


def test_another_package_is_refused(pipeline, tmp_path):
    deb = tmp_path / "openclipart-png_2.deb"
    deb.write_bytes(b"!<arch>\n")
    with pytest.raises(SystemExit, match="another version"):
        pipeline.unpack(deb, tmp_path)
