"""The whole way with the real command, the shipped model and the sample pictures, in processes of its own."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from fakes import contents

SAMPLE = Path(str(resources.files("clip_index"))) / "data" / "sample"


def clip_index(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "clip_index", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One category of the sample, embedded and indexed by the commands; `cache` holds what they remember."""
    folder = tmp_path_factory.mktemp("end2end")
    shutil.copytree(SAMPLE / "animals", folder / "photos" / "animals")
    shutil.copytree(SAMPLE / "music", folder / "photos" / "music")
    (folder / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is not a picture")
    embedded = clip_index("embed", "photos", "embeddings", "--rows_per_shard", "16", cwd=folder)
    assert embedded.returncode == 3, embedded.stderr
    assert "failed_" in embedded.stderr
    built = clip_index("build-index", "embeddings", "index", cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    assert built.returncode == 0, built.stderr
    assert "recall@10" in built.stdout
    return folder


def query(folder: Path, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> list[dict]:
    environment.setdefault("XDG_CACHE_HOME", str(folder / "cache"))
    result = clip_index("query", *arguments, "--json", cwd=cwd or folder, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_words_find_pictures(folder):
    hits = query(folder, "a guitar", "--k", "5")
    assert len(hits) == 5
    assert any("guitar" in hit["caption"] for hit in hits[:3])
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert Path(hits[0]["image_path"]).is_file()


def test_a_picture_finds_itself(folder):
    picture = next(path for path in sorted((folder / "photos/animals").iterdir()) if path.suffix != ".txt")
    (hit,) = query(folder, "--image", picture, "--k", "1")
    assert hit["image_path"] == str(picture) and hit["score"] > 0.99


def test_which_index(folder, tmp_path):
    here = query(folder, "a dog", "--k", "1")
    elsewhere = {"cwd": tmp_path}
    assert query(folder, "a dog", "--k", "1", **elsewhere) == here  # the one built last
    assert query(folder, "a dog", "--k", "1", "--index", folder / "index", **elsewhere) == here
    assert query(folder, "a dog", "--k", "1", CLIP_INDEX=str(folder / "index"), XDG_CACHE_HOME=str(tmp_path)) == here
    lost = clip_index("query", "a dog", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert lost.returncode == 2 and "build-index" in lost.stderr and len(lost.stderr.strip().splitlines()) == 1


def test_verify(folder, tmp_path):
    assert clip_index("verify", folder / "embeddings").returncode == 0
    shutil.copytree(folder / "embeddings", tmp_path / "embeddings")
    damaged = tmp_path / "embeddings/img_emb/img_emb_00001.npy"
    data = bytearray(damaged.read_bytes())
    data[200] ^= 1
    damaged.write_bytes(data)
    found = clip_index("verify", tmp_path / "embeddings")
    assert found.returncode == 1 and "img_emb_00001.npy was altered" in found.stdout + found.stderr


def test_killed_and_run_again(folder, tmp_path):
    command = [sys.executable, "-m", "clip_index", "embed", "photos", tmp_path / "out", "--rows_per_shard", "16"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/done/*.json")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/done/00002.json").exists()
    again = clip_index("embed", "photos", tmp_path / "out", "--rows_per_shard", "16", cwd=folder)
    assert again.returncode == 3, again.stderr
    assert contents(tmp_path / "out") == contents(folder / "embeddings")


def test_another_model_is_refused(folder):
    refused = clip_index("embed", "photos", "embeddings", "--precision", "fp32", "--rows_per_shard", "16", cwd=folder)
    manifest = json.loads((folder / "embeddings/manifest.json").read_text())
    if manifest["precision"] == "fp32":  # where the processor has no bfloat16, fp32 is what `auto` chose
        assert refused.returncode == 3
    else:
        assert refused.returncode == 2 and f"precision: {manifest['precision']} -> fp32" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


def one_line_about(stderr: str, path: Path) -> bool:
    return len(stderr.strip().splitlines()) == 1 and str(path) in stderr


def test_a_file_where_the_output_should_be(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused = clip_index("embed", folder / "photos", tmp_path / "file" / "out")
    assert refused.returncode == 1 and one_line_about(refused.stderr, tmp_path / "file")


def test_a_read_only_folder(folder, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    command = [sys.executable, "-m", "clip_index", "embed", str(folder / "photos"), str(tmp_path / "out")]
    refused = subprocess.run(command, capture_output=True, text=True, preexec_fn=obey_permissions)
    assert refused.returncode == 1 and one_line_about(refused.stderr, tmp_path / "out"), refused.stderr
    assert list((tmp_path / "out").iterdir()) == []


def obey_permissions() -> None:
    """Take from root, where tests run as root, the right to write anywhere (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(24, 1)


def test_a_full_disk(folder, tmp_path):
    """A file size limit needs no root: writing past it fails as writing to a full disk does."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from clip_index.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "embed", str(folder / "photos"), str(tmp_path / "out")]
    full = subprocess.run(command, capture_output=True, text=True)
    assert full.returncode == 1
    assert len(full.stderr.strip().splitlines()) == 1 and f"cannot write to {tmp_path / 'out'}" in full.stderr
    assert not list((tmp_path / "out").rglob("*.json.*")) and not (tmp_path / "out/done/00000.json").exists()
    assert clip_index("embed", folder / "photos", tmp_path / "out").returncode == 3
    assert clip_index("verify", tmp_path / "out").returncode == 0


def test_peers_read_the_folder(folder, tmp_path):
    """embedding_reader reads it, and autofaiss indexes it by its own command, unchanged."""
    from embedding_reader import EmbeddingReader

    rows = json.loads((folder / "embeddings/manifest.json").read_text())["rows"]
    reader = EmbeddingReader(embeddings_folder=str(folder / "embeddings/img_emb"), file_format="npy")
    assert (reader.count, reader.dimension) == (rows, 384)
    read = np.concatenate([block for block, _ in reader(batch_size=7)])
    own = np.concatenate([np.load(path) for path in sorted((folder / "embeddings/img_emb").glob("*.npy"))])
    np.testing.assert_array_equal(read, own)
    paired = EmbeddingReader(
        embeddings_folder=str(folder / "embeddings/img_emb"),
        metadata_folder=str(folder / "embeddings/metadata"),
        meta_columns=["image_path", "caption"],
        file_format="parquet_npy",
    )
    metadata = next(iter(paired(batch_size=rows)))[1]
    assert next(iter(metadata["image_path"])).startswith(str(folder / "photos"))
    autofaiss = Path(sys.executable).with_name("autofaiss")
    built = subprocess.run(
        [
            autofaiss,
            "build_index",
            f"--embeddings={folder / 'embeddings/img_emb'}",
            f"--index_path={tmp_path / 'knn.index'}",
            f"--index_infos_path={tmp_path / 'infos.json'}",
            "--metric_type=ip",
            "--max_index_memory_usage=1G",
            "--current_memory_available=2G",
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    import faiss

    assert faiss.read_index(str(tmp_path / "knn.index")).ntotal == rows


def test_s3(folder, tmp_path, monkeypatch):
    """Input and output on a real S3 server over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        import boto3

        client = boto3.client(
            "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test"
        )
        client.create_bucket(Bucket="photos")
        local = tmp_path / "local"
        for path in sorted((folder / "photos/music").iterdir()):
            client.upload_file(str(path), "photos", f"in/{path.name}")
        embedded = clip_index("embed", "s3://photos/in", "s3://photos/out", **environment)
        assert embedded.returncode == 0, embedded.stderr
        assert clip_index("verify", "s3://photos/out", **environment).returncode == 0
        assert clip_index("embed", folder / "photos/music", local).returncode == 0
        remote = client.get_object(Bucket="photos", Key="out/img_emb/img_emb_00000.npy")["Body"].read()
        assert remote == (local / "img_emb/img_emb_00000.npy").read_bytes()
        assert clip_index("build-index", "s3://photos/out", tmp_path / "index", **environment).returncode == 0
        hits = json.loads(clip_index("query", "a guitar", "--index", tmp_path / "index", "--json").stdout)
        assert hits[0]["image_path"].startswith("s3://photos/in/")
    finally:
        server.stop()
