"""`clip-index end2end` with the real command, the shipped model and a server on this machine."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fakes
import picture_server
import pytest

from clip_index import cli


def clip_index(folder: Path, *words: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "clip_index", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_from_a_list_to_an_answer(tmp_path):
    """Pictures with their captions and columns; a second run asks for nothing and makes nothing."""
    guitar = next(
        i for i, path in enumerate(picture_server.PICTURES) if "guitar" in path.with_suffix(".txt").read_text()
    )
    numbers = [guitar, *(i for i in range(14) if i != guitar)]
    with picture_server.serve() as server:
        with (tmp_path / "urls.csv").open("w", newline="") as file:
            texts = {i: picture_server.PICTURES[i].with_suffix(".txt").read_text().strip() for i in numbers}
            rows = [(f"{server.url}/{i}.jpg", texts[i], i) for i in numbers]
            csv.writer(file).writerows([("URL", "TEXT", "number"), *rows, (f"{server.url}/gone", "nothing", 99)])
        words = ["end2end", "urls.csv", "out", "--retries", "0"]
        done = clip_index(tmp_path, *words, "--query", "a guitar")
        assert done.returncode == 0, done.stderr
        images, embeddings, index = (tmp_path / "out" / name for name in ("images", "embeddings", "index"))
        head, *_ = lines = done.stdout.splitlines()
        assert head.startswith(f"{images}: {len(numbers)} pictures in 1 shard, 1 failed (1 HTTP Error 404: Not Found)")
        assert lines[1].startswith(f"{embeddings}: {len(numbers)} images with captions in 1 shard;")
        assert lines[2] == f"{index}: {len(numbers)} rows of 384 dimensions, encoder mini"
        assert "guitar" in next(line for line in lines if line.lstrip().startswith("1 "))
        asked, made = dict(server.asked), fakes.contents(tmp_path / "out")
        again = clip_index(tmp_path, *words)
        assert again.returncode == 0, again.stderr
        assert server.asked == asked and fakes.contents(tmp_path / "out") == made
    assert [line.count("from earlier runs") for line in again.stdout.splitlines()[:2]] == [1, 1]
    assert again.stdout.splitlines()[2] == f"{index}: {len(numbers)} rows, kept from an earlier run"
    assert again.stderr == 'next: clip-index query "a dog" --index out/index\n'
    found = clip_index(tmp_path, "query", "a guitar", "--index", "out/index", "--where", f"number = {guitar}", "--json")
    (hit,) = json.loads(found.stdout)
    assert hit["caption"] == texts[guitar] and hit["url"].endswith(f"/{guitar}.jpg")


@pytest.fixture
def photos(monkeypatch, tmp_path) -> Path:
    fakes.use(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fakes.make_pictures(tmp_path / "photos", 12)


def run(capsys, *words: str | Path) -> tuple[int, str, str]:
    status = cli.main(["end2end", *map(str, words)])
    return status, *capsys.readouterr()


def test_pictures_need_no_download(capsys, photos, tmp_path):
    out = tmp_path / "out"
    status, said, err = run(capsys, photos, out)
    assert status == 0 and not (out / "images").exists()
    assert said.startswith(f"{out / 'embeddings'}: 12 images with captions in 1 shard;")
    assert "recall@10" in said and err == f'next: clip-index query "a dog" --index {out / "index"}\n'
    status, said, _ = run(capsys, photos, out)
    assert status == 0 and said.endswith(f"{out / 'index'}: 12 rows, kept from an earlier run\n")


def test_the_index_is_built_again_for_other_options_or_other_embeddings(capsys, photos, tmp_path):
    out = tmp_path / "out"
    kept = []
    for words in ([], [], ["--recall_target", "0.9"], ["--recall_target", "0.9", "--update"]):
        if "--update" in words:
            shutil.copy(next(photos.glob("*.png")), photos / "one_more.png")
        status, said, err = run(capsys, photos, out, "--json", *words)
        assert (status, err) == (0, "")
        document = json.loads(said)
        kept.append(document["index"]["kept"])
    assert kept == [False, True, False, False]
    assert document["download"] is None and document["hits"] is None and document["embed"]["rows"] == 13
    (out / "index" / "image.index").write_bytes(b"cut off")
    assert json.loads(run(capsys, photos, out, "--json", *words)[1])["index"]["kept"] is False


def test_pictures_that_cannot_be_embedded_are_told_in_the_end(capsys, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n?")
    status, said, err = run(capsys, photos, tmp_path / "out")
    assert status == 3 and "12 images" in said and "recall@10" in said
    assert "1 sample could not be embedded" in err and "next: clip-index query" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gone", "out"], "no such file or folder: gone"),
        (["photos", "out", "--thread_count", "9"], "--thread_count is for a list of URLs, and photos is none"),
        (["photos", "out", "--input_format", "csv"], "no list of URLs in photos: expected csv"),
        (["empty.csv", "out"], "no URLs in"),
        (["photos", "out", "--recal_target", "1"], "did you mean `--recall_target`?"),
    ],
)
def test_bad_inputs_are_one_line(capsys, monkeypatch, photos, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("url\n")
    status, said, err = run(capsys, *words)
    assert (status, said) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
