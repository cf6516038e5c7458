"""Downloads with img2dataset from a server on this machine, by the command and in processes of its own."""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import picture_server
import pyarrow.parquet as pq
import pytest

from clip_index import cli, downloads
from clip_index.download_options import DownloadOptions
from clip_index.types import ClipIndexError, UsageError

COMMAND = [sys.executable, "-m", "clip_index", "download"]


@pytest.fixture(scope="module")
def server():
    with picture_server.serve() as server:
        yield server


def run(*words: str | Path) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def write_csv(path: Path, rows: list[tuple], header: tuple = ("URL", "TEXT", "price")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def samples(folder: Path) -> dict[str, dict]:
    """The columns of every sample in the tars, by URL; each tar is whole, and no key comes twice."""
    found, keys = {}, Counter()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in members:
            key, _, suffix = name.partition(".")
            if suffix == "json":
                keys[key] += 1
                row = json.loads(members[name])
                found[row["url"]] = {**row, "txt": members[f"{key}.txt"].decode(), "jpg": members[f"{key}.jpg"]}
    assert len(found) == sum(keys.values()) and set(keys.values()) <= {1}
    return found


def test_a_list_of_several_formats_with_pictures_that_fail(server, tmp_path):
    """What is asked for is done; what is not is done as the defaults say: bytes kept, columns kept, reasons counted."""
    lists = tmp_path / "lists"
    lists.mkdir()
    bad = [(f"{server.url}/{name}", name, 0) for name in ("gone", "text", "reset")]
    write_csv(lists / "a.csv", [(f"{server.url}/{i}.jpg", f"picture, {i}\n", i) for i in range(3)] + bad)
    (lists / "b.jsonl").write_text(json.dumps({"URL": f"{server.url}/3.jpg?a,b", "TEXT": None, "price": 3}))
    status, out, err = run(lists, tmp_path / "images", "--retries", "0")
    assert status == 0, err
    assert (
        f"{tmp_path / 'images'}: 4 pictures in 2 shards, 3 failed (1 " in out and "1 HTTP Error 404: Not Found" in out
    )
    assert err.splitlines() == [
        f"{lists}: 7 rows, URLs in URL, captions in TEXT, keeping price",
        f"next: clip-index embed {tmp_path / 'images'} {tmp_path / 'embeddings'}",
    ]
    found = samples(tmp_path / "images")
    assert {url.removeprefix(server.url): row["price"] for url, row in found.items()} == {
        "/0.jpg": 0, "/1.jpg": 1, "/2.jpg": 2, "/3.jpg?a,b": 3
    }  # fmt: skip
    assert found[f"{server.url}/1.jpg"]["txt"] == "picture, 1\n" and found[f"{server.url}/3.jpg?a,b"]["txt"] == ""
    assert found[f"{server.url}/2.jpg"]["jpg"] == picture_server.PICTURES[2].read_bytes()
    failed = pq.read_table(tmp_path / "images" / "00000.parquet").to_pylist()
    assert sum(row["status"] != "success" for row in failed) == 3
    asked = dict(server.asked)
    status, out, err = run(lists, tmp_path / "images", "--retries", "0", "--json")
    document = json.loads(out)
    assert (status, err, server.asked) == (0, "", asked)
    assert (document["downloaded"], document["failed"], document["skipped_shards"]) == (4, 3, 2)
    status, out, err = run(lists, tmp_path / "images", "--image_size", "64")
    assert (status, out) == (2, "") and "image_size: 384 -> 64" in err and err.count("\n") == 1


def test_killed_and_run_again(server, tmp_path):
    """No sample is lost or doubled, tars are whole, finished shards are not fetched again, and no process is left."""
    server.release.clear()
    server.hung_up.clear()
    source, images = tmp_path / "list.txt", tmp_path / "images"
    urls = [f"{server.url}/{i}.jpg?killed{'late' if i >= 15 else ''}" for i in range(24)]
    source.write_text("\n".join(urls))
    words = [*COMMAND, source, images, "--number_sample_per_shard", "6", "--thread_count", "1"]
    words += ["--processes_count", "1", "--caption_col", "none", "--timeout", "240"]
    (tmp_path / "tmp").mkdir()  # who is killed leaves a temporary folder
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")})
    wait_for(lambda: any("killedlate" in path for path in server.asked), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert server.hung_up.wait(60)  # its workers are gone as well
    server.release.set()
    assert sorted(path.name for path in images.glob("*_stats.json")) == ["00000_stats.json", "00001_stats.json"]
    assert (images / "00002.tar").exists() and sum("killed" in path for path in server.asked) == 16
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{images}: 2 of 4 shards are there from earlier runs" in again.stderr
    assert "24 pictures in 4 shards" in again.stdout
    rows = [json.loads(member) for member in json_members(images)]
    assert sorted(row["url"] for row in rows) == sorted(urls)
    assert {server.asked[url.removeprefix(server.url)] for url in urls[:12]} == {1}
    assert sorted(path.name for path in images.iterdir() if not path.name.startswith("0000")) == ["clip_index_download"]


def test_interrupted(server, tmp_path):
    """Ctrl-C ends all processes, and leaves what can be read and gone on with."""
    server.release.clear()
    server.hung_up.clear()
    rows = [(f"{server.url}/{i}.jpg?stopped{'late' if i >= 10 else ''}", "x", i) for i in range(20)]
    source, images = write_csv(tmp_path / "list.csv", rows), tmp_path / "images"
    first = images / "00000_stats.json"
    words = [*COMMAND, source, images, "--number_sample_per_shard", "10", "--timeout", "240"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: first.exists() and any("stoppedlate" in path for path in server.asked), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert server.hung_up.wait(60)
    server.release.set()
    assert process.returncode == 130 and err.splitlines()[-1] == "clip-index: interrupted"
    assert "the same command goes on" in err
    kept = [f"00000{suffix}" for suffix in (".parquet", ".tar", "_stats.json")]
    assert sorted(path.name for path in images.iterdir()) == [*kept, "clip_index_download"]
    assert sorted(samples(images)) == sorted(url for url, *_ in rows[:10])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"it ended with {process.returncode}, or takes too long: {process.communicate()[1]!r}")
        time.sleep(0.01)


def json_members(folder: Path) -> list[bytes]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".json")]
    return found


def test_nothing_comes(server, tmp_path):
    """One line, a status, and nothing that would keep the next run from trying again."""
    (tmp_path / "list.txt").write_text(f"{server.url}/gone\n{server.url}/gone?again\n")
    status, out, err = run(tmp_path / "list.txt", tmp_path / "images")
    assert (status, out) == (1, "")
    says = f"clip-index: {tmp_path / 'images'}: none of 2 pictures could be downloaded: 2 HTTP Error 404: Not Found"
    assert err.splitlines()[1:] == [says]
    assert list((tmp_path / "images").iterdir()) == []


def test_what_img2dataset_says_is_the_error(server, tmp_path):
    write_csv(tmp_path / "list.csv", [(f"{server.url}/1.jpg", "x", 1)])
    options = ["--encode_format", "png", "--encode_quality", "95"]
    status, out, err = run(tmp_path / "list.csv", tmp_path / "images", *options)
    assert (status, out) == (1, "")
    assert "img2dataset failed: " in err and "between 0 and 9, got 95; 1 of 1 shards are missing" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gone.csv", "images"], "no such file or folder: gone.csv"),
        (["empty.csv", "images"], "no URLs in"),
        (["nothing.csv", "images"], "no column of URLs in"),
        (["list.csv", "images", "--url_col", "LINK"], "--url_col: no column 'LINK'"),
        (["list.csv", "images", "--thread_count", "0"], "--thread_count 0: expected 1 or more"),
        (["list.csv", "images", "--verify_hash", "md5,md5"], "--verify_hash md5,md5: expected a column and sha256"),
        (["list.csv", "images", "--resize_mod", "no"], "did you mean `--resize_mode`?"),
        (["list.csv", "images", "--resize_mode", "centre_crop"], "did you mean center_crop?"),
        (["list.csv", "list.csv"], "list.csv is a file"),
        (["list.csv"], "OUTPUT missing"),
    ],
)
def test_bad_inputs_are_one_line_and_nothing_is_fetched(capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "_run", None)
    write_csv(tmp_path / "list.csv", [("http://127.0.0.1:1/", "x", 1)])
    write_csv(tmp_path / "nothing.csv", [("x",)], ("a",))
    (tmp_path / "empty.csv").write_text("")
    status = cli.main(["download", *words])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "images").exists()


def test_without_img2dataset(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "img2dataset" else find(name))
    write_csv(tmp_path / "list.csv", [("http://127.0.0.1:1/", "x", 1)])
    assert cli.main(["download", str(tmp_path / "list.csv"), str(tmp_path / "images")]) == 1
    err = capsys.readouterr().err
    assert "pip install 'clip-index[download]'" in err and err.count("\n") == 1
    assert not (tmp_path / "images").exists()


def test_overwriting_removes_the_shards_and_nothing_else(monkeypatch, tmp_path):
    """And the command line of img2dataset becomes what img2dataset gets."""
    called = []

    def run(folder, prepared, options, size, watch):
        called.append((options.arguments(), size))
        stats = {"count": 1, "successes": 1, "status_dict": {"success": 1}}
        Path(folder.path, "00000.tar").write_bytes(bytes(10240))
        Path(folder.path, "00000_stats.json").write_text(json.dumps(stats))

    monkeypatch.setattr(downloads, "_run", run)
    source = write_csv(tmp_path / "list.csv", [("http://127.0.0.1:1/", "x", 1)])
    output = tmp_path / "images"
    summary = downloads.download(str(source), str(output))
    assert (summary.downloaded, summary.failed, summary.shards, summary.skipped_shards) == (1, 0, 1, 0)
    (output / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="output_format: webdataset -> files"):
        downloads.download(str(source), str(output), DownloadOptions(output_format="files"))
    with pytest.raises(UsageError, match="no column 'LINK'"):
        downloads.download(str(source), str(output), DownloadOptions(url_col="LINK", incremental_mode="overwrite"))
    assert (output / "00000.tar").exists()
    options = DownloadOptions(image_size=64, disallowed_header_directives="['noai','noindex']", compute_hash="none")
    with pytest.raises(UsageError, match="image_size: 384 -> 64"):
        downloads.download(str(source), str(output), options)
    overwriting = DownloadOptions(**{**vars(options), "incremental_mode": "overwrite"})
    downloads.download(str(source), str(output), overwriting)
    assert len(called) == 2 and (output / "photo.jpg").exists()
    arguments, size = called[1]
    assert size == 1000
    assert (arguments["image_size"], arguments["disallowed_header_directives"]) == (64, ["noai", "noindex"])
    assert arguments["compute_hash"] is None and "max_image_area" not in arguments


def test_what_img2dataset_downloaded_by_itself_is_gone_on_with(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "_run", None)
    source, output = write_csv(tmp_path / "list.csv", [("http://127.0.0.1:1/", "x", 1)]), tmp_path / "images"
    output.mkdir()
    (output / "00000.tar").write_bytes(bytes(10240))
    stats = {"count": 1, "successes": 1, "status_dict": {"success": 1}}
    (output / "00000_stats.json").write_text(json.dumps(stats))
    with pytest.raises(UsageError, match="another --output_format"):
        downloads.download(str(source), str(output), DownloadOptions(output_format="files"))
    summary = downloads.download(str(source), str(output))
    assert (summary.downloaded, summary.skipped_shards) == (1, 1)


def test_what_made_no_shard_does_not_bind(monkeypatch, tmp_path):
    def fail(*_):
        raise ClipIndexError("no network")

    monkeypatch.setattr(downloads, "_run", fail)
    source, output = write_csv(tmp_path / "list.csv", [("http://127.0.0.1:1/", "x", 1)]), tmp_path / "images"
    for size in (64, 96):
        with pytest.raises(ClipIndexError, match="no network"):
            downloads.download(str(source), str(output), DownloadOptions(image_size=size))


def test_every_option_is_one_of_img2dataset():
    (package,) = importlib.util.find_spec("img2dataset").submodule_search_locations
    tree = ast.parse(Path(package, "main.py").read_text())
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "download")
    known = {argument.arg for argument in function.args.args}
    assert set(DownloadOptions().arguments()) <= known
    assert known - {"url_list", "output_folder"} <= set(DownloadOptions.__dataclass_fields__)


def test_counts_are_shown_on_a_terminal(monkeypatch):
    from clip_index.download_report import Line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Line() as line:
        line.show(2000, 1000, 7, 3_000_000)
        line.say("a line that stays")
    assert "download: 1,000 of 2,000 pictures, 7 failed, 3.0 MB, 0 s" in terminal.getvalue()
    assert terminal.getvalue().rstrip("\r ").endswith("a line that stays\n")
