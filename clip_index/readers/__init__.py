"""Sources of samples: folders of files, webdataset tars, parquet tables.

`open_reader` looks at a source and gives its `types.Reader`; `fetch` gives a picture's bytes again from the `source`
column of the metadata. A new format is a module with `open_source`, and a line in `READERS`.
"""

from __future__ import annotations

import importlib
import os

from clip_index import storage
from clip_index.readers import sources
from clip_index.types import MODALITIES, ClipIndexError, Reader, UsageError

READERS = {
    "files": "clip_index.readers.files",
    "webdataset": "clip_index.readers.webdataset",
    "parquet": "clip_index.readers.parquet",
}


def open_reader(
    source: str | os.PathLike[str],
    *,
    input_format: str = "auto",
    modality: str = "auto",
    **columns: str | None,
) -> Reader:
    """The reader of a source: a folder, a file, a brace or glob pattern of tars or parquet files, or a URL of those.

    `input_format` is `auto` or a name in `READERS`; `modality` is `auto` (what the source holds), `image`, `text` or
    `image,text`. `image_column` and `caption_column` name the columns of a parquet table. Raises UsageError where the
    source is missing, empty, mixed, or lacks what was asked for.
    """
    source = os.fspath(source)
    sources.refuse_commands(source)
    asked = _modalities(modality)
    if input_format not in ("auto", *READERS):
        raise UsageError(f"unknown input_format {input_format!r}: choose auto, {', '.join(READERS)}")
    listing = None
    if input_format == "auto":
        input_format, listing = sources.detect(source)
    named = {name: value for name, value in columns.items() if value is not None}
    if named and input_format != "parquet":
        raise UsageError(f"{', '.join(named)}: {source} is read as {input_format}, only parquet tables have columns")
    return importlib.import_module(READERS[input_format]).open_source(source, asked, listing=listing, **named)


def _modalities(modality: str) -> tuple[str, ...] | None:
    if modality == "auto":
        return None
    asked = {name.strip() for name in modality.split(",")}
    if not asked <= set(MODALITIES):
        raise UsageError(f"unknown modality {modality!r}: choose auto, image, text or image,text")
    return tuple(name for name in MODALITIES if name in asked)


def fetch(source: str) -> bytes:
    """A picture's bytes as stored, from the `source` of its row. Raises ClipIndexError where they cannot be had."""
    try:
        data = importlib.import_module(READERS["parquet"]).read_cell(source) if "#row=" in source else None
        return storage.read_source(source) if data is None else data
    except OSError as error:
        raise ClipIndexError(f"cannot read {source}: {error.strerror or error}") from error
