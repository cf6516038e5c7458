"""Lists of URLs as tables: each file of csv, tsv, json, jsonl, txt or parquet, compressed with gzip or not.

What is read is what img2dataset can hand on: text, numbers, truth values and lists of them. Dates become texts, bytes
are left out.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from clip_index import storage
from clip_index.types import UsageError

SUFFIXES = {"csv": "csv", "tsv": "tsv", "json": "json", "jsonl": "jsonl", "ndjson": "jsonl", "txt": "txt"}
SUFFIXES |= {f"{suffix}.gz": format for suffix, format in SUFFIXES.items()} | {"parquet": "parquet"}


def format_of(name: str) -> str | None:
    """The format of a file, by its name."""
    found = re.search(r"\.(\w+(?:\.gz)?)$", name.lower())
    return SUFFIXES.get(found[1]) if found else None


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """A file to read, uncompressed on the way. Raises UsageError where that cannot be done."""
    try:
        with storage.open_read(path) as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not compressed:
                yield file
                return
            with gzip.open(file) as plain:
                yield plain
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def first_line(path: str) -> str:
    """The first line that is not empty."""
    with opened(path) as file:
        for line in iter(lambda: file.readline(1 << 16), b""):
            if line.strip():
                return line.decode("utf-8-sig", "replace").strip()
    return ""


def read(path: str, format: str, texts: Callable[[str], bool]) -> tuple[Any, int]:
    """(table, rows left out for having too few or too many cells); `texts` says which columns are no numbers.

    Raises UsageError where a file is not what its name says.
    """
    import pyarrow as pa

    left_out = [0]
    with opened(path) as file:
        try:
            if format in ("csv", "tsv"):
                table = _read_csv(file, {"csv": ",", "tsv": "\t"}[format], texts, left_out)
            elif format == "txt":
                lines = [line.strip() for line in file.read().decode("utf-8-sig").split("\n")]
                table = pa.table({"url": pa.array([line for line in lines if line and line[0] != "#"], pa.string())})
            else:
                table = _to_table(list(_records(file, format)))
        except (pa.ArrowInvalid, ValueError) as error:
            raise UsageError(f"{path} cannot be read as {format}: {error}") from error
    return plain(table), left_out[0]


def _read_csv(file: IO[bytes], delimiter: str, texts: Callable[[str], bool], left_out: list[int]) -> Any:
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    data = file.read()
    if not data.strip():
        return pa.table({})
    header = next(csv.reader([data.split(b"\n", 1)[0].decode("utf-8-sig").strip("\r")], delimiter=delimiter), [])

    def skip(_: Any) -> str:
        left_out[0] += 1
        return "skip"

    # a caption may go over several lines; in a tab-separated file a quotation mark is more often a plain one
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=delimiter == ",", invalid_row_handler=skip)
    convert = pa_csv.ConvertOptions(column_types={name: pa.string() for name in header if texts(name)})
    return pa_csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)


def _records(file: IO[bytes], format: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file: an array, lines, or pandas's columns; a text alone is a URL."""
    text = file.read().decode("utf-8-sig")
    if not text.strip():
        return
    document = None
    if format == "json":
        try:
            document = json.loads(text)
        except ValueError:
            if len(text.split("\n", 1)[0].strip()) < 3:  # not lines: say what is wrong with the whole
                raise
    if isinstance(document, dict) and document and all(isinstance(value, dict | list) for value in document.values()):
        columns = [list(value.values()) if isinstance(value, dict) else value for value in document.values()]
        document = [dict(zip(document, row, strict=True)) for row in zip(*columns, strict=True)]
    elif document is not None and not isinstance(document, list):
        document = [document]
    lines = enumerate(text.split("\n"), 1) if document is None else ()
    for number, row in lines if document is None else enumerate(document, 1):
        if document is None:
            if not row.strip():
                continue
            try:
                row = json.loads(row)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
        if isinstance(row, str):
            row = {"url": row}
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
        yield row


def _to_table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except pa.ArrowException:  # values of several types
            texts = (value if isinstance(value, str | None) else json.dumps(value) for value in values)
            columns[name] = pa.array(list(texts), pa.string())
    return pa.table(columns)


def is_plain(kind: Any) -> bool:
    """Whether JSON can hold values of a type."""
    import pyarrow as pa

    tests = pa.types
    if tests.is_dictionary(kind):
        return is_plain(kind.value_type)
    if tests.is_nested(kind):
        return not tests.is_map(kind) and all(is_plain(kind.field(i).type) for i in range(kind.num_fields))
    text = tests.is_string(kind) or tests.is_large_string(kind) or tests.is_null(kind)
    return text or tests.is_integer(kind) or tests.is_floating(kind) or tests.is_boolean(kind)


def plain(table: Any) -> Any:
    """A table with dates and decimals as texts, and without what cannot become one."""
    import pyarrow as pa

    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in columns:
            continue
        if is_plain(column.type):
            columns[name] = column
        else:
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                if not pa.types.is_nested(column.type):
                    columns[name] = column.cast(pa.string())
    return pa.table(columns)
