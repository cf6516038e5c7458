"""Which columns of a table hold the pictures and the captions, and their values as Python has them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from clip_index import storage
from clip_index.types import SampleError, UsageError

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "bytes")
PATH_NAMES = ("image_path", "path", "filename", "file_name")
CAPTION_NAMES = ("caption", "text", "txt", "alt", "title")
"""Column names in the order in which they are tried, in any letter case."""
_STORES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "memory")


@dataclass(frozen=True)
class Roles:
    """The columns of the picture, of the caption, and of the picture's name where the picture is stored as bytes."""

    image: str | None = None
    caption: str | None = None
    path: str | None = None

    def check(self, schema: Any, file: str) -> None:
        """Raise UsageError where a file's columns are not those of the others."""
        for name, fits in ((self.image, image_kind), (self.caption, is_text), (self.path, is_text)):
            if name is not None and (name not in schema.names or not fits(schema.field(name).type)):
                kind = schema.field(name).type if name in schema.names else "missing"
                raise UsageError(f"column {name!r} of {file} is {kind}, unlike in other files: read them apart")

    def kind(self, schema: Any) -> str | None:
        """How the image column holds pictures: `bytes`, `struct`, `path`, or None without one."""
        return None if self.image is None else image_kind(schema.field(self.image).type)

    def picture_leaves(self, schema: Any, *, with_bytes: bool) -> list[str]:
        """What to read of the image column: all of it, or no more than the paths."""
        kind = self.kind(schema)
        if with_bytes or kind == "path":
            return [self.image] if kind else []
        has_path = kind == "struct" and any(field.name == "path" for field in schema.field(self.image).type)
        return [f"{self.image}.path"] if has_path else []


def choose(schema: Any, file: str, image: str | None = None, caption: str | None = None) -> Roles:
    """The roles of a table's columns. Raises UsageError where a named column is not there, or of no use."""
    if image is not None:
        _require(schema, file, "image_column", image, image_kind, "binary, a struct of bytes and path, or a path")
    if caption is not None:
        _require(schema, file, "caption_column", caption, is_text, "text")
    if image is None:
        image = _first(schema, IMAGE_NAMES, image_kind) or _first(schema, PATH_NAMES, is_text)
    if caption is None:
        caption = _first(schema, CAPTION_NAMES, is_text)
    if caption == image:
        caption = None
    path = None
    if image is not None and image_kind(schema.field(image).type) != "path":
        path = _first(schema, PATH_NAMES, is_text)
    return Roles(image, caption, path)


def _require(schema: Any, file: str, option: str, name: str, fits: Callable[[Any], Any], expected: str) -> None:
    if name not in schema.names:
        raise UsageError(f"{option}: no column {name!r} in {file}, only {', '.join(schema.names)}")
    if not fits(schema.field(name).type):
        raise UsageError(f"{option}: column {name!r} of {file} is {schema.field(name).type}, not {expected}")


def _first(schema: Any, names: tuple[str, ...], fits: Callable[[Any], Any]) -> str | None:
    there = {field.name.lower(): field.name for field in reversed(schema) if fits(field.type)}
    return next((there[name] for name in names if name in there), None)


def image_kind(kind: Any) -> str | None:
    """How a column of this type holds pictures: as `bytes`, a `struct` or a `path`; None where it cannot."""
    import pyarrow as pa

    if _is_binary(kind):
        return "bytes"
    if is_text(kind):
        return "path"
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if _is_binary(fields.get("bytes", pa.null())) or is_text(fields.get("path", pa.null())):
            return "struct"
    return None


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def carried(kind: Any) -> bool:
    """Whether a column of this type can become metadata: anything without binary values in it."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return carried(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return carried(kind.value_type)
    return not _is_binary(kind) and all(carried(kind.field(i).type) for i in range(kind.num_fields))


def plain(array: Any) -> list[Any]:
    """A column's values; text that is not UTF-8, which parquet files can hold, gets U+FFFD where it is wrong."""
    import pyarrow as pa

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        raw = array.view(pa.binary() if pa.types.is_string(array.type) else pa.large_binary())
        return [None if value is None else value.decode("utf-8", "replace") for value in raw.to_pylist()]
    return array.to_pylist()


def pictures(array: Any) -> Iterator[tuple[bytes | None, str | None]]:
    """(bytes, path) of each cell of an image column, one picture in memory at a time."""
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        parts = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
    else:
        parts = {"path" if is_text(array.type) else "bytes": array}
    blobs, paths = parts.get("bytes"), parts.get("path")
    names = [None] * len(array) if paths is None or not is_text(paths.type) else plain(paths)
    for i, name in enumerate(names):
        yield None if blobs is None or not _is_binary(blobs.type) else blobs[i].as_py(), name


def locate(path: str, table: str) -> str:
    """The file that a path in a table names: as it is, or relative to the table's folder.

    Raises SampleError for what a table may not name: it is data, and must not make this machine call others.
    """
    protocol = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)(://|::)", path)
    if protocol is None and not re.match(r"pipe:", path, re.IGNORECASE):
        if os.path.isabs(path):
            return path
        folder = table.rsplit("/", 1)[0] if storage.is_url(table) else os.path.dirname(table)
        return storage.absolute(storage.join(folder, path))
    if protocol is not None and protocol[1].lower() in ("http", "https"):
        raise SampleError(f"{path} is on the web, and is not fetched from here: run clip-index download first")
    if protocol is None or protocol[1].lower() not in _STORES or "::" in path:
        raise SampleError(f"{path} is not a path, nor a URL of file, s3 or another store")
    return storage.absolute(path)
