from __future__ import annotations

import os
import subprocess
import sys

import pytest
from s3_server import bucket  # noqa: F401 - a fixture

from clip_index import listing, remote, storage
from clip_index.types import ClipIndexError


@pytest.fixture(params=["local", "memory", "s3"])
def root(request, tmp_path):
    """A folder on each kind of storage."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{request.node.originalname}"
    return str(tmp_path) if request.param == "local" else f"memory://test_storage/{request.node.originalname}"


def test_files_are_written_listed_read_and_removed(root):
    for name, data in {
        "a/1.txt": b"0123456789",
        "a/b/2.TXT": b"",
        "c.jpg": b"x",
        "a/.h": b"x",
        ".d/3.txt": b"x",
    }.items():
        storage.write_bytes(storage.join(root, *name.split("/")), data)
    path = storage.join(root, "a", "1.txt")
    assert storage.list_files(root) == [("a/1.txt", 10), ("a/b/2.TXT", 0), ("c.jpg", 1)]
    assert storage.list_files(root, [".txt"]) == [("a/1.txt", 10), ("a/b/2.TXT", 0)]
    assert storage.list_names(root) == [".d", "a", "c.jpg"]
    assert storage.exists(path) and storage.size(path) == 10 and not storage.is_folder(path)
    assert storage.is_folder(root) and not storage.exists(storage.join(root, "no"))
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.read_bytes(path, 3, 4) == b"3456"
    assert storage.read_bytes(path, 8) == b"89"
    assert storage.read_bytes(path, 8, 10) == b"89"
    assert storage.read_bytes(path, 3, 0) == b""
    assert storage.read_bytes(storage.join(root, "a", "b", "2.TXT")) == b""
    assert storage.read_source(storage.range_source(path, 2, 3)) == b"234"
    with storage.open_read(path) as file:
        file.seek(4)
        assert file.read(2) == b"45"
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)


def test_a_file_appears_whole_or_not_at_all(root):
    target = storage.join(root, "file")
    storage.write_bytes(target, b"old")
    with pytest.raises(ZeroDivisionError), storage.open_atomic(target) as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert storage.read_bytes(target) == b"old" and storage.list_names(root) == ["file"]
    with storage.open_atomic(target) as file:
        file.write(b"new")
        assert storage.read_bytes(target) == b"old"
    assert storage.read_bytes(target) == b"new" and storage.list_names(root) == ["file"]


def test_the_sizes_of_what_lies_in_a_folder(root):
    for name, data in (("a", b""), ("b.npy", b"xy"), ("deeper/c", b"z")):
        storage.write_bytes(storage.join(root, "some", name), data)
    assert {name: size for name, size in storage.list_sizes(f"{root}/some") if name != "deeper"} == {"a": 0, "b.npy": 2}
    assert list(storage.list_sizes(f"{root}/none")) == []


def test_patterns_expand_to_files(root):
    for name in ("0", "1", "2", "10"):
        storage.write_bytes(storage.join(root, f"{name}.tar"), b"x")

    def expand(pattern):
        return [path.rsplit("/", 1)[-1] for path in storage.expand(f"{root}/{pattern}")]

    assert expand("1.tar") == ["1.tar"]
    assert expand("{2,0..1}.tar") == ["2.tar", "0..1.tar"]
    assert expand("{0..2}.tar") == ["0.tar", "1.tar", "2.tar"]
    assert expand("*.tar") == ["0.tar", "1.tar", "10.tar", "2.tar"]
    assert expand("{2,1}*.tar") == ["2.tar", "1.tar", "10.tar"]
    assert all(storage.read_bytes(path) == b"x" for path in storage.expand(f"{root}/*.tar"))
    with pytest.raises(ClipIndexError, match=r"nothing matches .*x\*\.tar"):
        expand("x*.tar")


def test_a_name_with_magic_characters_is_itself_where_it_exists(tmp_path):
    for name in ("a[1].tar", "{b}.tar", "c[0]2.tar"):
        (tmp_path / name).write_bytes(b"x")
    assert storage.expand(f"{tmp_path}/a[1].tar") == [f"{tmp_path}/a[1].tar"]
    assert storage.expand(f"{tmp_path}/{{b}}.tar") == [f"{tmp_path}/{{b}}.tar"]
    assert storage.expand(f"{tmp_path}/c[0]{{2,2}}.tar") == [f"{tmp_path}/c[0]2.tar"] * 2


def test_paths():
    assert storage.absolute("~") == os.path.expanduser("~")
    assert storage.absolute("a/../b/") == os.path.join(os.getcwd(), "b")
    assert storage.absolute("file:///a/b") == "/a/b"
    assert storage.absolute("s3://a/b/") == "s3://a/b"
    assert storage.join("s3://a/", "b", "c") == "s3://a/b/c"
    assert storage.is_url("memory://x") and not storage.is_url("C:/x") and not storage.is_url("/a://b")


def test_a_relative_target_is_written_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("file", b"x")
    assert os.listdir(tmp_path) == ["file"]


def test_sources_name_any_path(tmp_path):
    for name in (b"plain.jpg", b"with #5+3.jpg", b"100%41.jpg", b"caf\xe9 #1.jpg"):
        path = os.fsdecode(os.path.join(os.fsencode(str(tmp_path)), name))
        try:
            with open(path, "wb") as file:
                file.write(b"0123456789")
        except OSError:  # a file system that takes no such name needs no source for it
            continue
        whole, part = storage.file_source(path), storage.range_source(path, 4, 2)
        assert (whole + part).encode()
        assert storage.source_path(whole) == path
        assert storage.read_source(whole) == b"0123456789" and storage.read_source(part) == b"45"


def test_links_are_followed_once_and_broken_ones_listed(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "file").write_bytes(b"xy")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "z" / "up").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "link").symlink_to(tmp_path / "z" / "file")
    os.mkfifo(tmp_path / "pipe")
    assert storage.list_files(str(tmp_path)) == [("gone", 0), ("link", 2), ("self", 0), ("z/file", 2)]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ClipIndexError, match=r"cannot list .*locked: Permission denied"):
        storage.list_files(str(tmp_path))


def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    script = "import os, sys; from clip_index import storage; storage.Spool(sys.argv[1]); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=False)
    (left,) = os.listdir(tmp_path)
    spool = storage.Spool(str(tmp_path / "file"))
    assert storage.list_files(str(tmp_path)) == [] and len(os.listdir(tmp_path)) == 2
    storage.remove_temporaries(str(tmp_path))
    assert os.listdir(tmp_path) == [os.path.basename(spool.path)] != [left]
    spool.discard()
    assert os.listdir(tmp_path) == []


def test_a_new_file_replaces_none(root):
    target = storage.join(root, "file")
    assert storage.write_new(target, b"first")
    assert not storage.write_new(target, b"second")
    assert storage.read_bytes(target) == b"first" and storage.list_names(root) == ["file"]


def test_a_listing_of_many_pages_of_s3_is_that_of_a_folder(bucket, tmp_path, monkeypatch):  # noqa: F811
    pages, answers = listing._s3_pages, []

    def short_pages(folder, **options):
        for page in pages(folder, **{"MaxKeys": 3, **options}):
            answers.append(page)
            yield page

    monkeypatch.setattr(listing, "_s3_pages", short_pages)
    names = ["0", "a b+c.txt", "a/1", "a/2", "a/b/3", "a0", "a/.hidden", ".h/4", "ä/é&<5>.txt", "z"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * number)
        storage.write_bytes(f"{bucket}/pages/{name}", b"x" * number)
    assert storage.list_files(f"{bucket}/pages") == storage.list_files(str(tmp_path))
    assert len(answers) == 4 and "LastModified" not in answers[-1]["Contents"][0]
    assert storage.list_names(f"{bucket}/pages") == storage.list_names(str(tmp_path))
    assert storage.is_folder(f"{bucket}/pages/a/b") and storage.is_folder(bucket)
    assert not storage.is_folder(f"{bucket}/pages/a b") and not storage.is_folder("s3://no-such-bucket")
    shared, name = remote.filesystem(f"{bucket}/pages")
    assert all("LastModified" in item for item in shared.find(name, detail=True).values())


def test_a_store_that_shows_what_is_half_written_gets_files_by_a_rename(monkeypatch):
    target, seen = "memory://test_storage_rename/file", []
    shared = type(remote.filesystem(target)[0])
    put_file, mv = shared.put_file, shared.mv
    monkeypatch.setattr(shared, "put_file", lambda fs, path, name: seen.append(name) or put_file(fs, path, name))
    monkeypatch.setattr(shared, "mv", lambda fs, name, to: seen.append(to) or mv(fs, name, to))
    for data in (b"first", b"second"):
        storage.write_bytes(target, data)
        assert storage.read_bytes(target) == data and storage.list_names("memory://test_storage_rename") == ["file"]
    assert [name.endswith(".tmp") for name in seen] == [True, False] * 2 and seen[1] == "/test_storage_rename/file"
