"""Small pictures for people to look at: any picture's bytes to a thumbnail, or None where it cannot be shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from clip_index.types import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image


def thumbnail(data: bytes, size: int) -> Image | None:
    """An upright RGB picture of at most `size` pixels a side, never enlarged. None if the bytes cannot be decoded."""
    from PIL import Image

    from clip_index.decode import decode, upright

    def needed(width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, size / max(width, height))
        return max(1, int(width * scale)), max(1, int(height * scale))

    try:
        decoded = decode(data, needed=needed)
    except SampleError:
        return None
    picture = Image.fromarray(upright(decoded.pixels, decoded.orientation))
    picture.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return picture


def thumbnails(fetch: Callable[[str], bytes], sources: Iterable[str], size: int) -> list[Image | None]:
    """The thumbnail of each source, None where it is empty or cannot be had. Sources are fetched side by side."""

    def load(source: str) -> Image | None:
        try:
            return thumbnail(fetch(source), size) if source else None
        except Exception:  # whatever a remote source raises, the results are worth showing without their pictures
            return None

    with ThreadPoolExecutor(8, thread_name_prefix="thumbnail") as pool:
        return list(pool.map(load, sources))


def to_data_uri(picture: Image) -> str:
    """A picture as a `data:` URI that an `img` element shows."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
