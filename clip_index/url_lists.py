"""A list of URLs: which files it has, which of their columns count, and the same list as img2dataset can read it.

1. `find` names the files: one, or all of a folder, format told by the name.
2. `prepare` reads them, chooses the columns (`Columns`), and writes what is not parquet as parquet into a temporary
   folder: img2dataset alone would split URLs of txt files at commas, drop samples for a column of dates, and refuse
   captions of several lines.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from clip_index import storage, url_tables
from clip_index.types import UsageError

URL_NAMES = ("imageurl", "imgurl", "photourl", "photoimageurl", "pictureurl", "imagelink", "imagesrc", "url", "urls")
URL_NAMES += ("uri", "src", "link", "href", "contenturl", "thumbnailurl", "image", "img", "photo")
"""Names of URL columns in the order in which they are tried, without letter case and punctuation. A table with
`image_url` and `url` has pages in the latter."""
CAPTION_NAMES = ("caption", "text", "txt", "alt", "alttext", "title", "description", "prompt")
RESERVED = {"key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message"}
RESERVED |= {"exif", "md5", "sha256", "sha512", "image_path", "source"}
"""Column names that img2dataset, or our metadata, uses for something else, in any letter case."""
_PART = 1 << 20


class ListFile(NamedTuple):
    """One file of a list."""

    path: str
    size: int
    format: str


@dataclass(frozen=True)
class Columns:
    """The columns that are used; `others` become metadata."""

    url: str
    caption: str | None
    others: tuple[str, ...]

    def __str__(self) -> str:
        captions = f"captions in {self.caption}" if self.caption else "no captions"
        return f"URLs in {self.url}, {captions}{', keeping ' + ', '.join(self.others) if self.others else ''}"


@dataclass(frozen=True)
class UrlList:
    """A list that img2dataset reads: a folder of parquet files, and the rows of each."""

    folder: str
    rows: tuple[int, ...]
    columns: Columns
    left_out: int = 0


def find(source: str, input_format: str = "auto") -> list[ListFile]:
    """The files of a list, in order. Raises UsageError where there is none, or its format cannot be told."""
    path, asked = storage.absolute(source), input_format.removesuffix(".gz")
    if storage.is_folder(path):
        listed = [(storage.join(path, name), size) for name, size in storage.list_files(path)]
    elif storage.exists(path):
        listed = [(path, storage.size(path))]
    else:
        raise UsageError(f"no such file or folder: {source}")
    told = [ListFile(name, size, url_tables.format_of(name) or "") for name, size in listed]
    if asked != "auto" and len(told) == 1:
        return [told[0]._replace(format=asked)]
    found = [file for file in told if file.format and asked in ("auto", file.format)]
    for others in ("txt",), ("txt", "json"):  # a README or a description beside the lists
        found = [file for file in found if file.format not in others] or found
    if not found:
        kinds = "csv, tsv, json, jsonl, txt (or any of them .gz) or parquet" if asked == "auto" else asked
        hint = "" if storage.is_folder(path) else "; --input_format says what it is"
        raise UsageError(f"no list of URLs in {source}: expected {kinds}{hint}")
    return found


def is_list(source: str) -> bool:
    """Whether a source is a list of URLs rather than pictures, tars or tables of them. Raises UsageError if missing."""
    path = storage.absolute(source)
    names = [name for name, _ in storage.list_files(path)] if storage.is_folder(path) else [path]
    if any(re.search(r"\.(tar|jpe?g|png|webp|bmp|gif|tiff?)$", name, re.IGNORECASE) for name in names):
        return False
    if not storage.exists(path):
        if glob.has_magic(source) or "{" in source:
            return False
        raise UsageError(f"no such file or folder: {source}")
    formats = {url_tables.format_of(name): name for name in reversed(names)}
    if formats.keys() & {"csv", "tsv", "jsonl"}:
        return True
    if "parquet" in formats:
        name = formats["parquet"]
        return _is_table_of_urls(path if name == path else storage.join(path, name))
    if name := formats.get("txt") or formats.get("json"):
        line = url_tables.first_line(path if name == path else storage.join(path, name))
        return line.startswith("[") or re.search(r"https?://", line) is not None
    return False


def _is_table_of_urls(path: str) -> bool:
    import pyarrow as pa

    schema = _schema(path)
    kinds = [field.type for field in schema]
    if any(pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in kinds):
        return False
    return _guess(schema.names, URL_NAMES[: URL_NAMES.index("image")]) is not None


def digest(files: list[ListFile]) -> str:
    """Identifies a list: names and sizes of its files, and what the beginning and the end of each hold."""
    found = hashlib.sha256()
    for path, size, format in files:
        found.update(f"{os.path.basename(path)}\0{size}\0{format}\0".encode("utf-8", "surrogatepass"))
        found.update(storage.read_bytes(path, 0, min(size, _PART)))
        found.update(storage.read_bytes(path, max(0, size - _PART), min(size, _PART)))
    return found.hexdigest()[:16]


def prepare(
    files: list[ListFile],
    folder: str,
    *,
    url: str | None = None,
    caption: str | None = None,
    others: list[str] | None = None,
    needed: Iterable[str] = (),
) -> UrlList:
    """Choose columns and make a list that img2dataset reads; `folder` is for what has to be written.

    `url`, `caption` ("none" for no captions) and `others` are the columns that were asked for, `needed` those that are
    read besides. Raises UsageError for columns that are not there, and for a list without URLs.
    """
    named = {name for name in (url, caption) if name}
    texts = {*URL_NAMES, *CAPTION_NAMES}
    tables, left_out = {}, 0
    for file in files:
        if file.format != "parquet":
            read = url_tables.read(file.path, file.format, lambda name: name in named or _bare(name) in texts)
            tables[file], left_out = read[0], left_out + read[1]
    schemas = {file: tables[file].schema if file in tables else _schema(file.path) for file in files}
    schemas = {file: schema for file, schema in schemas.items() if schema.names}
    if not schemas:
        raise UsageError(f"no URLs in {files[0].path}: it is empty")
    columns = _choose(schemas, url, caption, others)
    used = dict.fromkeys([columns.url, *([columns.caption] if columns.caption else []), *columns.others, *needed])
    rows = []
    for number, (file, schema) in enumerate(schemas.items()):
        as_it_is = file not in tables and all(url_tables.is_plain(schema.field(name).type) for name in used)
        rows.append(_write(file, tables.get(file), used, os.path.join(folder, f"{number:05d}.parquet"), as_it_is))
    if not sum(rows):
        raise UsageError(f"no URLs in {files[0].path}: it has no rows")
    return UrlList(folder, tuple(rows), columns, left_out)


def _write(file: ListFile, table: Any, used: Iterable[str], target: str, as_it_is: bool) -> int:
    """Put a file's columns where img2dataset finds them, as a link where nothing has to change: its rows."""
    import pyarrow.parquet as pq

    if as_it_is and not storage.is_url(file.path):
        os.symlink(file.path, target)
        with storage.open_read(file.path) as opened:
            return pq.ParquetFile(opened).metadata.num_rows
    if table is None:
        with storage.open_read(file.path) as opened:
            table = url_tables.plain(pq.read_table(opened, columns=list(used)))
    missing = [name for name in used if name not in table.column_names]
    if missing:
        raise UsageError(f"column {missing[0]!r} of {file.path} is missing, or its values cannot be written as text")
    table = table.select(list(used))
    pq.write_table(table, target)
    return table.num_rows


def _schema(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_read(path) as file:
            return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} cannot be read as parquet: {error}") from error


def _choose(schemas: dict[ListFile, Any], url: str | None, caption: str | None, others: list[str] | None) -> Columns:
    """The columns that every file has, and that were asked for or have a telling name."""
    first, schema = next(iter(schemas.items()))
    shared = [name for name in schema.names if all(name in other.names for other in schemas.values())]
    for option, name in {"url_col": url, "caption_col": None if caption == "none" else caption}.items():
        if name is not None:
            _require(option, name, schemas)
    url = url or _guess(shared, URL_NAMES)
    if url is None:
        names = ", ".join(schema.names[:20])
        hint = "it lacks a line with names" if "://" in names else "name it with --url_col"
        raise UsageError(f"no column of URLs in {first.path}, only {names}: {hint}")
    if caption is None:
        caption = _guess([name for name in shared if name != url], CAPTION_NAMES)
    caption = None if caption == "none" else caption
    for name in others or ():
        _require("save_additional_columns", name, schemas)
        if name.lower() in RESERVED and name not in (url, caption):
            raise UsageError(f"--save_additional_columns: {name!r} is the name of a column that the download makes")
    if others is None:
        fit = [
            name for name in shared if all(url_tables.is_plain(other.field(name).type) for other in schemas.values())
        ]
        others = [name for name in fit if name.lower() not in RESERVED]
    return Columns(url, caption, tuple(name for name in others if name not in (url, caption)))


def _require(option: str, name: str, schemas: dict[ListFile, Any]) -> None:
    for file, schema in schemas.items():
        if name not in schema.names:
            raise UsageError(f"--{option}: no column {name!r} in {file.path}, only {', '.join(schema.names[:20])}")


def _guess(names: list[str], telling: tuple[str, ...]) -> str | None:
    bare = {_bare(name): name for name in reversed(names)}
    return next((bare[name] for name in telling if name in bare), None)


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
