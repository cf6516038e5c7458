"""The contact sheet: one file, valid and harmless whatever the captions say, readable without its pictures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from clip_index import storage
from clip_index.sheet import Section, write_sheet
from clip_index.types import ClipIndexError, Hit

VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps every element with its attributes, and the text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} is there twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "rex.png"
    Image.new("RGB", (640, 320), "red").save(path)
    return path


def hit(score: float, source, caption: str | None = "a dog", path: str = "pets/rex.png", key: str = "pets/rex") -> Hit:
    return Hit(0, score, key, {"caption": caption, "image_path": path, "source": str(source)})


def sheet(tmp_path, *sections: Section, **options) -> Page:
    path = write_sheet(str(tmp_path / "out" / "sheet.html"), list(sections), storage.read_source, **options)
    assert path == str(tmp_path / "out" / "sheet.html")
    html = storage.read_bytes(path).decode("utf-8")
    assert html.startswith("<!DOCTYPE html>")
    return Page(html)


def test_a_sheet_needs_nothing_else(tmp_path, picture):
    page = sheet(tmp_path, Section("a dog", [hit(0.5, picture)]), footer="index")
    assert page.all("html") == [{"lang": "en"}]
    assert "a dog" in page.text and "0.500" in page.text and "pets/rex.png" in page.text and "index" in page.text
    (image,) = page.all("img")
    assert image["alt"] == "a dog"
    assert image["src"].startswith("data:image/webp;base64,")
    assert (image["width"], image["height"]) == ("320", "160")
    assert not page.all("script") and not page.all("link")
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert page.all("a") == [{"class": "frame", "href": picture.as_uri()}]


def test_the_first_heading_is_the_query(tmp_path, picture):
    page = sheet(tmp_path, Section("a dog", [hit(0.5, picture)]))
    assert [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)] == ["h1"]
    assert {"figure", "figcaption", "ol", "li", "main", "header", "footer"} <= {tag for tag, _ in page.elements}


def test_several_queries_have_a_heading_each(tmp_path, picture):
    page = sheet(tmp_path, Section("a dog", [hit(0.5, picture)]), Section("a cat", []), title="demo")
    assert [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)] == ["h1", "h2", "h2"]
    assert "1 match for 2 queries" in page.text and "Nothing found" in page.text


EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</style></title>",
        "&lt;b&gt;", "{0} {title}", "\x00\x1b[2J", "x\udcff", "]]>"]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_becomes_markup(tmp_path, picture, evil):
    hits = [hit(0.5, picture, evil, evil, evil), hit(0.4, "/absent", evil, evil, evil), hit(0.1, "", evil, "", evil)]
    page = sheet(tmp_path, Section(evil, hits), Section("b", []), title=evil, footer=evil)
    reference = sheet(tmp_path, Section("t", [hit(0.5, picture), hit(0.4, "/absent"), hit(0.1, "", path="")]),
                      Section("b", []), title="t", footer="t")  # fmt: skip
    assert [tag for tag, _ in page.elements if tag != "wbr"] == [tag for tag, _ in reference.elements if tag != "wbr"]
    assert [sorted(attributes) for tag, attributes in page.elements if tag != "wbr"] == [
        sorted(attributes) for tag, attributes in reference.elements if tag != "wbr"
    ]
    if evil.isprintable():
        assert page.text.count(evil) >= 8


@pytest.mark.parametrize(
    "source",
    ["javascript:alert(1)", "data:text/html,x", "s3://bucket/a.png", "/a.tar#512+99", "/t.parquet#row=3", "a.png"],
)
def test_only_files_and_web_addresses_are_linked(tmp_path, picture, source):
    data = picture.read_bytes()
    path = write_sheet(str(tmp_path / "s.html"), [Section("q", [hit(0.5, source)])], lambda _: data)
    page = Page(storage.read_bytes(path).decode())
    assert page.all("a") == [] and len(page.all("img")) == 1


def test_a_web_address_is_linked(tmp_path, picture):
    data = picture.read_bytes()
    path = write_sheet(str(tmp_path / "s.html"), [Section("q", [hit(0.5, "https://x.org/a.png?b&c")])], lambda _: data)
    assert Page(storage.read_bytes(path).decode()).all("a")[0]["href"] == "https://x.org/a.png?b&c"


def test_a_missing_picture_leaves_a_note(tmp_path):
    page = sheet(tmp_path, Section("q", [hit(0.5, tmp_path / "absent.png")]))
    assert "the picture could not be read" in page.text and page.all("img") == []


def test_a_caption_without_a_picture_is_shown_as_text(tmp_path):
    page = sheet(tmp_path, Section("q", [hit(0.5, tmp_path / "rows.parquet", "all alone", path="")]))
    assert page.text.count("all alone") == 1 and page.all("q") == [{}]


def test_weaker_matches_stand_apart_and_keep_their_numbers(tmp_path, picture):
    page = sheet(tmp_path, Section("q", [hit(score, picture) for score in (0.6, 0.59, 0.2, 0.19)]))
    assert page.all("ol") == [{}, {"class": "weaker", "start": "3"}]
    assert page.all("h3") == [{}] and len(page.all("li")) == 4


def test_bars_are_relative_to_the_best(tmp_path, picture):
    page = sheet(tmp_path, Section("q", [hit(score, picture) for score in (0.6, 0.3, -0.2)]))
    assert [span["style"] for span in page.all("span") if "style" in span] == ["width:100%", "width:50%", "width:0%"]


def test_the_picture_searched_with_is_shown(tmp_path, picture):
    page = sheet(tmp_path, Section("rex.png", [], asked=str(picture)))
    assert [image["class"] for image in page.all("img")] == ["asked"]


def test_a_picture_without_a_caption_is_described_by_its_path(tmp_path, picture):
    page = sheet(tmp_path, Section("q", [hit(0.5, picture, None, "/data/a.png", "a.png")]))
    assert page.all("img")[0]["alt"] == "/data/a.png" and page.text.count("a.png") == 1


def test_a_sheet_that_cannot_be_written_names_its_path(tmp_path, picture):
    with pytest.raises(ClipIndexError, match=f"cannot write {tmp_path}: "):
        write_sheet(str(tmp_path), [Section("q", [])], storage.read_source)


def test_a_sheet_goes_to_any_file_system(picture):
    write_sheet("memory://sheets/a.html", [Section("q", [hit(0.5, picture)])], storage.read_source)
    assert storage.read_bytes("memory://sheets/a.html").startswith(b"<!DOCTYPE html>")
