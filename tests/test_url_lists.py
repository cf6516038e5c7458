"""Which files a list has, which of their columns count, and what img2dataset gets."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_index import url_lists
from clip_index.types import UsageError


def prepare(tmp_path: Path, *sources: Path, **options) -> tuple[url_lists.UrlList, list[list[dict]]]:
    target = tmp_path / "prepared"
    target.mkdir()
    files = [file for source in sources for file in url_lists.find(str(source))]
    prepared = url_lists.prepare(files, str(target), **options)
    return prepared, [pq.read_table(path).to_pylist() for path in sorted(target.iterdir())]


def write(path: Path, *columns: str) -> Path:
    values = {name: f"http://a/{name}" if "url" in name.lower() else name for name in columns}
    path.write_text(f"{','.join(columns)}\n{','.join(values.values())}\n")
    return path


@pytest.mark.parametrize(
    ("names", "url", "caption", "others"),
    [
        (["url", "caption"], "url", "caption", ()),
        (["URL", "TEXT", "similarity"], "URL", "TEXT", ("similarity",)),
        (["url", "Image URL", "alt"], "Image URL", "alt", ()),
        (["image_url", "title", "text"], "image_url", "text", ("title",)),
        (["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "NSFW"], "URL", "TEXT", ("SAMPLE_ID", "NSFW")),
        (["src", "id", "key"], "src", None, ("id",)),
    ],
)
def test_columns_are_told_by_their_names(tmp_path, names, url, caption, others):
    prepared, _ = prepare(tmp_path, write(tmp_path / "list.csv", *names))
    assert prepared.columns == url_lists.Columns(url, caption, others)


def test_what_is_chosen_is_said():
    assert str(url_lists.Columns("URL", "TEXT", ("a", "b"))) == "URLs in URL, captions in TEXT, keeping a, b"
    assert str(url_lists.Columns("URL", None, ())) == "URLs in URL, no captions"


def test_columns_can_be_named(tmp_path):
    source = write(tmp_path / "list.csv", "page_url", "url", "caption", "note", "price")
    options = {"url": "page_url", "caption": "note", "others": ["price"]}
    prepared, (rows,) = prepare(tmp_path, source, **options)
    assert prepared.columns == url_lists.Columns("page_url", "note", ("price",))
    assert rows == [{"page_url": "http://a/page_url", "note": "note", "price": "price"}]
    (tmp_path / "prepared" / "00000.parquet").unlink()
    (tmp_path / "prepared").rmdir()
    prepared, (rows,) = prepare(tmp_path, source, caption="none", others=[])
    assert rows == [{"url": "http://a/url"}]


def test_files_of_several_formats_are_one_list(tmp_path):
    folder = tmp_path / "lists"
    (folder / "deep").mkdir(parents=True)
    write(folder / "a.csv", "url", "caption", "only_here")
    (folder / "b.jsonl").write_text('{"url": "http://b", "caption": "b"}\n{"url": "http://c", "caption": null}\n')
    pq.write_table(pa.table({"caption": ["d"], "url": ["http://d"]}), folder / "deep" / "c.parquet")
    (folder / "README.txt").write_text("about these lists\n")
    prepared, tables = prepare(tmp_path, folder)
    assert prepared.rows == (1, 2, 1) and prepared.columns == url_lists.Columns("url", "caption", ())
    assert [[row["url"] for row in rows] for rows in tables] == [
        ["http://a/url"],
        ["http://b", "http://c"],
        ["http://d"],
    ]
    assert [Path(prepared.folder, f"0000{i}.parquet").is_symlink() for i in range(3)] == [False, False, True]


def test_a_parquet_file_with_dates_is_written_again_if_they_are_asked_for(tmp_path):
    source = tmp_path / "list.parquet"
    days = [datetime.datetime(2024, 1, 2, 3, 4)]
    pq.write_table(pa.table({"url": ["http://a"], "day": pa.array(days), "n": [1]}), source)
    _, (rows,) = prepare(tmp_path, source, others=["day"])
    assert rows[0]["day"].startswith("2024-01-02 03:04")
    (tmp_path / "prepared" / "00000.parquet").unlink()
    (tmp_path / "prepared").rmdir()
    assert prepare(tmp_path, source)[0].columns.others == ("n",)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("a,b\n1,2\n", {}, "no column of URLs in .*list.csv, only a, b: name it with --url_col"),
        ("http://a/1.jpg,dog\nhttp://a/2.jpg,cat\n", {}, "it lacks a line with names"),
        ("url\nhttp://a\n", {"url": "URL"}, "--url_col: no column 'URL' in .*list.csv, only url"),
        ("url\nhttp://a\n", {"caption": "text"}, "--caption_col: no column 'text'"),
        ("url\nhttp://a\n", {"others": ["x"]}, "--save_additional_columns: no column 'x'"),
        ("url,width\nhttp://a,1\n", {"others": ["width"]}, "'width' is the name of a column that the download makes"),
        ("url\nhttp://a\n", {"needed": ["md5"]}, "column 'md5' of .*list.csv is missing"),
        ("url,caption\n", {}, "no URLs in .*list.csv: it has no rows"),
        ("", {}, "no URLs in .*list.csv: it is empty"),
    ],
)
def test_a_list_without_urls_is_refused(tmp_path, text, options, says):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UsageError, match=says):
        prepare(tmp_path, tmp_path / "list.csv", **options)


def test_a_source_that_is_no_list(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder"):
        url_lists.find(str(tmp_path / "gone.csv"))
    (tmp_path / "list").write_text("http://a\n")
    with pytest.raises(UsageError, match="--input_format says what it is"):
        url_lists.find(str(tmp_path / "list"))
    assert url_lists.find(str(tmp_path / "list"), "txt.gz")[0].format == "txt"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no list of URLs in"):
        url_lists.find(str(tmp_path / "empty"))
    (tmp_path / "list.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="cannot be read as parquet"):
        prepare(tmp_path, tmp_path / "list.parquet")


def test_a_list_is_known_by_what_it_holds(tmp_path):
    same = tmp_path / "list.csv"
    same.write_text("url\nhttp://a\n")
    first = url_lists.digest(url_lists.find(str(same)))
    assert url_lists.digest(url_lists.find(str(same))) == first
    same.write_text("url\nhttp://b\n")
    assert url_lists.digest(url_lists.find(str(same))) != first


def test_lists_and_pictures_are_told_apart(tmp_path):
    def make(name: str, data: bytes | str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    def table(name: str, **columns) -> str:
        path = make(name, b"")
        pq.write_table(pa.table(columns), path)
        return path

    lists = [
        make("a.csv", "x"), make("b/a.tsv.gz", ""), make("c.txt", "http://a\n"), make("d.json", json.dumps([{"u": 1}])),
        table("e.parquet", URL=["http://a"], TEXT=["a"]), str(tmp_path / "b"),
    ]  # fmt: skip
    pictures = [
        make("p/a.jpg", ""), str(tmp_path / "p"), make("t/0.tar", ""), str(tmp_path / "t"), make("q.txt", "a dog\n"),
        table("r.parquet", url=["http://a"], jpg=[b"\xff"]), table("s.parquet", image_path=["a.jpg"], caption=["a"]),
        f"{tmp_path}/*.parquet", f"{tmp_path}/{{0..3}}.tar",
    ]  # fmt: skip
    assert [url_lists.is_list(source) for source in lists] == [True] * len(lists)
    assert [url_lists.is_list(source) for source in pictures] == [False] * len(pictures)
    with pytest.raises(UsageError, match="no such file"):
        url_lists.is_list(str(tmp_path / "gone"))
