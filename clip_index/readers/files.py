"""A folder of pictures with captions (`.txt`) and sidecars (`.json`) beside them, or a folder of captions alone.

1. The folder is listed once, and each picture is paired with the caption and the sidecar of the same stem.
2. A task holds its files' names and sizes: (name, bytes, caption's suffix, bytes, sidecar's suffix, bytes).
3. `read` reads them in that order; from a remote folder some are read ahead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from clip_index import storage
from clip_index.readers import sidecars, sources
from clip_index.types import Sample, SampleError, Task, UsageError

_SUFFIXES = (*sources.IMAGE_SUFFIXES, ".txt", ".json")
_LOOKED_AT = 16
"""Sidecars that are read to find out whether they hold captions."""

Item = tuple[str, int, str | None, int, str | None, int]


@dataclass(frozen=True)
class FilesReader:
    """Samples from the files below a folder, or from the one file in it that has this `name`."""

    folder: str
    modalities: tuple[str, ...]
    name: str | None = None
    listing: sources.Listing | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "listing": None}  # millions of names that no worker needs

    def plan(self, rows_per_shard: int) -> list[Task]:
        """The files in order of their names, `rows_per_shard` to a task."""
        if rows_per_shard < 1:
            raise UsageError(f"rows_per_shard must be at least 1, not {rows_per_shard}")
        listing = _list(self.folder, self.name) if self.listing is None else self.listing
        items = pair(listing, self.name)
        starts = range(0, len(items), rows_per_shard)
        parts = (tuple(items[start : start + rows_per_shard]) for start in starts)
        return [Task(number, part, len(part)) for number, part in enumerate(parts)]

    def read(self, task: Task) -> Iterator[Sample]:
        """One sample for each file of the task; one that cannot be read has an error."""
        if storage.is_url(self.folder):
            return sources.ahead(self._sample, task.inputs)
        return map(self._sample, task.inputs)

    def _sample(self, item: Item) -> Sample:
        name = item[0]
        path = storage.join(self.folder, name)
        names = {
            "key": sources.printable(name),
            "image_path": sources.printable(path),
            "source": storage.file_source(path),
        }
        try:
            image = None
            if "image" in self.modalities and not _is_caption(name):
                image = sources.read_image(path, "the file", item[1])
            text, meta = self._beside(item)
        except SampleError as error:
            return Sample(**names, error=str(error))
        return Sample(**names, image=image, text=text or "" if "text" in self.modalities else text, meta=meta)

    def _beside(self, item: Item) -> tuple[str | None, dict[str, Any]]:
        stem = storage.join(self.folder, os.path.splitext(item[0])[0])
        text = None
        if item[2] is not None:
            try:
                data = sources.read_file(stem + item[2], "its caption", sidecars.MAX_TEXT_BYTES, item[3])
                text = sidecars.decode_text(data)
            except SampleError:
                if "text" in self.modalities:
                    raise
        if item[4] is None:
            return text, {}
        try:
            sidecar = sources.read_file(stem + item[4], "its sidecar", sidecars.MAX_SIDECAR_BYTES, item[5])
        except SampleError as error:
            return text, {"meta_error": str(error)}
        return sidecars.merge(text, sidecar, self.modalities)


def open_source(
    source: str, asked: tuple[str, ...] | None = None, *, listing: sources.Listing | None = None
) -> FilesReader:
    """The reader of a folder, or of one picture or text. Raises UsageError where there is nothing to read."""
    path = storage.absolute(source)
    if storage.is_folder(path):
        folder, name = path, None
    elif storage.exists(path):
        folder, name = path.rsplit("/", 1) if storage.is_url(path) else os.path.split(path)
    else:
        raise UsageError(f"no such file or folder: {source}")
    listing = _list(folder, name) if listing is None else listing
    items = pair(listing, name)
    images = bool(items) and not _is_caption(items[0][0])
    looking = FilesReader(folder, ("text",), name, listing)
    with_sidecar = (item for item in items if item[4])
    texts = any(item[2] for item in items) or any(
        looking._sample(item).text for item in islice(with_sidecar, _LOOKED_AT)
    )
    hint = f" (pictures are {' '.join(sources.IMAGE_SUFFIXES)}; a caption is a .txt with the picture's name)"
    modalities = sources.choose_modalities(asked, source, images=images, texts=texts, hint=hint)
    return FilesReader(folder, modalities, name, listing)


def pair(listing: sources.Listing, name: str | None = None) -> list[Item]:
    """Pictures with the caption and the sidecar of the same stem; where there is no picture, the captions.

    `name` is a picture whatever its suffix, and other pictures are left out then.
    """
    none: tuple[None, int] = (None, 0)
    pictures: list[tuple[str, str, int]] = []
    texts: list[tuple[str, str, str, int]] = []
    sidecar: dict[str, tuple[str, int]] = {}
    for file, size in listing:
        stem, suffix = os.path.splitext(file)
        kind = suffix.lower()
        if kind == ".txt":
            texts.append((file, stem, sys.intern(suffix), size))
        elif kind == ".json":
            sidecar[stem] = sys.intern(suffix), size
        elif file == name or (name is None and kind in sources.IMAGE_SUFFIXES):
            pictures.append((file, stem, size))
    if not pictures:
        return [(file, size, suffix, size, *sidecar.get(stem, none)) for file, stem, suffix, size in texts]
    captions = {stem: (suffix, size) for _, stem, suffix, size in texts}
    return [(file, size, *captions.get(stem, none), *sidecar.get(stem, none)) for file, stem, size in pictures]


def _is_caption(name: str) -> bool:
    return name.lower().endswith(".txt")


def _list(folder: str, name: str | None) -> sources.Listing:
    if name is None:
        return storage.list_files(folder, _SUFFIXES)
    stem, suffix = os.path.splitext(name)
    beside = (".json",) if suffix.lower() == ".txt" else (".txt", ".json")
    names = [
        file
        for file in storage.list_names(folder)
        if file == name or (os.path.splitext(file)[0] == stem and file.lower().endswith(beside))
    ]
    return [(file, storage.size(storage.join(folder, file))) for file in names]
