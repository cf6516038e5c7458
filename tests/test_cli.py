"""The commands as people run them: what is on stdout, what on stderr, and the exit status."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import get_type_hints

import fakes
import pytest
from embedding_fakes import make_embeddings, random_rows
from PIL import Image
from test_render import Terminal

from clip_index import cli, query
from clip_index.build import build_index
from clip_index.end2end import end2end
from clip_index.types import Hit


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "rex.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


@pytest.fixture
def searched(monkeypatch, picture):
    """A searcher that finds two rows whatever it is asked, and what it was asked."""
    asked = []

    class Searcher:
        def __init__(self, index=None, *, device="auto", exact=False):
            asked.append({"index": index, "device": device})
            self.path = "/the/index"

        def search(self, query=None, *, image=None, k=10, modality=None, where=None, dedup=None):
            asked.append({"query": query, "image": image, "k": k, "modality": modality})
            if where or dedup:
                asked[-1] |= {"where": where, "dedup": dedup}
            row = {"image_path": "pets/rex.png", "caption": "a dog\x1b[2J", "source": str(picture), "nan": float("nan")}
            return [Hit(7, 0.5, "pets/rex", row), Hit(3, 0.25, "pets/tom", {**row, "caption": None})][:k]

    monkeypatch.setitem(sys.modules, "clip_index.search", SimpleNamespace(Searcher=Searcher))
    return asked


def run(capsys, *argv) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def test_query_prints_a_table(capsys, searched):
    status, out, err = run(capsys, "query", "a dog", "--index", "here")
    assert status == 0
    assert searched == [
        {"index": "here", "device": "auto"},
        {"query": "a dog", "image": None, "k": 10, "modality": None},
    ]
    assert "0.500" in out and "pets/rex.png" in out and "weaker matches below" in out
    assert "\x1b" not in out
    assert err == 'next: clip-index query "a dog" --index here --html sheet.html\n'


def test_query_json_is_one_document_and_nothing_else(capsys, searched):
    status, out, err = run(capsys, "query", "dog # cat", "--json", "--k=1")
    assert (status, err) == (0, "")
    (hit,) = json.loads(out)
    assert (hit["rank"], hit["row"], hit["score"], hit["key"]) == (1, 7, 0.5, "pets/rex")
    assert hit["image_path"] == "pets/rex.png" and hit["nan"] is None
    assert searched[1]["query"] == "dog # cat" and searched[1]["k"] == 1


def test_query_narrows_what_may_be_found(capsys, searched):
    status, _, err = run(capsys, "query", "a dog", "--where", "width > 5", "--dedup")
    assert (status, searched[1]["where"], searched[1]["dedup"]) == (0, "width > 5", 0.95)
    assert err == 'next: clip-index query "a dog" --where "width > 5" --html sheet.html\n'
    assert run(capsys, "query", "a dog", "--dedup", "--threshold", "0.9")[0] == 0
    assert searched[3]["dedup"] == 0.9


def test_query_with_a_picture(capsys, searched, picture):
    assert run(capsys, "query", "--image", picture, "--modality", "text")[0] == 0
    assert searched[1] == {"query": None, "image": str(picture), "k": 10, "modality": "text"}


def test_query_writes_a_sheet(capsys, searched, picture, tmp_path):
    sheet = tmp_path / "new" / "sheet.html"
    status, out, err = run(capsys, "query", "a <dog>", "--image", picture, "--html", sheet, "--json")
    assert status == 0 and json.loads(out)
    assert err == f"sheet: {sheet}\n"
    html = sheet.read_text()
    assert html.count("data:image/webp;base64,") == 3  # two hits and the picture searched with
    assert f"<h1>a &lt;dog&gt; + {picture}</h1>" in html and "/the/index" in html


@pytest.mark.parametrize(
    ("argv", "says"),
    [([], "nothing to search for"), (["  "], "nothing to search for"), (["dog", "--k", "0"], "--k 0: expected 1"),
     (["dog", "--k", "-3"], "--k -3"), (["dog", "--modality", "sound"], "expected image or text"),
     (["dog", "--dedup", "--threshold", "95"], "--threshold 95.0: expected")],
)  # fmt: skip
def test_query_refuses_before_it_opens_anything(capsys, searched, argv, says):
    status, out, err = run(capsys, "query", *argv)
    assert (status, out, searched) == (2, "", [])
    assert says in err and err.count("\n") == 1


def test_a_terminal_that_can_gets_pictures(monkeypatch, picture):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "90")
    for name in ("NO_COLOR", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-kitty")
    hits = [Hit(0, 0.5, "k", {"source": str(picture), "image_path": "p", "caption": "c"})]
    query.show(hits)
    assert "\x1b_Ga=T" in terminal.getvalue()
    terminal.truncate(0)
    query.show(hits, "none")
    assert "\x1b_G" not in terminal.getvalue() and "0.500" in terminal.getvalue()


@pytest.fixture
def embeddings(tmp_path):
    make_embeddings(tmp_path / "e", {"image": random_rows(12)})
    return tmp_path / "e"


def test_verify_finds_nothing_wrong(capsys, embeddings):
    status, out, err = run(capsys, "verify", embeddings)
    assert (status, out) == (0, f"{embeddings}: ok, 12 rows in 3 shards, 0 failed samples\n")
    assert err == f"next: clip-index build-index {embeddings} {embeddings.parent / 'index'}\n"


def test_verify_names_what_is_wrong(capsys, embeddings):
    shard = embeddings / "img_emb" / "img_emb_00001.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    status, out, err = run(capsys, "verify", embeddings)
    assert status == 1 and "img_emb/img_emb_00001.npy" in out and out.count("\n") == 1
    assert "1 problem;" in err and err.count("\n") == 1
    status, out, _ = run(capsys, "verify", embeddings, "--json")
    document = json.loads(out)
    assert status == 1 and document["ok"] is False and len(document["problems"]) == 1


def test_verify_json_when_all_is_well(capsys, embeddings):
    status, out, err = run(capsys, "verify", embeddings, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"embeddings": str(embeddings), "ok": True, "problems": []}


def test_verify_of_something_else(capsys, tmp_path):
    status, out, err = run(capsys, "verify", tmp_path)
    assert (status, out) == (1, "") and "no embeddings in" in err


def test_models_are_listed(capsys):
    status, out, _ = run(capsys, "models")
    assert status == 0 and out.splitlines()[0].split()[:2] == ["name", "dim"] and "mini" in out
    status, out, err = run(capsys, "models", "--json")
    assert (status, err) == (0, "") and "mini" in [model["name"] for model in json.loads(out)]


def test_embed_and_build_index(capsys, monkeypatch, tmp_path):
    fakes.use(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = fakes.make_pictures(tmp_path / "photos", 12)
    embeddings, index = tmp_path / "embeddings", tmp_path / "index"
    status, out, err = run(capsys, "embed", photos, embeddings, "--dry_run")
    assert status == 0 and "12 samples to embed as images with captions" in out and not embeddings.exists()
    status, out, err = run(capsys, "embed", photos, embeddings, "--rows_per_shard", "5")
    assert status == 0 and f"{embeddings}: 12 images with captions in 3 shards" in out
    assert err == f"next: clip-index build-index {embeddings} {index}\n"
    status, out, err = run(capsys, "build-index", embeddings, index)
    assert status == 0 and "recall@10" in out and err.endswith(f'next: clip-index query "a dog" --index {index}\n')
    status, out, err = run(capsys, "build-index", embeddings, index, "--json")
    assert status == 0 and json.loads(out)["rows"] == 12


def test_embed_with_failed_samples_exits_with_3(capsys, monkeypatch, tmp_path):
    fakes.use(monkeypatch)
    photos = fakes.make_pictures(tmp_path / "photos", 3)
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n?")
    status, out, err = run(capsys, "embed", photos, tmp_path / "e")
    assert status == 3 and "3 images with captions" in out
    assert f"1 sample could not be embedded; why is in {tmp_path / 'e' / 'failed' / 'failed_00000.parquet'}" in err


def test_embed_refuses_a_wrong_value_in_one_line(capsys, tmp_path):
    for argv in (["--rows_per_shard", "0"], ["--precision", "int1"], ["--max_failure_rate", "7"]):
        status, out, err = run(capsys, "embed", tmp_path, tmp_path / "e", *argv)
        assert (status, out) == (2, "") and err.count("\n") == 1, argv


def test_the_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "clip_index", "qurey"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "clip-index: unknown command 'qurey': did you mean clip-index query?\n"


def test_a_flag_means_the_same_in_end2end_as_in_the_command_of_its_step():
    flags = inspect.signature(end2end).parameters
    # how the list of URLs is written; what is embedded, and by what
    for command, other in ((cli.embed, {"input_format"}), (build_index, {"modality", "model"})):
        hints = get_type_hints(command)
        for name, flag in inspect.signature(command).parameters.items():
            if name in flags.keys() - other and flag.kind is flag.KEYWORD_ONLY:
                assert (flags[name].annotation, flags[name].default) == (hints[name], flag.default), name
    assert {"model", "precision", "decode", "batch_size", "memory", "recall_target"} <= flags.keys()


def test_mini_has_no_onnx_form(tmp_path, capsys):
    assert cli.main(["export", "mini", str(tmp_path / "out")]) == 2
    assert "mini is no CLIP model" in capsys.readouterr().err
