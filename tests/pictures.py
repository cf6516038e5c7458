"""Pictures for tests, as the bytes of files: ordinary ones, odd ones that must decode, bad ones to be refused."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ORIENTATION = 0x0112


@functools.cache
def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] with what photographs have: large soft shapes, edges, texture; no two sides alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x / max(width, height), y / max(width, height)
    planes = np.zeros((height, width, 3), np.float32)
    for octave in range(6):
        fx, fy, phase = rng.normal(0, 3 * 1.8**octave, 3), rng.normal(0, 3 * 1.8**octave, 3), rng.uniform(0, 6, 3)
        planes += np.sin(x[..., None] * fx + y[..., None] * fy + phase) * 0.7**octave
    planes += ((x - 0.3) ** 2 + (y - 0.2) ** 2 < 0.03)[..., None] * rng.normal(0, 2, 3)
    planes = planes * 30 + 128 + rng.normal(0, 3, planes.shape)
    return np.clip(planes, 0, 255).astype(np.uint8)


def encode(picture: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """A file of that format, written by Pillow."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    """An EXIF block with that orientation."""
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def oriented(pixels: np.ndarray, orientation: int, kind: str = "JPEG", **options) -> bytes:
    """A file that asks to be turned before it is shown."""
    if kind == "TIFF":
        return encode(pixels, kind, tiffinfo={ORIENTATION: orientation}, **options)
    return encode(pixels, kind, exif=exif(orientation), **options)


def animated(pixels: np.ndarray, kind: str) -> bytes:
    """The picture, followed by its negative."""
    return encode(pixels, kind, save_all=True, append_images=[Image.fromarray(255 - pixels)])


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(data: bytes, chunk: bytes) -> bytes:
    """A PNG file with a chunk put in after its header."""
    return data[:33] + chunk + data[33:]


def claiming(kind: str, width: int, height: int) -> bytes:
    """A small file whose header claims that many pixels."""
    options = {"lossless": True} if kind == "WEBP" else {}
    data = bytearray(encode(np.zeros((16, 16, 3), np.uint8), kind, **options))
    if kind == "PNG":
        return bytes(data[:8]) + png_chunk(b"IHDR", struct.pack(">II", width, height) + bytes(data[24:29])) + data[33:]
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "TIFF":
        (directory,) = struct.unpack_from("<I", data, 4)
        for entry in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12):
            (tag,) = struct.unpack_from("<H", data, entry)
            if tag in (256, 257):
                struct.pack_into("<HHII", data, entry, tag, 4, 1, width if tag == 256 else height)
    elif kind == "WEBP":
        (bits,) = struct.unpack_from("<I", data, 21)  # 14 bits of width, 14 of height, both less one
        struct.pack_into("<I", data, 21, (bits >> 28) << 28 | (height - 1) << 14 | (width - 1))
    return bytes(data)


@functools.cache
def odd_pictures() -> dict[str, bytes]:
    """Files that an embedding run meets and has to get through, by what is odd about them."""
    pixels = photo(61, 43)
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L"))
    clear = np.dstack([pixels, grey])
    return {
        "1x1": encode(pixels[:1, :1]),
        "1x1 jpeg": encode(pixels[:1, :1], "JPEG"),
        "one column": encode(photo(1, 5000)),
        "one row": encode(photo(5000, 1), "JPEG"),
        "grey": encode(grey, "JPEG"),
        "grey, 16 bits": encode(grey.astype(np.uint16) * 257),
        "grey, 16 bits, tiff": encode(grey.astype(np.uint16) * 257, "TIFF"),
        "grey, floating point": encode(grey.astype(np.float32) / 255, "TIFF"),
        "grey with alpha": encode(image.convert("LA")),
        "black and white": encode(image.convert("1")),
        "palette": encode(image.convert("P")),
        "palette with a transparent colour": encode(image.convert("P"), transparency=3),
        "gif with a transparent colour": encode(image.convert("P"), "GIF", transparency=3),
        "transparent": encode(clear),
        "transparent webp": encode(clear, "WEBP"),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "cmyk tiff": encode(image.convert("CMYK"), "TIFF"),
        "rgb jpeg": encode(image, "JPEG", keep_rgb=True),
        "progressive": encode(image, "JPEG", progressive=True),
        "compressed tiff": encode(image, "TIFF", compression="tiff_lzw"),
        "two pictures in a jpeg": animated(pixels, "MPO"),
        "animated gif": animated(pixels, "GIF"),
        "animated webp": animated(pixels, "WEBP"),
        "animated png": animated(pixels, "PNG"),
        "lying on its side": oriented(pixels, 6),
        "bytes after the end": encode(image, "JPEG") + b"\0" * 1000,
    }


@functools.cache
def bad_pictures() -> dict[str, bytes]:
    """Files that must cost one row each, by what is wrong with them."""
    pixels = photo(61, 43)
    bad = {
        "empty": b"",
        "zeros": bytes(1000),
        "web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "another format": encode(pixels, "PPM"),
        "a program to draw it": encode(pixels, "EPS"),
        "a header alone": encode(pixels, "JPEG")[:200],
    }
    for kind in FORMATS:
        data = encode(pixels, kind)
        bad[f"truncated {kind}"] = data[: len(data) * 6 // 10]
        bad[f"too large {kind}"] = claiming(kind, 16000, 16000)
    return bad
