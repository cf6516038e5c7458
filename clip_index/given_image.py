"""A picture to search with, in any of the forms in which it is given."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from clip_index import storage
from clip_index.types import ClipIndexError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_PNG_MODES = {"1", "L", "LA", "P", "I;16", "RGB", "RGBA"}


def image_bytes(image: str | bytes | Image) -> bytes:
    """The contents of a path or URL, bytes as they are, a PIL image as PNG. Raises ClipIndexError or UsageError."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        path = storage.absolute(image)
        try:
            return storage.read_bytes(path)
        except FileNotFoundError:
            raise ClipIndexError(f"no picture at {path}") from None
        except OSError as error:
            raise ClipIndexError(f"the picture {path} cannot be read: {error.strerror or error}") from error
    if hasattr(image, "save"):
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        buffer = io.BytesIO()
        upright.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    raise UsageError(f"an image is a path, a URL, bytes or a PIL image, not {type(image).__name__}")


def image_name(image: Any) -> str:
    """What to call it in a message."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"the {type(image).__name__}"
