from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
import warnings

import pytest
import webdataset

from clip_index import storage
from clip_index.readers import fetch, open_reader, sources
from clip_index.types import ClipIndexError, Task, UsageError


def write_tar(path, members, *, format=tarfile.USTAR_FORMAT, edit=lambda info: info):
    """A tar of (name, bytes) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(edit(info), io.BytesIO(data))
    return str(path)


def write_download(folder, shard="00000", n=4):
    """A tar as img2dataset writes it, with the table and the statistics beside it; sample 1 failed to download."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
        for i in range(n):
            caption = None if i == 2 else f"caption {i}"
            meta = {"caption": caption, "url": f"u{i}", "key": f"{shard}{i:04d}", "status": "success", "width": 8}
            meta |= {"error_message": None, "height": 8, "original_width": 80, "sha256": "0" * 64, "exif": "{}"}
            if i == 1:
                meta["status"] = "failed_to_download"
            else:
                sample = {"__key__": meta["key"], "jpg": f"picture {i}".encode(), "txt": caption or ""}
                writer.write({**sample, "json": json.dumps(meta, indent=4)})
            rows.append(meta)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")
    (folder / f"{shard}_stats.json").write_text('{"count": 4}')
    return str(folder / f"{shard}.tar")


def read(source, **options):
    """Every sample of a source."""
    reader = open_reader(str(source), input_format="webdataset", **options)
    samples = [sample for task in reader.plan(10) for sample in reader.read(task)]
    assert len({sample.key for sample in samples}) == len(samples)
    return samples


def test_a_download_of_img2dataset(tmp_path):
    path = write_download(tmp_path)
    reader = open_reader(str(tmp_path))
    assert reader.modalities == ("image", "text")
    assert reader.plan(1) == [Task(0, ((path, storage.size(path), "00000"),))]
    samples = list(reader.read(reader.plan(1)[0]))
    assert [(s.key, s.image, s.text, s.image_path) for s in samples] == [
        ("00000/000000000", b"picture 0", "caption 0", "000000000"),
        ("00000/000000002", b"picture 2", "", "000000002"),
        ("00000/000000003", b"picture 3", "caption 3", "000000003"),
    ]
    assert samples[0].meta == {
        "error_message": None,
        "exif": "{}",
        "meta_key": "000000000",
        "original_width": 80,
        "sha256": "0" * 64,
        "status": "success",
        "url": "u0",
    }
    for sample in samples:
        assert sample.source.startswith(f"{path}#") and fetch(sample.source) == sample.image


def test_keys_are_those_of_webdataset(tmp_path):
    names = ["0001.jpg", "./2.png", "a/0001.jpg", "a/0001.txt", "v1.0/b.c.jpg", "/abs/x.JPEG", "__skip__/4.jpg"]
    names += ["__meta__", "noext", "sp ace.webp", "é.jpg", "a/b/c.jpg"]
    path = write_tar(tmp_path / "x.tar", [(name, b"x") for name in names], format=tarfile.PAX_FORMAT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [sample["__key__"] for sample in webdataset.WebDataset(path, shardshuffle=False)]
    samples = read(path)
    assert len(expected) == 8
    assert [sample.image_path for sample in samples] == expected
    assert [sample.key for sample in samples] == [f"x/{key}" for key in expected]


def test_members_that_are_no_samples_are_skipped(tmp_path):
    def edit(info):
        info.type = tarfile.DIRTYPE if info.name == "dir.jpg" else tarfile.REGTYPE
        return info

    names = [
        "._0.jpg",
        "a/.hidden.jpg",
        "__meta__.json",
        "0.cls",
        "0.npy",
        "dir.jpg",
        "__info__/1.jpg",
        "1.jpg",
        "1.cls",
    ]
    path = write_tar(tmp_path / "x.tar", [(name, b"" if name == "dir.jpg" else b"x") for name in names], edit=edit)
    assert [sample.key for sample in read(path)] == ["x/1"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_and_foreign_names(tmp_path, format):
    long = "d" * 150 + "/" + "é" * 120
    path = write_tar(tmp_path / "x.tar", [(f"{long}.jpg", b"J"), (f"{long}.txt", b"T"), ("b.jpg", b"B")], format=format)
    samples = read(path)
    assert [(s.image_path, s.image, s.text) for s in samples] == [(long, b"J", "T"), ("b", b"B", "")]
    assert fetch(samples[0].source) == b"J"


def test_names_that_are_not_unicode(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("caf\udce9.jpg", b"1"), ("caf\\udce9.jpg", b"2")])
    samples = read(path)
    assert len(samples) == 2
    for sample in samples:
        assert (sample.key + sample.image_path).encode() and fetch(sample.source) == sample.image


def test_a_tar_cut_off_anywhere_gives_what_it_holds_and_one_failure(tmp_path):
    members = [(f"{i}.{kind}", f"{kind} {i} ".encode() * 90) for i in range(3) for kind in ("jpg", "json", "txt")]
    whole = storage.read_bytes(write_tar(tmp_path / "whole.tar", members))
    samples = read(tmp_path / "whole.tar")
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [info.offset_data + info.size for info in tar.getmembers() if info.name.endswith(".jpg")]
        end = tar.offset
    cut = tmp_path / "cut.tar"
    reader = open_reader(str(tmp_path / "whole.tar"))
    for length in sorted({*range(0, end + 512, 509), *range(0, end + 1, 512), *ends, *(e - 1 for e in ends)}):
        cut.write_bytes(whole[:length])
        found = list(reader.read(Task(0, ((str(cut), length, "whole"),))))
        kept = found if length > end else found[:-1]  # a part of the end mark will do
        assert [s.image for s in kept] == [s.image for s, e in zip(samples, ends, strict=True) if e <= length], length
        assert all(s.error is None for s in kept)
        if length <= end:
            error = found[-1].error
            assert found[-1].source == str(cut) and found[-1].key == "whole#damaged"
            assert error.startswith(f"{cut} is ") and (str(length) in error if length > 512 else True)


def test_a_sample_that_is_cut_off_before_its_picture_is_no_second_failure(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("0.txt", b"zero"), ("0.webp", b"0"), ("1.txt", b"one"), ("1.webp", bytes(2000))])
    path.write_bytes(path.read_bytes()[:5000])
    good, bad = read(path)
    assert (good.key, good.text, good.image) == ("x/0", "zero", b"0")
    assert bad.error == f"{path} is cut off at byte 5000, in 1.webp"


def test_a_damaged_header_ends_the_tar_with_a_failure(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{i}.jpg", b"x" * 100) for i in range(3)])
    data = bytearray(path.read_bytes())
    data[1024 + 148] ^= 1
    path.write_bytes(data)
    good, bad = read(path)
    assert good.key == "x/0" and bad.error.startswith(f"{path} is damaged at byte 1024: ")


def test_a_negative_size_ends_the_tar_with_a_failure(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("0.jpg", b"x" * 100), ("1.jpg", b"x" * 100)])
    data = bytearray(path.read_bytes())
    header = data[1024:1536]
    header[124:136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1024:1536] = header
    path.write_bytes(data)
    good, bad = read(path)
    assert good.key == "x/0" and "is damaged at byte 1024" in bad.error


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"", "is an empty file"), (b"no tar" * 200, "is not a tar"), (gzip.compress(bytes(2048)), "is cut off at byte")],
    ids=["empty", "text", "gzip"],
)
def test_what_is_no_tar_is_one_failed_sample(tmp_path, data, error):
    write_tar(tmp_path / "0.tar", [("0.jpg", b"x")])
    (tmp_path / "1.tar").write_bytes(data)
    write_tar(tmp_path / "2.tar", [("0.jpg", b"x")])
    samples = read(tmp_path)
    assert [(s.key, s.error is None) for s in samples] == [("0/0", True), ("1#damaged", False), ("2/0", True)]
    assert f"{tmp_path / '1.tar'} {error}" in samples[1].error


def test_a_tar_without_members_has_no_samples(tmp_path):
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", [("a.jpg", b"x")])
    assert [sample.key for sample in read(tmp_path)] == ["1/a"]


def test_repeated_keys_stay_distinct_rows(tmp_path):
    pairs = [("0.jpg", b"1"), ("0.txt", b"one"), ("0.jpg", b"2"), ("0.txt", b"two"), ("1.jpg", b"3"), ("0.jpg", b"4")]
    path = write_tar(tmp_path / "x.tar", [*pairs, ("0~2.jpg", b"5")])
    assert [(s.key, s.image_path, s.image, s.text) for s in read(path)] == [
        ("x/0", "0", b"1", "one"),
        ("x/0~2", "0", b"2", "two"),
        ("x/1", "1", b"3", ""),
        ("x/0~3", "0", b"4", ""),
        ("x/0~2~2", "0~2", b"5", ""),
    ]


def test_the_plain_suffix_goes_before_others(tmp_path):
    members = [("0.depth.png", b"d"), ("0.jpg", b"J"), ("0.seg.png", b"s"), ("0.alt.txt", b"a"), ("0.txt", b"T")]
    (sample,) = read(write_tar(tmp_path / "x.tar", members))
    assert (sample.image, sample.text) == (b"J", "T")
    (sample,) = read(write_tar(tmp_path / "y.tar", [("0.v2.jpg", b"J"), ("0.v2.txt", b"T")]))
    assert (sample.key, sample.image, sample.text) == ("y/0", b"J", "T")


def test_pictures_that_share_a_key_by_their_dots_are_reported(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"trip.{i}.jpg", b"%d" % i) for i in range(3)])
    first, rest = read(path)
    assert (first.key, first.image) == ("x/trip", b"0")
    assert rest.error.startswith("2 more pictures have the key 'trip', which ends at the first dot")


def test_a_caption_without_a_picture(tmp_path):
    members = [
        ("0.jpg", b"x"),
        ("0.txt", b"zero"),
        ("1.txt", b"one"),
        ("2.json", b"{}"),
        ("3.json", b'{"caption": "c"}'),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    assert [(s.key, s.error) for s in read(path)] == [("x/0", None), ("x/1", "no image"), ("x/3", "no image")]
    texts = read(path, modality="text")
    assert [(s.text, s.image, s.error) for s in texts] == [("zero", None, None), ("one", None, None), ("c", None, None)]
    assert [fetch(s.source) for s in texts] == [b"x", b"one", b'{"caption": "c"}']


def test_what_a_tar_holds_is_told_from_its_samples(tmp_path):
    def modalities(*members):
        return open_reader(write_tar(tmp_path / "x.tar", members)).modalities

    assert modalities(("0.jpg", b"x")) == ("image",)
    assert modalities(("0.txt", b"x")) == ("text",)
    assert modalities(("0.jpg", b"x"), ("0.txt", b"")) == ("image", "text")
    assert modalities(("0.png", b"x"), ("0.json", b'{"caption": "c"}')) == ("image", "text")
    assert modalities(("0.png", b"x"), ("0.json", b'{"caption": null}')) == ("image",)
    with pytest.raises(UsageError, match="no pictures or captions in"):
        modalities(("0.cls", b"1"))
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no pictures or captions in .*: .*x\.tar is an empty file"):
        open_reader(str(tmp_path / "x.tar"))


def test_empty_and_damaged_tars_do_not_hide_what_the_others_hold(tmp_path):
    write_tar(tmp_path / "0.tar", [])
    (tmp_path / "1.tar").write_bytes(b"")
    write_tar(tmp_path / "2.tar", [("0.jpg", b"x")])
    assert open_reader(str(tmp_path)).modalities == ("image",)


def test_a_caption_is_kept_where_pictures_alone_are_embedded(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"x"), ("0.txt", b"zero"), ("1.jpg", b"x")])
    assert [s.text for s in read(path, modality="image")] == ["zero", None]


def test_members_that_cannot_be_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "clip_index.readers.webdataset._LIMITS", {"image": 1 << 20, "text": 1 << 20, "sidecar": 1 << 20}
    )

    def edit(info):
        if info.name == "link.jpg":
            info.type, info.linkname = tarfile.LNKTYPE, "good.jpg"
        return info

    big = b"x" * ((1 << 20) + 1)
    members = [
        ("good.jpg", b"x"),
        ("link.jpg", b""),
        ("empty.png", b""),
        ("big.jpg", big),
        ("a.jpg", b"A"),
        ("a.txt", big),
    ]
    members += [("b.jpg", b"B"), ("b.json", big), ("c.jpg", b"C"), ("c.json", b"{")]
    path = write_tar(tmp_path / "x.tar", members, edit=edit)
    found = {s.image_path: s for s in read(path)}
    assert {name: s.error for name, s in found.items()} == {
        "good": None,
        "link": "the picture is a link to good.jpg, and links are not followed",
        "empty": "the picture is empty",
        "big": "the picture is larger than 1 MB",
        "a": "its caption is larger than 1 MB",
        "b": None,
        "c": None,
    }
    assert found["b"].meta == {"meta_error": "its sidecar is larger than 1 MB"}
    assert found["c"].meta["meta_error"].startswith("JSON sidecar: ")
    assert {s.image_path: s.error for s in read(path, modality="image")}["a"] is None


def test_sources_are_folders_paths_braces_and_globs(tmp_path, monkeypatch):
    for i in range(4):
        write_tar(tmp_path / "t" / f"{i:05d}.tar", [("0.jpg", b"%d" % i)])
    everything = [f"{i:05d}/0" for i in range(4)]
    monkeypatch.chdir(tmp_path)
    for source in ("t", f"{tmp_path}/t/*.tar", "t/{00000..00003}.tar", "t/0000[0-3].tar"):
        assert [s.key for s in read(source)] == everything
    assert [s.key for s in read("t/{00002,00000,00002}.tar")] == ["00002/0", "00000/0"]
    assert [s.key for s in read("t/00001.tar")] == ["00001/0"]


def test_tars_below_folders_have_keys_that_say_where(tmp_path):
    for name in ("a/0.tar", "b/0.tar", "b.tar", "b/c/0.tar"):
        write_tar(tmp_path / name, [("0.jpg", b"x"), ("0/0.jpg", b"y")])
    keys = ["a/0/0", "a/0/0/0", "b.tar/0", "b.tar/0/0", "b/0/0", "b/0/0/0", "b/c/0/0", "b/c/0/0/0"]
    assert [s.key for s in read(tmp_path)] == keys
    assert [s.key for s in read(f"{tmp_path}/b/**/*.tar")] == ["0/0", "0/0/0", "c/0/0", "c/0/0/0"]


def test_key_prefixes_never_let_two_files_make_one_key():
    for names, prefixes in (
        (["a.tar", "b/c.tar", "B.TAR"], ["a", "b/c", "B.TAR"]),
        (["a.tar", "a/b.tar"], ["a.tar", "a/b"]),
        (["a.tar", "a/b/c.tar"], ["a.tar", "a/b/c"]),
        (["a.tar", "a.tar.tar"], ["a", "a.tar.tar"]),
    ):
        assert list(map(sources.key_prefixes(names, ".tar"), names)) == prefixes


def test_missing_tars_are_named_before_any_work(tmp_path):
    write_tar(tmp_path / "00000.tar", [("0.jpg", b"x")])
    with pytest.raises(UsageError, match=r"no such file: .*00001\.tar \(2 of 3 are missing"):
        open_reader(f"{tmp_path}/{{00000..00002}}.tar")
    with pytest.raises(UsageError, match="nothing matches"):
        open_reader(f"{tmp_path}/x*.tar")
    with pytest.raises(UsageError, match="unbalanced braces"):
        open_reader(f"{tmp_path}/{{00000.tar")
    with pytest.raises(UsageError, match=r"no \.tar files in"):
        open_reader(str((tmp_path / "empty").mkdir() or tmp_path / "empty"), input_format="webdataset")


def test_a_tar_that_went_away_fails_its_task(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"x")])
    reader = open_reader(path)
    (task,) = reader.plan(10)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(ClipIndexError, match=r"cannot read .*x\.tar: No such file or directory"):
        list(reader.read(task))


def test_a_task_changes_with_its_tar(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"x")])
    (before,) = open_reader(path).plan(10)
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"x") for i in range(30)])
    (after,) = open_reader(path).plan(10)
    assert before.digest != after.digest


def test_a_reader_travels(tmp_path):
    reader = open_reader(write_tar(tmp_path / "x.tar", [("0.jpg", b"x")]))
    copy = pickle.loads(pickle.dumps(reader))
    assert copy == reader and copy.plan(3) == reader.plan(3)
    assert list(copy.read(copy.plan(3)[0])) == list(reader.read(reader.plan(3)[0]))


def test_remote_tars(tmp_path):
    root = "memory://test_readers_webdataset"
    for i in range(3):
        data = storage.read_bytes(write_tar(tmp_path / "x.tar", [(f"{j}.jpg", b"%d%d" % (i, j)) for j in range(2)]))
        storage.write_bytes(f"{root}/p/{i}.tar", data)
    for source in (root, f"{root}/p/{{0..2}}.tar", f"{root}/p/*.tar"):
        samples = read(source)
        assert [s.image for s in samples] == [b"00", b"01", b"10", b"11", b"20", b"21"]
        assert [fetch(s.source) for s in samples] == [s.image for s in samples]
    assert [s.key for s in read(root)][:2] == ["p/0/0", "p/0/1"]


@pytest.mark.parametrize(("members", "size", "limit"), [(24, 1 << 20, 5 << 20), (3000, 1, 3000 * 250)])
def test_memory_holds_one_member_not_the_tar(tmp_path, members, size, limit):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes(size)) for i in range(members)])
    reader = open_reader(path)
    (task,) = reader.plan(10)
    tracemalloc.start()
    try:
        count = sum(1 for _ in reader.read(task))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == members and peak < limit
