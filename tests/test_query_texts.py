from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from clip_index.cli import main
from clip_index.types import Hit


@pytest.fixture
def asked(monkeypatch):
    """A searcher that finds one row a text, and what it was asked."""
    calls = []

    class Searcher:
        def __init__(self, index=None, *, device="auto", exact=False):
            pass

        def search_many(self, *, texts, **options):
            calls.append((texts, options))
            return [[Hit(row, 0.5, f"key-{row}", {"caption": text})] for row, text in enumerate(texts)]

    monkeypatch.setitem(sys.modules, "clip_index.search", SimpleNamespace(Searcher=Searcher))
    return calls


def run(capsys, *argv):
    status = main([str(word) for word in argv])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_text_a_line(capsys, asked, tmp_path):
    (tmp_path / "q.txt").write_bytes("\ufeffa dog\r\n\n  ein Bär \n".encode())
    status, out, err = run(capsys, "query", "--texts", tmp_path / "q.txt", "--json", "--k", "3")
    assert (status, err) == (0, "")
    assert [(answer["query"], answer["results"][0]["key"]) for answer in json.loads(out)] == [
        ("a dog", "key-0"),
        ("ein Bär", "key-1"),
    ]
    assert asked == [(["a dog", "ein Bär"], {"k": 3, "modality": None, "where": None, "dedup": None})]
    status, out, _ = run(capsys, "query", "--texts", tmp_path / "q.txt")
    assert status == 0 and out.index("a dog:") < out.index("ein Bär:")


def test_what_cannot_be_is_refused_before_anything_is_opened(capsys, asked, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for argv, status in (
        (["a dog", "--texts", "q.txt"], 2),
        (["--texts", "q.txt", "--html", "sheet.html"], 2),
        (["--texts", tmp_path / "empty.txt"], 2),
        (["--texts", tmp_path / "binary"], 1),
        (["--texts", tmp_path / "missing.txt"], 1),
    ):
        found, out, err = run(capsys, "query", *argv)
        assert (found, out) == (status, "") and err.count("\n") == 1, argv
    assert asked == []
