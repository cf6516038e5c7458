"""A picture file's bytes to 8-bit RGB.

1. Look at the header: the format must be on the list, the number of pixels below the cap.
2. Decode JPEG by libjpeg-turbo, without the GIL; everything else, and odd JPEGs, by Pillow. Both give the same levels.
3. Say how the picture has to be turned: the EXIF orientation is read, not yet applied, as a small picture turns faster.

The first frame counts. What is transparent lies on white. Colour profiles and XMP are ignored.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg

# Image.open imports every plugin there is where one of the allowed formats has not been imported.
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from clip_index.types import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")

MAX_PIXELS = 178_956_970
"""Pillow's own limit, above which it refuses to open a picture."""

_BAND_ROWS = 256

_ON_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class Decoded(NamedTuple):
    """`pixels`: uint8 [h, w, 3] as stored, perhaps scaled down; `width`, `height`: of the whole picture, upright."""

    pixels: np.ndarray
    orientation: int
    width: int
    height: int


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, needed: Callable[[int, int], tuple[int, int]] | None = None
) -> Decoded:
    """Decode a picture. Raises SampleError with one short reason; a truncated file is refused, not filled up with grey.

    `needed`, where given, gets the (width, height) as stored and returns the least one that will do: a JPEG may then
    come out smaller, as libjpeg-turbo halves it up to three times while it decodes.
    """
    if not data:
        raise SampleError("empty file")
    if data[:3] == b"\xff\xd8\xff":
        decoded = _decode_jpeg(data, max_pixels, needed)
        if decoded is not None:
            return decoded
    return _decode_with_pillow(data, max_pixels)


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise SampleError(f"too many pixels: {width} x {height}, and at most {most:,} are decoded")


def _decode_jpeg(data: bytes, max_pixels: int, needed: Callable[[int, int], tuple[int, int]] | None) -> Decoded | None:
    """None where Pillow has to look: another colour space, or a warning, which may mean a truncated file."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(width, height, max_pixels)
    if colorspace not in ("YCbCr", "Gray", "RGB"):
        return None
    orientation = jpeg_orientation(data)
    least = (0, 0)
    if needed is not None:
        wanted = needed(width, height)
        # the factors that libjpeg-turbo has vector code for
        halved = ((-(-width // n), -(-height // n)) for n in (8, 4, 2))
        least = next((small for small in halved if small[0] >= wanted[0] and small[1] >= wanted[1]), least)
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", min_width=least[0], min_height=least[1])
    except ValueError as error:
        damage = str(error).removeprefix("Corrupt JPEG data: ")
        if damage != str(error) and "extraneous bytes" not in damage:
            raise SampleError(f"damaged JPEG: {damage}") from None
        return None
    return Decoded(pixels, orientation, *_turned(orientation, width, height))


def _decode_with_pillow(data: bytes, max_pixels: int) -> Decoded:
    if _ON_PILLOW not in warnings.filters:
        # For good: catch_warnings is not safe with threads. What Pillow warns of is refused or harmless here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(*image.size, max_pixels)
            return decode_image(image)
    except (SampleError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise SampleError(_why_unidentified(data)) from None
    except Image.DecompressionBombError as error:
        raise SampleError(f"too many pixels: {str(error).partition(',')[0]}") from None
    except Exception as error:  # a decoder may raise anything at all on bytes made to confuse it
        raise SampleError(" ".join(f"cannot be decoded: {error or type(error).__name__}".split())[:200]) from error


def _why_unidentified(data: bytes) -> str:
    if data.startswith(_SIGNATURES):
        return "the header is damaged or truncated"
    looks = "looks like HTML or XML" if data[:256].lstrip()[:1] == b"<" else f"begins with {data[:8]!r}"
    return f"not one of {', '.join(FORMATS)}: it {looks}"


def decode_image(image: Image.Image) -> Decoded:
    """An opened picture as `decode` gives the bytes of its file."""
    image.load()
    exif = image.info.get("exif")
    # Pillow turns TIFF while it loads, and gives PNG texts the names that their authors chose
    stored = isinstance(exif, bytes) and image.format != "TIFF"
    orientation = exif_orientation(exif.removeprefix(b"Exif\0\0")) if stored else 1
    return Decoded(_rgb(image), orientation, *_turned(orientation, *image.size))


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3] of any Pillow mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode.startswith("I;16") or image.format == "PNG":
            grey = (values >> 8).astype(np.uint8)  # the high byte, as Pillow takes of 16-bit colours
        else:
            grey = _guess_levels(values)
        return np.repeat(grey[:, :, None], 3, axis=2)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    # in bands, so that a large picture is not in memory three times over
    for top in range(0, image.height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, image.height)
        pixels[top:bottom] = _on_white(image.crop((0, top, image.width, bottom)))
    return pixels


def _on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, white where it is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _guess_levels(values: np.ndarray) -> np.ndarray:
    """Levels 0 to 255 of numbers without a declared range: white is 1, 255, 65535 or the largest, whichever fits."""
    values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(values.max())
    white = next((level for level in (1.0, 255.0, 65535.0) if largest <= level), largest)
    return (np.clip(values / white, 0, 1) * 255 + 0.5).astype(np.uint8)


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG file, 1 to 8, from its segments alone; 1 where there is none."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
        elif data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return exif_orientation(data[at + 10 : at + 2 + length])
        else:
            at += 2 + length
    return 1


def exif_orientation(exif: bytes) -> int:
    """The orientation tag (0x0112) of an EXIF block, 1 to 8; 1 where it is missing or broken."""
    order = "big" if exif[:2] == b"MM" else "little"

    def number(at: int, width: int) -> int:
        return int.from_bytes(exif[at : at + width], order)

    first = number(4, 4) + 2
    for entry in range(first, min(first + 12 * number(first - 2, 2), len(exif)), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _turned(orientation: int, width: int, height: int) -> tuple[int, int]:
    return (height, width) if orientation >= 5 else (width, height)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of [h, w, 3] turned and mirrored as an EXIF orientation asks."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
