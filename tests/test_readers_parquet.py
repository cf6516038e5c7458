from __future__ import annotations

import datetime
import decimal
import json
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_index import storage
from clip_index.readers import fetch, open_reader, schema
from clip_index.readers.parquet import cut, pack
from clip_index.types import ClipIndexError, SampleError, Task, UsageError

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_table(path, columns, *, rows=None, types=None, **options):
    """A parquet file of named lists; `rows` to a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [pa.array(values, (types or {}).get(name)) for name, values in columns.items()]
    pq.write_table(pa.table(fields, names=list(columns)), path, row_group_size=rows, **options)
    return str(path)


def read(source, rows_per_shard=1000, **options):
    """Every sample of a source."""
    reader = open_reader(str(source), **options)
    tasks = reader.plan(rows_per_shard)
    samples = [sample for task in tasks for sample in reader.read(task)]
    assert len({sample.key for sample in samples}) == len(samples) == sum(task.rows for task in tasks)
    return samples


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), HUGGING_FACE], ids=str)
def test_pictures_as_bytes(tmp_path, kind):
    pictures = [b"A", None, b"C", b""]
    if kind == HUGGING_FACE:
        pictures = [None if data is None else {"bytes": data, "path": f"{data.decode()}.png"} for data in pictures]
    columns = {"image": pictures, "text": [" a dog ", "no picture", None, "empty"], "url": list("abcd")}
    path = write_table(tmp_path / "t.parquet", columns, types={"image": kind})
    assert open_reader(path).modalities == ("image", "text")
    samples = read(path)
    assert [(s.key, s.image, s.text, s.error) for s in samples] == [
        ("t/0", b"A", "a dog", None),
        ("t/1", None, None, "no image"),
        ("t/2", b"C", "", None),
        ("t/3", None, None, "the picture is empty"),
    ]
    names = ["A.png", "t/1", "C.png", ".png"] if kind == HUGGING_FACE else [s.key for s in samples]
    assert [s.image_path for s in samples] == names
    assert samples[0].source == f"{path}#row=0&column=image" and samples[0].meta == {"url": "a"}
    assert [fetch(s.source) for s in samples if s.image] == [b"A", b"C"]
    for s in samples[1::2]:
        with pytest.raises(ClipIndexError):
            fetch(s.source)


def test_a_parquet_download_of_img2dataset(tmp_path):
    columns = {
        "url": ["u0", "u1"],
        "caption": ["zero", "one"],
        "key": ["0000", "0001"],
        "status": ["success", "failed"],
    }
    columns |= {"error_message": [None, "404"], "width": [8, None], "height": [9, None], "jpg": [b"J", None]}
    write_table(tmp_path / "00000.parquet", columns)
    (tmp_path / "00000_stats.json").write_text("{}")
    good, bad = read(tmp_path)
    assert (good.key, good.image, good.text) == ("00000/0", b"J", "zero")
    assert good.meta == {"error_message": None, "meta_key": "0000", "status": "success", "url": "u0"}
    assert bad.error == "no image"


def test_pictures_as_paths(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.jpg").write_bytes(b"A")
    (tmp_path / "b.jpg").write_bytes(b"B")
    storage.write_bytes("memory://test_readers_parquet/c.jpg", b"C")
    paths = [
        "../pics/a.jpg",
        str(tmp_path / "b.jpg"),
        f"file://{tmp_path}/b.jpg",
        "memory://test_readers_parquet/c.jpg",
    ]
    bad = ["gone.jpg", None, "http://host/x.jpg", "HTTPS://host/x.jpg", "pipe:cat x", "ftp://host/x", "../pics"]
    bad += ["simplecache::http://host/x.jpg", "s3::http://host/x", "memory://a::http://host/x"]
    columns = {"image_path": paths + bad, "caption": [f"c{i}" for i in range(len(paths + bad))]}
    path = write_table(tmp_path / "tables" / "t.parquet", columns)
    samples = read(path)
    assert [s.image for s in samples[:4]] == [b"A", b"B", b"B", b"C"]
    assert [s.image_path for s in samples[:4]] == paths
    expected = [str(tmp_path / "pics" / "a.jpg"), str(tmp_path / "b.jpg"), str(tmp_path / "b.jpg"), paths[3]]
    assert [s.source for s in samples[:4]] == expected
    assert [fetch(s.source) for s in samples[:4]] == [b"A", b"B", b"B", b"C"]
    errors = [s.error for s in samples[4:]]
    assert errors[:2] == ["cannot read gone.jpg: No such file or directory", "no image"]
    assert errors[2] == "http://host/x.jpg is on the web, and is not fetched from here: run clip-index download first"
    assert "on the web" in errors[3] and errors[6] == "../pics is no regular file"
    assert all("is not a path, nor a URL" in error for error in [*errors[4:6], *errors[7:]])
    assert all(s.text is None and s.image is None for s in samples[4:])


def test_a_path_in_a_struct_without_bytes_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    path = write_table(
        tmp_path / "t.parquet", {"image": [{"bytes": None, "path": "a.jpg"}]}, types={"image": HUGGING_FACE}
    )
    (sample,) = read(path)
    assert (sample.image, sample.image_path, sample.source) == (b"A", "a.jpg", str(tmp_path / "a.jpg"))
    assert fetch(f"{path}#row=0&column=image") == b"A"


@pytest.mark.parametrize(
    "path", ["simplecache::http://h/x", "zip://x::http://h/x", "github://a:b@c/x", "PIPE:x", "hf://x"]
)
def test_tables_may_not_make_this_machine_call_others(path):
    with pytest.raises(SampleError):
        schema.locate(path, "/data/t.parquet")


def test_captions_alone(tmp_path):
    path = write_table(tmp_path / "t.parquet", {"TEXT": ["one", None], "n": [1, 2], "width": [3, 4]})
    assert open_reader(path).modalities == ("text",)
    one, null = read(path)
    assert (one.key, one.text, one.image, one.image_path) == ("t/0", "one", None, "t/0")
    assert one.meta == {"n": 1, "meta_width": 3} and null.text == ""
    with pytest.raises(ClipIndexError, match="is a caption without a picture"):
        fetch(one.source)


def test_text_alone_from_a_table_with_pictures_reads_no_picture(tmp_path):
    struct = [{"bytes": b"A", "path": "a.png"}, {"bytes": None, "path": None}]
    path = write_table(tmp_path / "t.parquet", {"image": struct, "text": ["x", "y"]}, types={"image": HUGGING_FACE})
    x, y = read(path, modality="text")
    assert (x.text, x.image, x.image_path, y.text, y.error) == ("x", None, "a.png", "y", None)
    assert fetch(x.source) == b"A"
    web = write_table(tmp_path / "w.parquet", {"image": ["http://host/a.jpg"], "text": ["x"]})
    (sample,) = read(web, modality="text")
    assert (sample.text, sample.error, sample.image_path) == ("x", None, "http://host/a.jpg")


def test_pictures_alone(tmp_path):
    path = write_table(tmp_path / "t.parquet", {"png": [b"A"], "text": ["kept"]})
    assert read(path, modality="image")[0].text == "kept"
    path = write_table(tmp_path / "t.parquet", {"png": [b"A"], "filename": ["a.png"]})
    assert open_reader(path).modalities == ("image",)
    (sample,) = read(path)
    assert (sample.image, sample.text, sample.image_path, sample.meta) == (b"A", None, "a.png", {})


@pytest.mark.parametrize(
    ("columns", "image", "caption"),
    [
        ({"image": [1], "jpg": [b"x"], "caption": [["a"]], "text": ["t"]}, "jpg", "text"),
        ({"bytes": [17], "path": ["p"]}, "path", None),
        ({"Image": [b"x"], "Caption": ["c"], "text": ["t"]}, "Image", "Caption"),
        ({"image": ["p"], "image_path": ["q"], "title": ["t"], "alt": ["a"]}, "image", "alt"),
        ({"path": [b"x"], "filename": ["f"], "txt": ["t"]}, "filename", "txt"),
        ({"image": [{"height": 1}], "png": [b"x"]}, "png", None),
        ({"url": ["u"], "TEXT": ["t"]}, None, "TEXT"),
        ({"image": [None], "text": ["t"]}, None, "text"),
    ],
)
def test_columns_are_chosen_by_name_and_type(columns, image, caption):
    roles = schema.choose(pa.table(columns).schema, "t.parquet")
    assert (roles.image, roles.caption) == (image, caption)


def test_a_column_has_one_role():
    table = pa.table({"caption": ["a.jpg"], "text": ["t"]})
    assert schema.choose(table.schema, "t.parquet", image="caption").caption is None
    assert schema.choose(table.schema, "t.parquet", image="caption", caption="text").caption == "text"


def test_columns_can_be_named(tmp_path):
    columns = {"jpg": [b"J"], "thumb": [b"T"], "caption": ["c"], "alt_text": ["a"], "n": [1]}
    path = write_table(tmp_path / "t.parquet", columns)
    (sample,) = read(path, image_column="thumb", caption_column="alt_text")
    assert (sample.image, sample.text, sample.meta) == (b"T", "a", {"meta_caption": "c", "n": 1})
    assert fetch(sample.source) == b"T"
    with pytest.raises(
        UsageError, match=r"image_column: no column 'nope' in .*, only jpg, thumb, caption, alt_text, n"
    ):
        open_reader(path, image_column="nope")
    with pytest.raises(UsageError, match=r"caption_column: column 'n' of .* is int64, not text"):
        open_reader(path, caption_column="n")
    with pytest.raises(UsageError, match=r"image_column: column 'n' of .* is int64, not binary"):
        open_reader(path, image_column="n")


def test_a_table_without_what_was_asked_for_is_refused(tmp_path):
    path = write_table(tmp_path / "t.parquet", {"url": ["u"], "caption": ["c"]})
    with pytest.raises(UsageError, match=r"no pictures in .*\(columns: url, caption; say which with --image_column"):
        open_reader(path, modality="image,text")
    path = write_table(tmp_path / "t.parquet", {"n": [1]})
    with pytest.raises(UsageError, match=r"no pictures or captions in .*columns: n"):
        open_reader(path)


def test_a_column_with_any_name_can_be_fetched(tmp_path):
    path = write_table(tmp_path / "a b.parquet", {"bild & #1": [b"A", b"B"]})
    samples = read(path, image_column="bild & #1")
    assert [fetch(s.source) for s in samples] == [b"A", b"B"]


def test_other_columns_become_flat_metadata(tmp_path):
    columns = {
        "jpg": [b"J"],
        "key": ["k"],
        "id": [7],
        "ok": [True],
        "small": [0.5],
        "nan": [float("nan")],
        "half": [1.5],
        "day": [datetime.date(2024, 1, 2)],
        "price": [decimal.Decimal("1.50")],
        "tags": [["a", "b"]],
        "box": [{"x": float("inf"), "y": 1}],
        "thumb": [b"bytes"],
        "more": [{"bytes": b"x", "path": "p"}],
        "blobs": [[b"x"]],
        "none": [None],
        "kind": ["c"],
    }
    types = {"half": pa.float16(), "kind": pa.dictionary(pa.int32(), pa.string())}
    (sample,) = read(write_table(tmp_path / "t.parquet", columns, types=types))
    assert sample.meta == {
        "box": '{"x": null, "y": 1}',
        "day": "2024-01-02",
        "half": 1.5,
        "kind": "c",
        "meta_id": 7,
        "meta_key": "k",
        "nan": None,
        "none": None,
        "ok": True,
        "price": "1.50",
        "small": 0.5,
        "tags": '["a", "b"]',
    }


def test_text_that_is_not_utf_8_is_kept_readable(tmp_path):
    raw = pa.array([b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    path = write_table(tmp_path / "t.parquet", {"jpg": [b"J", b"K"], "caption": raw, "other": raw})
    samples = read(path)
    assert [s.text for s in samples] == ["caf\ufffd", "fine"]
    assert [s.meta["other"] for s in samples] == ["caf\ufffd", "fine"]


def test_cut_follows_row_groups():
    assert cut([], 10) == []
    assert cut([0], 10) == []
    assert cut([4, 4, 4], 8) == [(0, 8), (8, 4)]
    assert cut([4, 4, 4], 4) == [(0, 4), (4, 4), (8, 4)]
    assert cut([10, 3], 4) == [(0, 3), (3, 3), (6, 4), (10, 3)]
    assert cut([5], 1) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]
    for limit in range(1, 40):
        parts = cut([7, 0, 13, 1, 30], limit)
        assert [first for first, _ in parts] == [sum(rows for _, rows in parts[:i]) for i in range(len(parts))]
        assert sum(rows for _, rows in parts) == 51 and max(rows for _, rows in parts) <= limit


def test_pack_fills_tasks_in_order():
    pieces = [("a", 0, 3), ("b", 0, 2), ("c", 0, 4), ("d", None, None)]
    assert pack(pieces, 5) == [Task(0, tuple(pieces[:2]), 5), Task(1, tuple(pieces[2:]), 5)]
    assert pack([], 5) == []


@pytest.mark.parametrize("rows_per_shard", [1, 3, 4, 7, 10, 100])
@pytest.mark.parametrize("group", [1, 3, 10])
def test_every_row_comes_once_and_in_order_whatever_the_cut(tmp_path, rows_per_shard, group):
    for name, rows in (("a/0", 10), ("a/1", 0), ("b", 7)):
        columns = {"jpg": [f"{name} {i}".encode() for i in range(rows)]}
        write_table(tmp_path / f"{name}.parquet", columns, rows=group, types={"jpg": pa.binary()})
    tasks = open_reader(str(tmp_path)).plan(rows_per_shard)
    assert all(task.rows <= rows_per_shard for task in tasks)
    samples = read(tmp_path, rows_per_shard)
    assert [s.key for s in samples] == [f"a/0/{i}" for i in range(10)] + [f"b/{i}" for i in range(7)]
    assert all(s.image.decode().replace(" ", "/") == s.key for s in samples)
    assert all(fetch(s.source) == s.image for s in samples)


def test_batches_are_small_where_rows_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_index.readers.tables._BATCH_BYTES", 4 << 10)
    lengths = []
    plain = schema.plain
    monkeypatch.setattr(schema, "plain", lambda array: lengths.append(len(array)) or plain(array))
    path = write_table(tmp_path / "t.parquet", {"jpg": [bytes([i]) * 1024 for i in range(50)], "text": ["x"] * 50})
    assert len(read(path)) == 50
    assert len(lengths) > 10 and max(lengths) <= 4


def test_memory_does_not_hold_a_row_group(tmp_path):
    pictures = [bytes([i]) * (1 << 18) for i in range(128)]
    pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}  # a page is the least one can hold
    path = write_table(tmp_path / "t.parquet", {"jpg": pictures}, **pages)
    reader = open_reader(path)
    (task,) = reader.plan(1000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in reader.read(task))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 128 and peak < 16 << 20


def test_a_damaged_file_is_one_failed_sample(tmp_path):
    write_table(tmp_path / "0.parquet", {"jpg": [b"A"]})
    whole = storage.read_bytes(write_table(tmp_path / "1.parquet", {"jpg": [b"B"]}))
    (tmp_path / "1.parquet").write_bytes(whole[:-20])
    (tmp_path / "2.parquet").write_bytes(b"")
    write_table(tmp_path / "3.parquet", {"jpg": [b"D"]})
    samples = read(tmp_path)
    assert [(s.key, s.image) for s in samples] == [
        ("0/0", b"A"),
        ("1#damaged", None),
        ("2#damaged", None),
        ("3/0", b"D"),
    ]
    assert samples[1].error == f"{tmp_path / '1.parquet'} is not a parquet file, or is cut off"
    (tmp_path / "0.parquet").unlink()
    assert open_reader(str(tmp_path)).plan(10)[0].rows == 3
    with pytest.raises(UsageError, match=r"1\.parquet is not a parquet file$"):
        open_reader(str(tmp_path / "1.parquet"))


def test_rows_that_went_away_are_failed_samples(tmp_path):
    path = write_table(tmp_path / "t.parquet", {"jpg": [b"A"] * 5}, rows=2)
    reader = open_reader(path)
    tasks = reader.plan(3)
    write_table(tmp_path / "t.parquet", {"jpg": [b"A"]})
    samples = [sample for task in tasks for sample in reader.read(task)]
    assert [s.error is None for s in samples] == [True, False, False, False, False]
    assert samples[4].key == "t/4" and "fewer rows than when it was planned" in samples[4].error
    with pytest.raises(ClipIndexError, match="no picture at"):
        fetch(f"{path}#row=4&column=jpg")
    with pytest.raises(ClipIndexError, match="no picture at"):
        fetch(f"{path}#row=0&column=other")


def test_damaged_pages_fail_their_rows_alone(tmp_path):
    pictures = [bytes([65 + i]) * 3000 for i in range(6)]
    path = write_table(tmp_path / "t.parquet", {"jpg": pictures, "n": list(range(6))}, rows=2)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(storage.read_bytes(path))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "t.parquet").write_bytes(data)
    samples = read(path, 2)
    assert [s.image for s in samples if s.error is None] == [pictures[i] for i in (0, 1, 4, 5)]
    assert [(s.key, "t.parquet is damaged: " in s.error) for s in samples if s.error] == [("t/2", True), ("t/3", True)]
    assert len(read(path, 100)) == 6


def test_a_file_that_went_away_fails_its_task(tmp_path):
    path = write_table(tmp_path / "t.parquet", {"jpg": [b"A"]})
    reader = open_reader(path)
    (task,) = reader.plan(10)
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(ClipIndexError, match=r"cannot read .*t\.parquet: No such file"):
        list(reader.read(task))


def test_files_with_other_columns_are_refused_before_any_work(tmp_path):
    write_table(tmp_path / "0.parquet", {"jpg": [b"A"], "caption": ["a"]})
    write_table(tmp_path / "1.parquet", {"jpg": [b"A"]})
    with pytest.raises(UsageError, match=r"column 'caption' of .*1\.parquet is missing, unlike in other files"):
        open_reader(str(tmp_path)).plan(10)
    write_table(tmp_path / "1.parquet", {"jpg": [b"A"], "caption": [3]})
    with pytest.raises(UsageError, match=r"column 'caption' of .*1\.parquet is int64"):
        open_reader(str(tmp_path)).plan(10)


def test_tasks_travel_and_change_with_their_files(tmp_path):
    path = write_table(tmp_path / "t.parquet", {"jpg": [b"A", b"B"]})
    reader = open_reader(path)
    (task,) = reader.plan(10)
    assert task.inputs == ((path, storage.size(path), "t", 0, 2),)
    assert json.loads(json.dumps(task.inputs)) == [list(item) for item in task.inputs]
    assert pickle.loads(pickle.dumps(reader)) == reader
    write_table(tmp_path / "t.parquet", {"jpg": [b"A", b"B" * 100]})
    assert open_reader(path).plan(10)[0].digest != task.digest
    with pytest.raises(UsageError, match="rows_per_shard must be at least 1"):
        reader.plan(0)


def test_globs_and_remote_tables(tmp_path):
    root = "memory://test_readers_parquet_remote"
    storage.write_bytes(f"{root}/pics/a.jpg", b"A")
    data = storage.read_bytes(write_table(tmp_path / "t.parquet", {"path": ["pics/a.jpg"] * 3, "text": list("xyz")}))
    for i in range(2):
        storage.write_bytes(f"{root}/{i}.parquet", data)
    for source in (root, f"{root}/*.parquet", f"{root}/{{0,1}}.parquet"):
        samples = read(source, input_format="parquet")
        assert [s.image for s in samples] == [b"A"] * 6
        assert [s.key for s in samples] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
        assert all(fetch(s.source) == b"A" for s in samples)


def test_a_remote_store_that_fails_stops_the_task(tmp_path, monkeypatch):
    path = "memory://test_readers_parquet_fail/t.parquet"
    storage.write_bytes(path, storage.read_bytes(write_table(tmp_path / "t.parquet", {"jpg": [b"A"]})))
    reader = open_reader(path)
    (task,) = reader.plan(10)

    def fail(*_):
        raise OSError("connection reset")

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(ClipIndexError, match=r"cannot read memory://.*t\.parquet: connection reset"):
        list(reader.read(task))
    with pytest.raises(ClipIndexError, match="connection reset"):
        reader.plan(10)
