from __future__ import annotations

import json
import os
import pickle

import pytest

from clip_index import storage
from clip_index.readers import fetch, files, open_reader, sources
from clip_index.types import Task, UsageError


def write(folder, **contents):
    """Files below a folder from {name: bytes or str}; a name may have folders."""
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(folder)


def read(source, rows_per_shard=1000, **options):
    """Every sample of a source, by key."""
    reader = open_reader(str(source), input_format="files", **options)
    samples = [sample for task in reader.plan(rows_per_shard) for sample in reader.read(task)]
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample for sample in samples}


def test_pictures_come_with_their_captions_and_sidecars(tmp_path):
    write(tmp_path, **{"a.jpg": b"A", "a.txt": " a dog \n", "a.json": '{"url": "u"}', "sub/b.png": b"B"})
    found = read(tmp_path)
    assert list(found) == ["a.jpg", "sub/b.png"]
    a, b = found.values()
    assert (a.image, a.text, a.meta, a.error) == (b"A", "a dog", {"url": "u"}, None)
    assert a.image_path == a.source == str(tmp_path / "a.jpg")
    assert (b.image, b.text, b.meta) == (b"B", "", {})
    assert fetch(b.source) == b"B"


def test_suffixes_match_in_any_letter_case(tmp_path):
    names = ["1.JPG", "2.Jpeg", "3.png", "4.WebP", "5.bmp", "6.gif", "7.TIFF", "8.tif"]
    write(tmp_path, **dict.fromkeys(names, b"x"), **{"1.TXT": "one", "1.Json": '{"n": 1}', "9.heic": b"x"})
    found = read(tmp_path)
    assert list(found) == names
    assert (found["1.JPG"].text, found["1.JPG"].meta) == ("one", {"n": 1})


def test_a_caption_belongs_to_the_whole_stem_in_the_same_folder(tmp_path):
    write(
        tmp_path,
        **{"a.b.jpg": b"x", "a.b.txt": "dots", "a.txt": "not this", "été 1.jpg": b"x", "été 1.txt": "spaces"},
        **{"u/a.b.jpg": b"x", "u/a.b.txt": "folder", "both.jpg": b"x", "both.png": b"y", "both.txt": "shared"},
    )
    assert {key: sample.text for key, sample in read(tmp_path).items()} == {
        "a.b.jpg": "dots",
        "both.jpg": "shared",
        "both.png": "shared",
        "u/a.b.jpg": "folder",
        "été 1.jpg": "spaces",
    }


def test_names_that_are_not_unicode_keep_their_rows_and_can_be_fetched(tmp_path):
    folder = os.fsencode(str(tmp_path))
    try:
        for name, data in {b"caf\xe9.jpg": b"1", b"caf\\udce9.jpg": b"2", b"caf\xe9.txt": b"coffee"}.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    reader = open_reader(str(tmp_path))
    (task,) = reader.plan(10)
    assert json.loads(json.dumps(task.inputs)) == [list(item) for item in task.inputs] and task.digest
    samples = list(reader.read(task))
    assert sorted(sample.image for sample in samples) == [b"1", b"2"]
    assert sorted(sample.text for sample in samples) == ["", "coffee"]
    assert len({sample.key for sample in samples}) == 2
    for sample in samples:
        assert (sample.key + sample.image_path + sample.source).encode()
        assert fetch(sample.source) == sample.image


def test_folders_behind_links_are_read_once_and_loops_end(tmp_path):
    write(tmp_path, **{"in/z/real.jpg": b"x", "out/other.jpg": b"y"})
    root = tmp_path / "in"
    (root / "a_link").symlink_to(root / "z")
    (root / "z" / "loop").symlink_to(root)
    (root / "outside").symlink_to(tmp_path / "out")
    assert list(read(root)) == ["outside/other.jpg", "z/real.jpg"]


def test_a_relative_path_gives_absolute_sources(tmp_path, monkeypatch):
    write(tmp_path, **{"p/a.jpg": b"A"})
    monkeypatch.chdir(tmp_path)
    assert read("p")["a.jpg"].source == str(tmp_path / "p" / "a.jpg")


@pytest.mark.parametrize(("name", "text"), [("a.jpg", "own"), ("odd.heic", "odd"), ("b.txt", "alone")])
def test_one_file_is_a_source(tmp_path, name, text):
    write(tmp_path, **{"a.jpg": b"A", "a.txt": "own", "ab.jpg": b"B", "b.txt": "alone", "odd.heic": b"O"})
    write(tmp_path, **{"odd.txt": "odd", "b.json": '{"n": 1}'})
    found = read(tmp_path / name)
    assert {key: sample.text for key, sample in found.items()} == {name: text}
    assert found[name].meta == ({"n": 1} if name == "b.txt" else {})


def test_what_cannot_be_read_is_a_failed_sample(tmp_path, monkeypatch):
    write(tmp_path, **{"empty.jpg": b"", "gone.jpg": b"x", "good.jpg": b"x", "locked.jpg": b"x", "turned.jpg": b"x"})
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    reader = open_reader(str(tmp_path))
    (task,) = reader.plan(10)
    (tmp_path / "gone.jpg").unlink()
    (tmp_path / "turned.jpg").unlink()
    (tmp_path / "turned.jpg").mkdir()
    read_bytes = storage.read_bytes

    def guarded(path, *args):
        if path.endswith("locked.jpg"):
            raise PermissionError(13, "Permission denied")
        return read_bytes(path, *args)

    monkeypatch.setattr(storage, "read_bytes", guarded)
    found = {sample.key: sample for sample in reader.read(task)}
    assert task.rows == len(found) == 7
    assert found.pop("good.jpg").error is None
    assert all(sample.image is None and sample.text is None for sample in found.values())
    errors = {key: sample.error for key, sample in found.items()}
    assert errors["empty.jpg"] == "the file is empty"
    assert errors["gone.jpg"] == errors["broken.jpg"] == "cannot read the file: No such file or directory"
    assert errors["locked.jpg"] == "cannot read the file: Permission denied"
    assert errors["turned.jpg"] == "the file is no regular file"
    assert "symbolic link" in errors["itself.jpg"]


def test_pipes_are_not_opened_and_folders_named_like_pictures_are_walked(tmp_path):
    write(tmp_path, **{"album.jpg/a.jpg": b"A"})
    os.mkfifo(tmp_path / "pipe.jpg")
    assert list(read(tmp_path)) == ["album.jpg/a.jpg"]


def test_a_picture_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 1 << 20)
    write(tmp_path, **{"a.jpg": b"x" * (1 << 20), "b.jpg": b"x" * ((1 << 20) + 1)})
    found = read(tmp_path)
    assert found["a.jpg"].error is None
    assert found["b.jpg"].error == "the file is larger than 1 MB"


@pytest.mark.parametrize(
    "data",
    ["un café \u2018chaud\u2019".encode(enc) for enc in ("utf-8", "utf-8-sig", "utf-16", "cp1252")],
    ids=["utf-8", "with BOM", "utf-16", "windows"],
)
def test_captions_in_common_encodings(tmp_path, data):
    write(tmp_path, **{"a.jpg": b"x", "a.txt": data})
    assert read(tmp_path)["a.jpg"].text == "un café \u2018chaud\u2019"


def test_latin_1_captions(tmp_path):
    write(tmp_path, **{"a.jpg": b"x", "a.txt": b"caf\xe9 \x81\n"})
    assert read(tmp_path)["a.jpg"].text == "café \x81"


def test_captions_alone_are_samples(tmp_path):
    write(tmp_path, **{"a.txt": "one", "a.TXT": "two", "b/c.txt": "", "b/c.json": '{"n": 1}'})
    reader = open_reader(str(tmp_path))
    assert reader.modalities == ("text",)
    found = read(tmp_path)
    assert {key: sample.text for key, sample in found.items()} == {"a.TXT": "two", "a.txt": "one", "b/c.txt": ""}
    assert found["a.txt"].image is None and found["a.txt"].image_path == str(tmp_path / "a.txt")
    assert found["b/c.txt"].meta == {"n": 1}


def test_a_text_without_a_picture_is_no_sample_among_pictures(tmp_path):
    write(tmp_path, **{"a.jpg": b"x", "README.txt": "about"})
    assert open_reader(str(tmp_path)).modalities == ("image",)
    found = read(tmp_path)
    assert list(found) == ["a.jpg"] and found["a.jpg"].text is None


def test_modalities(tmp_path):
    write(tmp_path, **{"a.jpg": b"A", "a.txt": "one", "b.jpg": b"B"})
    assert open_reader(str(tmp_path)).modalities == ("image", "text")
    assert open_reader(str(tmp_path), modality="text,image").modalities == ("image", "text")
    picture = read(tmp_path, modality="image")
    assert [(s.image, s.text) for s in picture.values()] == [(b"A", "one"), (b"B", None)]
    text = read(tmp_path, modality="text")
    assert [(s.image, s.text) for s in text.values()] == [(None, "one"), (None, "")]
    assert text["a.jpg"].image_path == str(tmp_path / "a.jpg")


def test_a_modality_that_is_not_there_is_refused(tmp_path):
    folder = write(tmp_path, **{"a.jpg": b"A", "notes.txt": "none of a's"})
    with pytest.raises(UsageError, match=r"no captions in .* asks for them .*\.txt with the picture's name"):
        open_reader(folder, modality="image,text")
    with pytest.raises(UsageError, match=r"no pictures in .*modality image asks"):
        open_reader(str(tmp_path / "notes.txt"), modality="image")
    (tmp_path / "a.jpg").rename(tmp_path / "a.dat")
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(UsageError, match="no pictures or captions in"):
        open_reader(folder, input_format="files")
    with pytest.raises(UsageError, match="no such file"):
        open_reader(folder + "/nothing", input_format="files")


def test_captions_may_lie_in_the_sidecars(tmp_path):
    write(tmp_path, **{"a.jpg": b"A", "a.json": '{"caption": " from json ", "n": 1}', "b.jpg": b"B"})
    assert open_reader(str(tmp_path)).modalities == ("image", "text")
    found = read(tmp_path)
    assert (found["a.jpg"].text, found["a.jpg"].meta) == ("from json", {"n": 1})
    assert found["b.jpg"].text == ""


def test_an_unreadable_caption_fails_a_pair_but_not_a_picture(tmp_path):
    write(tmp_path, **{"a.jpg": b"A", "b.jpg": b"B", "b.txt": "b"})
    (tmp_path / "a.txt").symlink_to("nowhere")
    assert read(tmp_path)["a.jpg"].error == "cannot read its caption: No such file or directory"
    assert read(tmp_path, modality="image")["a.jpg"].image == b"A"


def test_sidecars_become_flat_columns(tmp_path):
    sidecar = {
        "caption": "not used",
        "width": 5,
        "height": 6,
        "key": "0001",
        "meta_key": 2,
        "similarity": 0.3,
        "tags": ["é", {"x": 1}],
        "ok": True,
        "none": None,
        "score": 1.5,
        "half": "\ud83d!",
        "smile": "\U0001f600",
    }
    text = json.dumps(sidecar)[:-1] + ', "nan": NaN, "inf": 1e999, "deep": [NaN, 1]}'
    write(tmp_path, **{"a.jpg": b"A", "a.txt": "used", "a.json": text})
    meta = read(tmp_path)["a.jpg"].meta
    assert meta == {
        "deep": "[null, 1]",
        "half": "\ufffd!",
        "inf": None,
        "meta_key": 2,
        "meta_meta_key": "0001",
        "meta_similarity": 0.3,
        "nan": None,
        "none": None,
        "ok": True,
        "score": 1.5,
        "smile": "\U0001f600",
        "tags": '["é", {"x": 1}]',
    }
    assert read(tmp_path)["a.jpg"].text == "used"
    only_text = read(tmp_path, modality="text")["a.jpg"].meta
    assert (only_text["meta_width"], only_text["meta_height"]) == (5, 6)


def test_a_caption_that_is_no_text_is_a_column(tmp_path):
    write(
        tmp_path,
        **{"a.jpg": b"A", "a.json": '{"caption": ["one", "two"]}', "b.jpg": b"B", "b.json": '{"caption": null}'},
    )
    found = read(tmp_path)
    assert (found["a.jpg"].text, found["a.jpg"].meta) == (None, {"meta_caption": '["one", "two"]'})
    assert (found["b.jpg"].text, found["b.jpg"].meta) == (None, {})


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe\xff", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"])
def test_a_broken_sidecar_keeps_the_picture_and_says_so(tmp_path, data):
    write(tmp_path, **{"a.jpg": b"A", "a.json": data})
    sample = read(tmp_path)["a.jpg"]
    assert sample.image == b"A" and sample.error is None
    assert list(sample.meta) == ["meta_error"] and sample.meta["meta_error"].startswith("JSON sidecar: ")


def test_a_sidecar_that_cannot_be_read_keeps_the_picture_and_says_so(tmp_path):
    write(tmp_path, **{"a.jpg": b"A"})
    (tmp_path / "a.json").symlink_to("nowhere")
    assert read(tmp_path)["a.jpg"].meta == {"meta_error": "cannot read its sidecar: No such file or directory"}


def test_plan_cuts_the_sorted_names(tmp_path):
    write(tmp_path, **{f"{name}.jpg": name.encode() for name in "ecbda"}, **{"a.txt": "12345", "a.json": "{}"})
    tasks = open_reader(str(tmp_path)).plan(2)
    none = (None, 0, None, 0)
    assert tasks == [
        Task(0, (("a.jpg", 1, ".txt", 5, ".json", 2), ("b.jpg", 1, *none)), 2),
        Task(1, (("c.jpg", 1, *none), ("d.jpg", 1, *none)), 2),
        Task(2, (("e.jpg", 1, *none),), 1),
    ]
    with pytest.raises(UsageError, match="rows_per_shard must be at least 1, not 0"):
        open_reader(str(tmp_path)).plan(0)


def test_a_task_changes_with_its_files(tmp_path):
    def digest():
        (task,) = open_reader(str(tmp_path)).plan(10)
        return task.digest

    write(tmp_path, **{"a.jpg": b"A", "a.txt": "one"})
    seen = [digest(), digest()]
    assert seen[0] == seen[1]
    for change in ({"a.jpg": b"AA"}, {"a.txt": "three"}, {"a.json": "{}"}, {"b.jpg": b"B"}):
        write(tmp_path, **change)
        seen.append(digest())
    assert len(set(seen)) == 5


def test_a_reader_travels_without_its_listing(tmp_path):
    write(tmp_path, **{f"{i}.jpg": b"x" for i in range(200)})
    reader = open_reader(str(tmp_path))
    data = pickle.dumps(reader)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy == reader and copy.plan(7) == reader.plan(7)
    assert [s.key for s in copy.read(reader.plan(7)[1])] == [item[0] for item in reader.plan(7)[1].inputs]


def test_a_remote_folder():
    root = "memory://test_readers_files"
    for i in range(70):
        storage.write_bytes(f"{root}/{i:02d}.jpg", bytes([i]) if i != 50 else b"")
        storage.write_bytes(f"{root}/{i:02d}.txt", str(i).encode())
    found = read(root)
    assert list(found) == [f"{i:02d}.jpg" for i in range(70)]
    assert found["69.jpg"].image == bytes([69]) and found["69.jpg"].text == "69"
    assert found["69.jpg"].source == f"{root}/69.jpg" and fetch(found["69.jpg"].source) == bytes([69])
    assert found["50.jpg"].error == "the file is empty"
    assert list(read(f"{root}/07.jpg")) == ["07.jpg"]


def test_a_remote_store_that_fails_stops_the_task(monkeypatch):
    storage.write_bytes("memory://test_readers_fail/a.jpg", b"x")
    reader = open_reader("memory://test_readers_fail")
    (task,) = reader.plan(10)

    def fail(*_):
        raise OSError("connection reset")

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(sources.ClipIndexError, match=r"cannot read memory://test_readers_fail/a.jpg: connection reset"):
        list(reader.read(task))


def test_pairing_is_a_function_of_the_listing():
    listing = [("a.PNG", 3), ("a.json", 2), ("a.txt", 1), ("b.txt", 4)]
    assert files.pair(listing) == [("a.PNG", 3, ".txt", 1, ".json", 2)]
    assert files.pair(listing[1:]) == [("a.txt", 1, ".txt", 1, ".json", 2), ("b.txt", 4, ".txt", 4, None, 0)]
