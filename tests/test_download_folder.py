"""What counts as finished in the folder of a download, and what is removed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from clip_index.download_folder import DownloadFolder, reasons
from clip_index.types import UsageError


def make_shard(folder: Path, shard: int, *, count: int = 3, **status: int) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 700
        tar.addfile(info, io.BytesIO(b"x" * 700))
    (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    status = status or {"success": count}
    stats = {"count": count, "successes": status.get("success", 0), "status_dict": status, "duration": 1.0}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder / f"{shard:05d}.tar"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_cut_off_is_removed(tmp_path):
    make_shard(tmp_path, 0)
    make_shard(tmp_path, 1)
    truncated = make_shard(tmp_path, 2)
    truncated.write_bytes(truncated.read_bytes()[:1300])
    make_shard(tmp_path, 3)
    (tmp_path / "00003_stats.json").write_text('{"count": 3, "succ')
    make_shard(tmp_path, 4)
    (tmp_path / "00004_stats.json").unlink()
    make_shard(tmp_path, 5).unlink()
    (tmp_path / "_tmp").mkdir()
    (tmp_path / "_tmp" / "4.feather").write_bytes(b"")
    (tmp_path / "notes.md").write_text("mine")
    folder = DownloadFolder(str(tmp_path), "webdataset")
    assert folder.finished() == {shard: {"count": 3, "successes": 3, "status": {"success": 3}} for shard in (0, 1)}
    folder.remove_unfinished()
    kept = [f"0000{shard}{suffix}" for shard in (0, 1) for suffix in (".parquet", ".tar", "_stats.json")]
    assert names(tmp_path) == [*kept, "notes.md"]


def test_a_shard_of_files_is_a_folder(tmp_path):
    for shard in (0, 1):
        make_shard(tmp_path, shard).unlink()
        (tmp_path / f"0000{shard}").mkdir()
        (tmp_path / f"0000{shard}" / "0.jpg").write_bytes(b"x")
    (tmp_path / "00001_stats.json").unlink()
    folder = DownloadFolder(str(tmp_path), "files")
    folder.remove_unfinished()
    assert names(tmp_path) == ["00000", "00000.parquet", "00000_stats.json"]


def test_everything_of_a_download_can_be_removed(tmp_path):
    make_shard(tmp_path, 0)
    folder = DownloadFolder(str(tmp_path), "webdataset")
    folder.mark({"shards": 1})
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    assert folder.finished() and folder.marker() == {"shards": 1}
    folder.remove_all()
    assert names(tmp_path) == ["photo.jpg"]
    assert (folder.finished(), folder.marker()) == ({}, {})


def test_shards_are_read_once(tmp_path):
    make_shard(tmp_path, 0)
    folder = DownloadFolder(str(tmp_path), "webdataset")
    assert folder.finished()
    (tmp_path / "00000_stats.json").write_text("")
    assert folder.finished()
    assert not DownloadFolder(str(tmp_path), "webdataset").finished()


def test_folders_that_are_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        DownloadFolder(str(tmp_path / "file"), "webdataset")
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds other files \(data.json\)"):
        DownloadFolder(str(tmp_path), "webdataset")
    assert DownloadFolder(str(tmp_path / "new"), "webdataset").finished() == {}
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "00000.tar").write_bytes(b"of another program")
    with pytest.raises(UsageError, match=r"holds other files \(00000.tar\)"):
        DownloadFolder(str(tmp_path / "others"), "webdataset")


def test_failures_of_the_same_kind_are_counted_together(tmp_path):
    make_shard(tmp_path, 0, count=9, **{"success": 2, "HTTP Error 404: Not Found": 3, "<urlopen error timed out>": 1})
    make_shard(
        tmp_path, 1, count=4,
        **{"HTTP Error 404: Not Found": 1, "<urlopen error [Errno -2] Name or service not known>": 1,
           "cannot identify <_io.BytesIO object at 0x7f01>": 1, "cannot identify <_io.BytesIO object at 0x7f02>": 1},
    )  # fmt: skip
    assert reasons(DownloadFolder(str(tmp_path), "webdataset").finished()) == {
        "HTTP Error 404: Not Found": 4,
        "timed out": 1,
        "could not be written": 3,
        "Name or service not known": 1,
        "cannot identify <_io.BytesIO object at ...>": 2,
    }
