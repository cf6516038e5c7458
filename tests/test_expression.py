from __future__ import annotations

import numpy as np
import pytest

from clip_index.expression import Term, combine, parse
from clip_index.types import ClipIndexError, UsageError


def terms(query, *files):
    return [tuple(term) for term in parse(query, lambda path: path in files)]


@pytest.mark.parametrize(
    "query",
    [
        "a dog",
        "black-and-white t-shirt",
        "ratio 16:9",
        "note: cat",
        "16:9",
        "2:dog",
        "-night",
        "--night",
        "1984",
        "1e5",
        "None",
        "{red}",
        "a,b",
        "dog # cat",
        "c++",
        "dog -",
        "+1",
        '5" disk',
        'the "red" dog',
        "dog/cat",
        "/s",
        "a photo called cat.jpg",
        "https://example.org/page",
        "日本の犬",
    ],
)
def test_plain_text_is_one_term_unchanged(query):
    assert terms(query) == [(1.0, "text", query)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("dog - snow", [(1, "text", "dog"), (-1, "text", "snow")]),
        ("dog + cat - snow", [(1, "text", "dog"), (1, "text", "cat"), (-1, "text", "snow")]),
        ("  dog   -   snow  ", [(1, "text", "dog"), (-1, "text", "snow")]),
        ("dog\t-\nsnow", [(1, "text", "dog"), (-1, "text", "snow")]),
        ("- snow", [(-1, "text", "snow")]),
        ("- snow + dog", [(-1, "text", "snow"), (1, "text", "dog")]),
        ("+ dog - snow", [(1, "text", "dog"), (-1, "text", "snow")]),
        ("2:dog - 0.5:snow", [(2, "text", "dog"), (-0.5, "text", "snow")]),
        ("2: a dog + .25:cat", [(2, "text", "a dog"), (0.25, "text", "cat")]),
        ("note: cat + dog", [(1, "text", "note: cat"), (1, "text", "dog")]),
        ("t-shirt - black-and-white", [(1, "text", "t-shirt"), (-1, "text", "black-and-white")]),
        ("well-lit - -night", [(1, "text", "well-lit"), (-1, "text", "-night")]),
        ('"salt + pepper"', [(1, "text", "salt + pepper")]),
        ('"salt + pepper" - bowl', [(1, "text", "salt + pepper"), (-1, "text", "bowl")]),
        ('bowl + 2:"salt - pepper"', [(1, "text", "bowl"), (2, "text", "salt - pepper")]),
        ('2:"dog"', [(2, "text", "dog")]),
        ('"2:dog" + cat', [(1, "text", "2:dog"), (1, "text", "cat")]),
        ('"./a.jpg"', [(1, "text", "./a.jpg")]),
        ('5" disk - 3" disk', [(1, "text", '5" disk'), (-1, "text", '3" disk')]),
        ('"red" dog - snow', [(1, "text", '"red" dog'), (-1, "text", "snow")]),
    ],
)
def test_operators_weights_and_quotes(query, expected):
    assert terms(query) == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("./a.jpg", [(1, "image", "./a.jpg")]),
        ("../a", [(1, "image", "../a")]),
        ("~/a.PNG", [(1, "image", "~/a.PNG")]),
        ("/data/a.webp", [(1, "image", "/data/a.webp")]),
        ("a.jpg", [(1, "image", "a.jpg")]),
        ("my cat.jpg", [(1, "image", "my cat.jpg")]),
        ("pictures/IMG_1", [(1, "image", "pictures/IMG_1")]),
        ("s3://bucket/a.jpeg", [(1, "image", "s3://bucket/a.jpeg")]),
        ("https://example.org/a.jpg?size=2", [(1, "image", "https://example.org/a.jpg?size=2")]),
        ("2:./a.jpg", [(2, "image", "./a.jpg")]),
        ("2:dog + ./a.jpg", [(2, "text", "dog"), (1, "image", "./a.jpg")]),
        ("dog + ./a.jpg - 0.5:snow", [(1, "text", "dog"), (1, "image", "./a.jpg"), (-0.5, "text", "snow")]),
        ("dog - 1.5:my cat.jpg", [(1, "text", "dog"), (-1.5, "image", "my cat.jpg")]),
        ("dog", [(1, "text", "dog")]),
    ],
)
def test_pictures_are_recognised(query, expected):
    assert terms(query, "my cat.jpg", "pictures/IMG_1", "dog") == expected


@pytest.mark.parametrize("query", ["", "  ", '""', 'dog - " "', "dog + + cat", "dog - - cat", "dog - -", "- - dog"])
def test_a_missing_term_is_refused(query):
    with pytest.raises(UsageError):
        parse(query)


def test_files_are_looked_up_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my cat.jpg").touch()
    monkeypatch.chdir(tmp_path)
    assert parse("my cat.jpg") == [Term(1.0, "image", "my cat.jpg")]
    assert parse("my dog.jpg") == [Term(1.0, "text", "my dog.jpg")]


def test_combine_is_the_unit_vector_of_the_weighted_sum():
    vectors = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    np.testing.assert_allclose(combine([3, -4], vectors), [0.6, -0.8, 0], atol=1e-7)
    assert combine([3, -4], vectors).dtype == np.float32


def test_terms_that_cancel_are_refused():
    vectors = np.array([[0.6, 0.8], [0.6, 0.8]], np.float32)
    with pytest.raises(ClipIndexError, match="cancel"):
        combine([1, -1], vectors)
    with pytest.raises(ClipIndexError, match="cancel"):
        combine([0, 0], vectors)
