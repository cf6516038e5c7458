"""Small pictures: their size, their orientation, and nothing where there is no picture."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from clip_index.thumbnails import thumbnail, thumbnails, to_data_uri


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [((800, 400), (100, 50)), ((400, 800), (50, 100)), ((60, 30), (60, 30)), ((1, 1), (1, 1)), ((3000, 2), (100, 1))],
)
def test_the_longest_side_is_bounded(kind, size, expected):
    assert thumbnail(encoded(Image.new("RGB", size, "red"), kind), 100).size == expected


def test_a_rotated_photo_stands_upright():
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert thumbnail(encoded(picture, "JPEG", exif=exif), 100).size == (20, 40)


def test_transparency_lies_on_white():
    assert thumbnail(encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0))), 100).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded(Image.new("RGB", (99, 99)), "JPEG")[:200]])
def test_what_is_no_picture_has_no_thumbnail(data):
    assert thumbnail(data, 100) is None


def test_a_source_that_fails_does_not_take_the_others_with_it():
    good = encoded(Image.new("RGB", (9, 9)))

    def fetch(source: str) -> bytes:
        if source == "broken":
            raise ConnectionError("no network")
        return {"good": good, "bad": b"?"}[source]

    found = thumbnails(fetch, ["good", "broken", "", "bad", "absent", "good"], 100)
    assert [picture is not None for picture in found] == [True, False, False, False, False, True]


def test_a_data_uri_holds_the_picture():
    head, data = to_data_uri(Image.new("RGB", (30, 20), "red")).split(",")
    assert head == "data:image/webp;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (picture.format, picture.size) == ("WEBP", (30, 20))
