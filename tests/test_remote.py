"""Object stores that misbehave, and files read ahead from them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import fakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import contents, make_pictures
from s3_proxy import Proxy, for_a_while, sometimes
from s3_server import bucket  # noqa: F401 - a fixture

from clip_index import remote, storage
from clip_index.cli import main
from clip_index.embed import embed
from clip_index.readers import open_reader
from clip_index.types import ClipIndexError, UsageError
from clip_index.verify import verify

DATA = bytes(range(256)) * 1000


@pytest.fixture
def proxy(bucket, monkeypatch):  # noqa: F811
    """A function that puts a misbehaving proxy before the S3 server."""
    import fsspec

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    proxies = []

    def start(choose) -> Proxy:
        made = Proxy(os.environ["AWS_ENDPOINT_URL"], choose)
        made.__enter__()
        proxies.append(made)
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        return made

    yield start
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for made in proxies:
        made.__exit__()


@pytest.mark.parametrize("blocks", [(1000, 3), (255_999, 1), (1 << 20, 7)])
def test_a_remote_file_reads_as_a_local_one(monkeypatch, blocks):
    monkeypatch.setattr(remote, "_BLOCK", blocks[0])
    monkeypatch.setattr(remote, "_AHEAD", blocks[1])
    storage.write_bytes("memory://remote/file", DATA)
    local = io.BytesIO(DATA)
    with storage.open_read("memory://remote/file") as file:
        for offset, whence, length in [
            (0, 0, 10),
            (999, 0, 2),
            (0, 1, 5000),
            (-7, 2, 100),
            (1500, 0, 0),
            (123_456, 0, 70_000),
            (len(DATA) + 5, 0, 3),
            (0, 0, -1),
        ]:
            assert file.seek(offset, whence) == local.seek(offset, whence)
            assert file.read(length) == local.read(length)


def test_reading_ahead_is_bounded(monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    monkeypatch.setattr(remote, "_AHEAD", 3)
    storage.write_bytes("memory://remote/file", DATA)
    asked = []
    fetch = remote.read_range
    monkeypatch.setattr(
        remote, "read_range", lambda path, start, length: (asked.append(start), fetch(path, start, length))[1]
    )
    with remote.RemoteFile("memory://remote/file", len(DATA)) as file:
        for number in range(20):
            assert file.read(1000) == DATA[number * 1000 : number * 1000 + 1000]
            assert len(file._blocks) <= 4
        assert sorted(asked) == sorted(set(asked)) and max(asked) <= 22_000
        asked.clear()
        file.seek(200_000)  # a jump: nothing tells that the next blocks will be wanted
        file.read(10)
        assert asked == [200_000]


def test_a_store_that_fails_for_good_is_given_up(proxy, bucket, monkeypatch):  # noqa: F811
    storage.write_bytes(f"{bucket}/given-up", b"x")
    monkeypatch.setattr(remote, "_PATIENCE_S", 0.05)
    proxy(lambda method, path: "InternalError")
    with pytest.raises(OSError, match="the store keeps failing") as caught:
        storage.read_bytes(f"{bucket}/given-up")
    assert caught.value.filename == f"{bucket}/given-up"


def test_a_store_that_fails_now_and_then(proxy, bucket):  # noqa: F811
    path, faults = f"{bucket}/sometimes/file", ["SlowDown", "reset", "InternalError", "cut"]
    storage.write_bytes(path, DATA)
    made = proxy(sometimes(5, 0.4, faults))
    for _ in range(5):
        assert storage.read_bytes(path) == DATA
        assert storage.read_bytes(path, 70_000, 9000) == DATA[70_000:79_000]
        storage.write_bytes(path, DATA)
        assert storage.list_names(f"{bucket}/sometimes") == ["file"]
    assert all(made.seen[fault] for fault in faults)


def run(source: str, output: str):
    return embed(source, output, batch_size=4, rows_per_shard=8, devices="cpu")


def make_input(folder: str, scratch: Path, kind: str) -> None:
    """16 pictures with captions, as files or in the rows of two tables."""
    pictures = make_pictures(scratch / "pictures", 16)
    if kind == "files":
        for path, data in contents(pictures).items():
            storage.write_bytes(f"{folder}/{path}", data)
        return
    names = sorted(path.stem for path in pictures.glob("*.png"))
    rows = [{"image": {"bytes": (pictures / f"{name}.png").read_bytes(), "path": name}, "text": name} for name in names]
    for start in (0, 8):
        pq.write_table(pa.Table.from_pylist(rows[start : start + 8]), scratch / "table", row_group_size=2)
        storage.write_bytes(f"{folder}/{start}.parquet", (scratch / "table").read_bytes())


@pytest.mark.parametrize(
    ("kind", "fault"),
    [*(("files", fault) for fault in ("SlowDown", "reset", "cut", "for a while")), ("parquet", "all")],
)
def test_embedding_through_a_store_that_fails(proxy, bucket, tmp_path, monkeypatch, kind, fault):  # noqa: F811
    fakes.use(monkeypatch)
    name = f"{fault.replace(' ', '-')}-{kind}"
    make_input(f"{bucket}/{name}/in", tmp_path, kind)
    run(f"{bucket}/{name}/in", str(tmp_path / "whole"))
    faults = ["SlowDown", "reset", "InternalError", "cut"] if fault == "all" else [fault]
    made = proxy(for_a_while("InternalError", 60, 1.0) if fault == "for a while" else sometimes(3, 0.15, faults))
    assert run(f"{bucket}/{name}/in", f"{bucket}/{name}/out").rows == 16
    assert sum(count for kind, count in made.seen.items() if kind) > 10
    for path, data in contents(tmp_path / "whole").items():
        assert storage.read_bytes(f"{bucket}/{name}/out/{path}") == data
    assert verify(f"{bucket}/{name}/out") == []


def test_a_table_on_a_store_that_fails_for_good(proxy, bucket, tmp_path, monkeypatch):  # noqa: F811
    make_input(f"{bucket}/lasting", tmp_path, "parquet")
    reader = open_reader(f"{bucket}/lasting")
    tasks = reader.plan(8)
    monkeypatch.setattr(remote, "_PATIENCE_S", 0.05)
    faults = []
    proxy(lambda method, path: faults[-1] if faults else None)
    for fault, told in (("AccessDenied", "Forbidden"), ("InternalError", "the store keeps failing: ")):
        faults.append(fault)
        with pytest.raises(ClipIndexError, match=rf"cannot read {bucket}/lasting/0\.parquet: {told}") as caught:
            list(reader.read(tasks[0]))
        assert "\n" not in str(caught.value)
    faults.clear()
    storage.remove(f"{bucket}/lasting/0.parquet")
    with pytest.raises(ClipIndexError, match=rf"cannot read {bucket}/lasting/0\.parquet: "):
        list(reader.read(tasks[0]))


def test_what_is_not_there_and_what_is_not_allowed(proxy, bucket, tmp_path, monkeypatch, capsys):  # noqa: F811
    fakes.use(monkeypatch)
    for source in ("s3://no-such-bucket/in", f"{bucket}/nothing-here"):
        with pytest.raises(UsageError, match=f"no such file or folder: {source}"):
            run(source, str(tmp_path / "out"))
    make_pictures(tmp_path / "in", 2)
    assert main(["embed", str(tmp_path / "in"), "s3://no-such-bucket/out"]) == 1
    assert "cannot write to s3://no-such-bucket/out" in capsys.readouterr().err
    proxy(lambda method, path: "AccessDenied")
    assert main(["embed", f"{bucket}/in", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{bucket}/in" in told and "no permission" in told
