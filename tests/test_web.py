"""Inputs on web servers and on a hub of data sets, read as if they were local."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import make_pictures
from s3_proxy import sometimes
from web_server import WebServer

from clip_index import remote, storage
from clip_index.cli import main
from clip_index.readers import fetch, open_reader
from clip_index.types import ClipIndexError, UsageError

READ = """
import hashlib, json, sys
from clip_index.readers import fetch, open_reader
from clip_index.types import UsageError
def read(source):
    try:
        reader = open_reader(source)
    except UsageError as error:
        return str(error)
    samples = [sample for task in reader.plan(4) for sample in reader.read(task)]
    told = [(s.key, hashlib.sha256(s.image).hexdigest(), s.text, s.meta, fetch(s.source) == s.image) for s in samples]
    return json.loads(json.dumps(told))
"""


def make_tables(folder: Path, pictures: Path) -> None:
    """Two parquet files as the `datasets` library writes them."""
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "text": path.stem, "label": number}
        for number, path in enumerate(sorted(pictures.glob("*.png")))
    ]
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    folder.mkdir(parents=True)
    for part in (0, 1):
        table = pa.Table.from_pylist(rows[4 * part : 4 * part + 4])
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / f"train-0000{part}-of-00002.parquet", row_group_size=2)


def make_tars(folder: Path, pictures: Path) -> None:
    """Two tars of four pictures with captions."""
    folder.mkdir(parents=True)
    files = sorted(pictures.iterdir())
    for part in (0, 1):
        with tarfile.open(folder / f"{part:05d}.tar", "w") as tar:
            for path in files[8 * part : 8 * part + 8]:
                tar.add(path, path.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`one/pictures`, `one/tars` and `one/tables`, each of the same eight pictures with captions."""
    root = tmp_path_factory.mktemp("web")
    pictures = make_pictures(root / "one" / "pictures" / "train", 8)
    make_tars(root / "one" / "tars", pictures)
    make_tables(root / "one" / "tables" / "data", pictures)
    for name in ("pictures", "tars", "tables"):
        (root / "one" / name / "README.md").write_text("---\nlicense: mit\n---\n")
        (root / "one" / name / ".gitattributes").write_text("*.tar filter=lfs\n")
    return root


def samples(source: str) -> list[tuple]:
    reader = open_reader(source)
    return [(s.key, s.image, s.text, s.error) for task in reader.plan(100) for s in reader.read(task)]


def test_data_sets_on_a_hub_are_read_as_local_folders(folder):
    paths = ["one/pictures", "one/tars", "one/tables", "one/tables/data", "one/tars/00001.tar"]
    paths += ["one/tables/data/train-00001-of-00002.parquet", "one/tars/*.tar", "one/tars/{00000..00001}.tar"]
    paths += ["one/none", "one/tars/none.tar", "one/tables/data/none"]
    sources = [f"hf://datasets/{path}" for path in paths]
    script = READ + "print(json.dumps([read(source) for source in sys.argv[1:]]))"
    with WebServer(folder, hub=True) as server:
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
        command = [sys.executable, "-W", "ignore", "-c", script, *sources]
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert result.returncode == 0, result.stderr
    here: dict = {}
    exec(READ, here)
    found = json.loads(result.stdout)
    for path, source, told in zip(paths, sources, found, strict=True):
        local = here["read"](str(folder / path))
        assert told == (local.replace(str(folder / path), source) if isinstance(local, str) else local), path
    assert [len(told) for told in found[:8]] == [8, 8, 8, 8, 4, 4, 8, 8]
    assert all(row[2] and row[4] for told in found[:8] for row in told)
    assert found[8:] == [f"no such file or folder: {source}" for source in sources[8:]]


def test_tars_and_tables_on_a_web_server(folder):
    with WebServer(folder) as server:
        for path in (
            "one/tars/{00000..00001}.tar",
            "one/tars/00001.tar",
            "one/tables/data/train-00000-of-00002.parquet",
        ):
            assert samples(f"{server.url}/{path}") == samples(str(folder / path))
        assert samples(f"{server.url}/one/tars") == samples(f"{folder}/one/tars")  # by its page of links
        reader = open_reader(f"{server.url}/one/tars/00000.tar")
        sample = next(reader.read(reader.plan(10)[0]))
        assert fetch(sample.source) == sample.image and sample.source.startswith(server.url)
        with pytest.raises(UsageError, match=r"no such file: .*00002\.tar \(1 of 3 are missing"):
            open_reader(f"{server.url}/one/tars/{{00000..00002}}.tar")


def test_a_web_server_that_fails_now_and_then(folder, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    with WebServer(folder, sometimes(3, 0.2, [500, 503, 429, "reset", "cut"])) as server:
        source = "one/tars/{00000..00001}.tar"
        assert samples(f"{server.url}/{source}") == samples(str(folder / source))
        assert all(server.seen[fault] for fault in (500, 503, 429, "reset", "cut"))


def test_a_web_server_without_ranges(tmp_path, monkeypatch):
    (tmp_path / "small").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(remote, "_BLOCK", 1 << 12)
    with WebServer(tmp_path, ranges=False) as server:
        with storage.open_read(f"{server.url}/small") as file:
            assert file.seek(1000) == 1000 and file.read() == bytes(range(256))[-24:]
        with (
            pytest.raises(ClipIndexError, match=r"cannot read .*/large in parts: its server does not answer range"),
            storage.open_read(f"{server.url}/large") as file,
        ):
            file.seek(1 << 19)
            file.read(1)


def test_what_a_web_server_refuses_is_told_in_one_line(folder, tmp_path, capsys):
    with WebServer(folder, lambda method, path: 403 if "secret" in path else None) as server:
        for name, told in (("secret.tar", "no permission"), ("none.tar", "no such file or folder")):
            assert main(["embed", f"{server.url}/{name}", str(tmp_path / "out")]) != 0
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and f"{server.url}/{name}" in error and told in error


def test_nothing_is_written_to_a_web_server(folder, tmp_path, capsys):
    with WebServer(folder) as server:
        assert main(["embed", f"{folder}/one/pictures", f"{server.url}/out"]) == 1
    assert f"cannot write {server.url}/out/" in capsys.readouterr().err


def test_what_has_to_be_installed_is_said(monkeypatch):
    import fsspec

    def missing(protocol: str):
        raise ImportError(f"Please install what {protocol} needs")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    for url, extra in {"gs://b/x": "gcs", "az://c/x": "azure", "s3://b/x": "s3", "https://h/x": "http"}.items():
        with pytest.raises(ClipIndexError, match=rf"cannot open {url}: .*\(pip install 'clip-index\[{extra}\]'\)"):
            storage.exists(url)
    with pytest.raises(ClipIndexError, match=r"cannot open nosuch://x: .*nosuch"):
        monkeypatch.undo()
        storage.exists("nosuch://x")
