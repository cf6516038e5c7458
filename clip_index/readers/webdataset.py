"""Tars as webdataset and img2dataset write them: consecutive members with the same key are one sample.

1. A task is one tar: (path, bytes, what its keys begin with). Tars are read in place, one member at a time.
2. `_members` walks the headers and `_groups` gathers the members of a key. A key ends at the first dot of the base
   name; the last part of the rest says what a member is, and `jpg` goes before `seg.png`. The first picture, caption
   (`txt`) and sidecar (`json`) count; other members are skipped, and so are hidden and `__dunder__` names.
3. A tar that ends too early or is damaged gives the samples before that point, and one failed sample that names it.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

from clip_index import storage
from clip_index.readers import sidecars, sources
from clip_index.types import ClipIndexError, Sample, SampleError, Task, Tasks

_LOOKED_AT = 16
"""Tars, and samples of the first that has any, that are read to find out what a source holds."""
_ROLES = {suffix[1:]: "image" for suffix in sources.IMAGE_SUFFIXES} | {"txt": "text", "json": "sidecar"}
_LIMITS = {
    "image": sources.MAX_IMAGE_BYTES,
    "text": sidecars.MAX_TEXT_BYTES,
    "sidecar": sidecars.MAX_SIDECAR_BYTES,
}


@dataclass(frozen=True)
class WebdatasetReader:
    """Samples from the tars that a folder holds, or that a path or a pattern names."""

    source: str
    modalities: tuple[str, ...]
    found: sources.Files | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "found": None}  # a million names that no worker needs

    def plan(self, rows_per_shard: int) -> Tasks:
        """One task a tar, whatever `rows_per_shard`: only reading tells how many samples a tar holds."""
        found = sources.find(self.source, ".tar") if self.found is None else self.found
        prefix = sources.key_prefixes(found.names, ".tar")

        def make(number: int) -> Task:
            tar = found[number]
            return Task(number, ((tar.path, tar.size, sources.printable(prefix(tar.name))),))

        return Tasks(make, range(len(found)))

    def read(self, task: Task) -> Iterator[Sample]:
        """The samples of a tar. Raises ClipIndexError where the tar cannot be opened or its store fails."""
        for path, _, prefix in task.inputs:
            seen: dict[str, int] = {}
            try:
                with storage.open_read(path) as file:
                    for group in _groups(file, read_images="image" in self.modalities):
                        yield from self._samples(group, path, prefix, seen)
            except SampleError as error:
                name, source = sources.printable(path), storage.file_source(path)
                yield Sample(f"{prefix}#damaged", image_path=name, source=source, error=f"{name} {error}")
            except OSError as error:
                raise ClipIndexError(f"cannot read {path}: {error.strerror or error}") from error

    def _samples(self, group: _Group, path: str, prefix: str, seen: dict[str, int]) -> Iterator[Sample]:
        caption, meta = group.describe(self.modalities)
        image, text = group.parts.get("image"), group.parts.get("text")
        place = image or text or group.parts.get("sidecar")
        if place is None or (image is None and text is None and caption is None):
            return
        name = sources.printable(group.key)
        key = f"{prefix}/{name}"
        source = storage.range_source(path, place.offset, place.size)
        error = group.error(self.modalities)
        if error is not None:
            yield Sample(_unique(key, seen), image_path=name, source=source, error=error)
        else:
            caption = caption or "" if "text" in self.modalities else caption
            data = None if image is None else image.data
            yield Sample(_unique(key, seen), data, caption, image_path=name, source=source, meta=meta)
        if image is not None and not image.exact and group.unread:
            error = f"{group.unread} more pictures have the key {name!r}, which ends at the first dot of a name: rename"
            yield Sample(_unique(key, seen), image_path=name, source=source, error=f"{error} them, or unpack the tar")


@dataclass(frozen=True)
class _Part:
    offset: int
    size: int
    exact: bool
    data: bytes | None = None
    error: str | None = None


@dataclass
class _Group:
    """The members of one key: at most one picture, one caption and one sidecar are held."""

    key: str
    suffixes: set[str] = field(default_factory=set)
    parts: dict[str, _Part] = field(default_factory=dict)
    unread: int = 0

    def add(self, info: tarfile.TarInfo, suffix: str, file: IO[bytes], *, read_images: bool) -> None:
        """Take a member in, or leave it. Raises SampleError where the file ends within it."""
        self.suffixes.add(suffix)
        role = _ROLES.get(suffix.rpartition(".")[2])
        if role is None:
            return
        exact, held = "." not in suffix, self.parts.get(role)
        if held is not None and (held.exact or not exact):
            self.unread += role == "image"
            return
        data = error = None
        what = {"image": "the picture", "text": "its caption", "sidecar": "its sidecar"}[role]
        if info.islnk() or info.issym():
            error = f"{what} is a link to {sources.printable(info.linkname)}, and links are not followed"
        elif info.issparse():
            error = f"{what} is a sparse member: make the tar without --sparse"
        elif info.size > _LIMITS[role]:
            error = f"{what} is larger than {_LIMITS[role] >> 20} MB"
        elif role == "image" and not info.size:
            error = f"{what} is empty"
        elif read_images or role != "image":
            file.seek(info.offset_data)
            data = file.read(info.size)
            if len(data) < info.size:
                name = sources.printable(info.name)
                raise SampleError(f"is cut off at byte {info.offset_data + len(data)}, in {name}")
        self.parts[role] = _Part(info.offset_data, info.size, exact, data, error)

    def describe(self, modalities: tuple[str, ...]) -> tuple[str | None, dict[str, Any]]:
        """(caption, columns)."""
        text, sidecar = self.parts.get("text"), self.parts.get("sidecar")
        caption = None if text is None or text.data is None else sidecars.decode_text(text.data)
        if sidecar is not None and sidecar.error:
            return caption, {"meta_error": sidecar.error}
        return sidecars.merge(caption, None if sidecar is None else sidecar.data, modalities)

    def error(self, modalities: tuple[str, ...]) -> str | None:
        """Why the sample cannot be embedded, or None."""
        image, text = self.parts.get("image"), self.parts.get("text")
        if "image" in modalities and image is None:
            return "no image"
        if "image" in modalities and image.error:
            return image.error
        return text.error if "text" in modalities and text is not None else None


def _groups(file: IO[bytes], *, read_images: bool) -> Iterator[_Group]:
    """The samples of a tar. Raises SampleError behind the last one where the tar is damaged."""
    group = damage = None
    try:
        for info in _members(file):
            key, suffix = _split(info.name)
            if not key:
                continue
            if group is None or key != group.key or suffix in group.suffixes:
                if group is not None:
                    yield group
                group = _Group(key)
            group.add(info, suffix, file, read_images=read_images)
    except SampleError as error:
        damage = error
    if group is not None and (damage is None or not read_images or "image" in group.parts):
        yield group
    if damage is not None:
        raise damage


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar's files and links. Raises SampleError, with the place, where the tar is damaged.

    tarfile takes a damaged header for the end of the tar, so the end is checked here.
    """
    offset = 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (info := tar.next()) is not None:
            if info.size < 0 or tar.offset <= offset:
                raise tarfile.ReadError("negative size")
            offset = tar.offset
            tar.members.clear()  # it would keep them all
            if info.isreg() or info.islnk() or info.issym():
                yield info
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block or block.count(0) < len(block):
            raise tarfile.ReadError("no header where one should be")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        end = file.seek(0, os.SEEK_END)
        if not end:
            raise SampleError("is an empty file") from error
        if end - offset < tarfile.BLOCKSIZE:
            raise SampleError(f"is cut off at byte {end}") from error
        raise SampleError(f"is damaged at byte {offset}: {error}" if offset else f"is not a tar: {error}") from error


def _split(name: str) -> tuple[str, str]:
    """(key, suffix) of a member, split at the first dot of the base name; ("", "") for one that is no sample's."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    hidden = "__" in name and any(re.fullmatch("__.*__", part) for part in (*folder.split("/"), stem))
    if not stem or not suffix or hidden:
        return "", ""
    return folder + slash + stem, suffix.lower()


def _unique(key: str, seen: dict[str, int]) -> str:
    unique = key
    while unique in seen:
        seen[key] += 1
        unique = f"{key}~{seen[key]}"
    seen[unique] = 1
    return unique


def open_source(
    source: str, asked: tuple[str, ...] | None = None, *, listing: sources.Listing | None = None
) -> WebdatasetReader:
    """The reader of tars. What they hold is told from the first samples, unless `asked` says what to embed."""
    found = sources.find(source, ".tar", listing)
    place = source if source.startswith("{") else storage.absolute(source)
    if asked is not None:
        return WebdatasetReader(place, asked, found)
    images = texts = False
    damage = ""
    for tar in found[:_LOOKED_AT]:
        try:
            with storage.open_read(tar.path) as file:
                for group in islice(_groups(file, read_images=False), _LOOKED_AT):
                    images = images or "image" in group.parts
                    texts = texts or "text" in group.parts or group.describe(("text",))[0] is not None
        except SampleError as error:
            damage = damage or f": {tar.path} {error}"
        except OSError as error:
            raise ClipIndexError(f"cannot read {tar.path}: {error.strerror or error}") from error
        if images or texts:
            break
    modalities = sources.choose_modalities(None, source, images=images, texts=texts, hint=damage)
    return WebdatasetReader(place, modalities, found)
