"""What commands say besides their tables."""

from __future__ import annotations

import io
import json
import shlex

import pytest

from clip_index import console


@pytest.mark.parametrize(
    "word", ["a dog", "dog", "it's", 'a "dog"', "$HOME now", "a`b c", "", "back\\slash x", "a/b c!"]
)
def test_a_suggested_word_is_the_same_word_for_a_shell(word):
    assert shlex.split(console.quote(word)) == [word]


def test_several_words_are_quoted_as_people_write_them():
    assert console.quote("a dog") == '"a dog"'


def test_suggestions_go_to_stderr(capsys):
    console.suggest("query", "a dog", "--html", "sheet.html")
    assert capsys.readouterr() == ("", 'next: clip-index query "a dog" --html sheet.html\n')


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_survives_any_encoding(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
    console.print_json(["犬", "é", "\udcff"])
    console.sys.stdout.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == ["犬", "é", "\udcff"]


def test_counts():
    assert [console.count(n, "shard") for n in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]


@pytest.mark.parametrize(
    ("path", "other"),
    [("embeddings", "index"), ("embeddings/", "index"), ("a/b/embeddings", "a/b/index"), ("/e", "/index"),
     ("s3://bucket/a/e", "s3://bucket/a/index")],
)  # fmt: skip
def test_beside(path, other):
    assert console.beside(path, "index") == other
