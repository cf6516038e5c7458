"""Each format of a list as a table, and what cannot be one."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json

import pyarrow as pa
import pytest

from clip_index import url_tables
from clip_index.types import UsageError

ROWS = [
    {"url": "http://a/1.jpg?a,b", "caption": "one, two\nthree", "n": 7},
    {"url": "http://a/2", "caption": "ä", "n": 8},
]
CSV = 'url,caption,n\n"http://a/1.jpg?a,b","one, two\nthree",7\nhttp://a/2,ä,8\n'


def read(path, data, format=None):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    format = format or url_tables.format_of(path.name)
    table, left_out = url_tables.read(str(path), format, lambda name: name in ("url", "caption"))
    return table.to_pylist(), left_out


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("list.csv", CSV),
        ("list.csv", "\ufeff" + CSV.replace("\n", "\r\n").replace("two\r\n", "two\n")),
        ("list.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("list.ndjson", "\n".join(json.dumps(row) for row in ROWS)),
        ("list.json", json.dumps(ROWS, indent=1)),
        ("list.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("list.json", json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]})),
        ("list.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, data):
    assert read(tmp_path / name, data) == (ROWS, 0)
    assert read(tmp_path / f"{name}.gz", gzip.compress(data.encode())) == (ROWS, 0)
    assert read(tmp_path / f"plain.{name}.gz", data) == (ROWS, 0)  # only its name says gzip


def test_tabs_separate_and_quotation_marks_are_plain(tmp_path):
    data = 'caption\turl\na 5" nail\thttp://a/1\nplain\thttp://a/2\n'
    rows = [{"caption": 'a 5" nail', "url": "http://a/1"}, {"caption": "plain", "url": "http://a/2"}]
    assert read(tmp_path / "list.tsv", data) == (rows, 0)
    assert read(tmp_path / "list.tsv.gz", gzip.compress(data.encode())) == (rows, 0)


def test_a_text_has_a_url_a_line(tmp_path):
    rows = [{"url": "http://a/1,2.jpg"}, {"url": 'http://a/"3"'}]
    assert read(tmp_path / "list.txt", '# mine\n http://a/1,2.jpg \r\n\n\nhttp://a/"3"') == (rows, 0)
    assert read(tmp_path / "list.json", '["http://a/1,2.jpg", "http://a/\\"3\\""]') == (rows, 0)


def test_captions_that_look_like_numbers_stay_texts(tmp_path):
    rows, _ = read(tmp_path / "list.csv", "url,caption,n,id\nhttp://a,007,3,4\nhttp://b,null,,5\n")
    assert rows == [
        {"url": "http://a", "caption": "007", "n": 3, "id": 4},
        {"url": "http://b", "caption": "null", "n": None, "id": 5},
    ]


def test_rows_with_too_many_cells_are_counted(tmp_path):
    data = "url,caption\nhttp://a,one\nhttp://b,two,three\nhttp://c\nhttp://d,four\n"
    assert [row["url"] for row in read(tmp_path / "list.csv", data)[0]] == ["http://a", "http://d"]
    assert read(tmp_path / "list.csv", data)[1] == 2


def test_dates_become_texts_and_bytes_are_left_out():
    table = pa.table(
        {
            "day": [datetime.date(2024, 1, 2)],
            "price": [decimal.Decimal("1.50")],
            "tags": [["a", "b"]],
            "raw": [b"\xff\x00"],
            "times": [[datetime.datetime(2024, 1, 2)]],
        }
    )
    assert url_tables.plain(table).to_pylist() == [{"day": "2024-01-02", "price": "1.50", "tags": ["a", "b"]}]


def test_values_of_several_types_become_texts(tmp_path):
    rows, _ = read(tmp_path / "list.jsonl", '{"url": "http://a", "x": 1}\n{"url": "http://b", "x": "two", "y": [1]}\n')
    assert rows == [{"url": "http://a", "x": "1", "y": None}, {"url": "http://b", "x": "two", "y": [1]}]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("list.jsonl", '{"url": "a"}\n{"url": \n', "line 2"),
        ("list.json", "[1, 2]", "row 1 is no object"),
        ("list.json", "[\n{]", "list.json cannot be read as json"),
        ("list.csv.gz", b"\x1f\x8b not gzip at all", "cannot read"),
        ("list.txt", b"http://a/\xff\n", "cannot be read as txt"),
    ],
)
def test_what_is_not_what_its_name_says(tmp_path, name, data, says):
    with pytest.raises(UsageError, match=says) as caught:
        read(tmp_path / name, data)
    assert str(tmp_path / name) in str(caught.value)


def test_an_empty_file_has_no_columns(tmp_path):
    for name in ("list.csv", "list.tsv", "list.jsonl", "list.json.gz"):
        assert read(tmp_path / name, "\n") == ([], 0)
    assert read(tmp_path / "list.txt", "\n\n") == ([], 0)


def test_formats_by_name():
    told = {"a.CSV": "csv", "b.tsv.gz": "tsv", "c.ndjson": "jsonl", "d.parquet": "parquet", "e.tar": None, "f": None}
    assert {name: url_tables.format_of(name) for name in told} == told
