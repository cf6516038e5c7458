"""The demo's steps in order, what it says, and that a second run is no different. The real one runs in test_end2end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from clip_index import cli, demo
from clip_index.types import ClipIndexError, Hit


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """What was called, in order."""
    called = []
    Image.new("RGB", (8, 8), "red").save(tmp_path / "rex.png")
    row = {"image_path": "rex.png", "caption": "a <dog>", "source": str(tmp_path / "rex.png")}

    def embed(source, output, *, progress):
        called.append(("embed", source.rsplit("/", 1)[-1], output))
        return SimpleNamespace(rows=300, new_rows=0 if len(called) > 5 else 300)

    def build_index(embeddings, index):
        called.append(("build", embeddings, index))

    class Searcher:
        def __init__(self, index):
            called.append(("open", index))

        def search(self, query, *, k):
            called.append(("search", query))
            return [Hit(row=i, score=0.5 - i / 100, key=f"rex-{i}", meta=row) for i in range(k)]

    monkeypatch.setattr("clip_index.embed.embed", embed)
    monkeypatch.setattr("clip_index.index.build_index", build_index)
    monkeypatch.setattr("clip_index.search.Searcher", Searcher)
    monkeypatch.chdir(tmp_path)
    return called


def test_the_demo_embeds_indexes_and_searches(capsys, steps, tmp_path):
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "clip-index-demo"
    assert steps[:3] == [
        ("embed", "sample", f"{folder}/embeddings"),
        ("build", f"{folder}/embeddings", f"{folder}/index"),
        ("open", f"{folder}/index"),
    ]
    assert [query for step, query in steps[3:]][-3:] == list(demo.QUERIES)
    assert err == "" and "300 pictures" in out and "clip-index-demo/sheet.html" in out
    for query in demo.QUERIES:
        assert f'"{query}"' in out
        assert f"<h2>{query}</h2>" in (folder / "sheet.html").read_text()


def test_the_demo_can_be_repeated(capsys, steps):
    assert cli.main(["demo"]) == cli.main(["demo"]) == 0
    assert capsys.readouterr().out.count("kept from an earlier run") == 1


def test_the_demo_goes_where_it_is_told(capsys, steps, tmp_path):
    assert cli.main(["demo", "--output", str(tmp_path / "a b")]) == 0
    assert (tmp_path / "a b" / "sheet.html").is_file()
    assert '"a b/sheet.html"' in capsys.readouterr().out


def test_the_commands_that_come_next_are_accepted(capsys, steps):
    from test_docs import check, command_lines

    cli.main(["demo"])
    lines = command_lines(capsys.readouterr().out)
    assert {words[0] for words in lines} == {"query", "embed"}
    for words in lines:
        check(words)


def test_a_step_that_fails_is_one_line(capsys, steps, monkeypatch):
    def fail(*_, **__):
        raise ClipIndexError("the folder holds other embeddings")

    monkeypatch.setattr("clip_index.embed.embed", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "clip-index: the folder holds other embeddings\n"
