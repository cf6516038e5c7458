"""Captions and the flat columns of a sample, from the text and JSON beside a picture."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Collection
from typing import Any

RESERVED = frozenset({"image_path", "caption", "key", "source", "width", "height", "id", "similarity", "image", ""})
"""Column names that our metadata, or a program that reads it, uses for something else: they get the prefix `meta_`."""
MAX_TEXT_BYTES = 1 << 20
MAX_SIDECAR_BYTES = 16 << 20


def decode_text(data: bytes) -> str:
    """A caption without the white space around it: UTF-8, UTF-16 with a byte order mark, else Windows or Latin-1."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return clean(data.decode("utf-16", "replace")).strip()
    for encoding in ("utf-8-sig", "cp1252", "latin-1"):
        try:
            return data.decode(encoding).strip()
        except UnicodeDecodeError:
            continue
    raise AssertionError("every byte string is latin-1")


def clean(text: str) -> str:
    """Text that can be written as UTF-8: half a surrogate pair, which JSON can spell, becomes U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def merge(text: str | None, sidecar: bytes | None, modalities: Collection[str]) -> tuple[str | None, dict[str, Any]]:
    """(caption, columns) of a sample from its caption file and its JSON sidecar, where it has them.

    A caption file goes before a caption in the sidecar. The sidecar's own caption, width and height are dropped where
    ours stand in their place. A sidecar that is no JSON object gives the one column `meta_error`, which says so.
    """
    if sidecar is None:
        return text, {}
    try:
        if len(sidecar) > MAX_SIDECAR_BYTES:
            raise ValueError(f"larger than {MAX_SIDECAR_BYTES >> 20} MB")
        values = json.loads(sidecar)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        caption = values.get("caption")
        if text is None and isinstance(caption, str):
            text = clean(caption).strip()
        drop = {"width", "height"} if "image" in modalities else set()
        if text is not None or caption is None:
            drop.add("caption")
        return text, columns(values, drop)
    except (ValueError, RecursionError) as error:
        return text, {"meta_error": f"JSON sidecar: {error}"}


def columns(values: dict[str, Any], drop: Collection[str] = ()) -> dict[str, Any]:
    """Flat columns: str, int, float, bool or None. Nested values become JSON, numbers that are not finite None."""
    flat: dict[str, Any] = {}
    for name in sorted(values.keys() - set(drop), key=lambda name: (name in RESERVED, name)):
        column = f"meta_{name}" if name in RESERVED else clean(name)
        while column in flat:
            column = f"meta_{column}"
        value = _finite(values[name])
        if isinstance(value, list | dict):
            value = json.dumps(value, ensure_ascii=False, default=str)
        elif value is not None and not isinstance(value, bool | int | float):
            value = str(value)
        flat[column] = clean(value) if isinstance(value, str) else value
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
