"""What a source is: its format, its files, the names of its samples."""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from clip_index import storage
from clip_index.types import ClipIndexError, SampleError, UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tiff", ".tif")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_IMAGE_BYTES = 256 << 20
"""Larger pictures are failed samples: a reader holds one picture in memory, whatever the source says."""

Listing = list[tuple[str, int]]
"""(path relative to the folder, bytes) of files, sorted."""

_KINDS = {"tars": (".tar",), "compressed tars": COMPRESSED_TARS, "parquet files": (".parquet",)}
_KINDS |= {"pictures": IMAGE_SUFFIXES, "captions": (".txt",), "sidecars": (".json",)}


class Found(NamedTuple):
    """A file of a source, and its path relative to the folder that all of the source's files share."""

    path: str
    size: int
    name: str


def refuse_commands(source: str) -> None:
    """Raise UsageError for a URL that other tools would run as a command."""
    if re.match(r"\s*(pipe|exec|sh|bash|cmd):", source, re.IGNORECASE):
        raise UsageError(f"{source!r} is a command, and commands are never run: give a file, a folder or a URL")


def detect(source: str) -> tuple[str, Listing | None]:
    """(format of a source, and its listing where it is a folder). Raises UsageError where it cannot be told."""
    path = storage.absolute(source)
    if storage.is_folder(path):
        listing = _list(path, [suffix for kind in _KINDS.values() for suffix in kind])
        return _format_of_folder(source, listing), listing
    pattern = not storage.exists(path)
    if pattern and not glob.has_magic(source) and "{" not in source:
        raise UsageError(f"no such file or folder: {source}")
    kind = kind_of(source)
    if kind == "tars":
        return "webdataset", None
    if kind == "parquet files":
        return "parquet", None
    if kind in ("pictures", "captions") and not pattern:
        return "files", None
    if kind == "compressed tars":
        raise UsageError(_compressed(source))
    if pattern:
        raise UsageError(
            f"cannot tell what {source!r} matches: end the pattern in .tar or .parquet, or give --input_format"
        )
    raise UsageError(f"cannot tell what {source} is: give --input_format files, webdataset or parquet")


def _list(folder: str, suffixes: Iterable[str]) -> Listing:
    """A folder's files and its JSON, less the tables that a run with its output in there has written."""
    listing = storage.list_files(folder, {*suffixes, ".json"})
    folders = {name.rpartition("/")[0] for name, _ in listing}
    own = []
    for name, _ in listing:
        head, _, base = name.rpartition("/")
        if base == "clip_index.json" or (base == "manifest.json" and f"{head}/done".lstrip("/") in folders):
            own += [f"{head}/{part}/".lstrip("/") for part in ("metadata", "failed")]
    return [item for item in listing if not item[0].startswith(tuple(own))] if own else listing


def kind_of(name: str) -> str | None:
    """What a file is, by its name."""
    return next((kind for kind, suffixes in _KINDS.items() if name.lower().endswith(suffixes)), None)


def _format_of_folder(folder: str, listing: Listing) -> str:
    suffixes = Counter(name.rpartition(".")[2].lower() for name, _ in listing)
    counts = {kind: sum(suffixes[end.rpartition(".")[2]] for end in ends) for kind, ends in _KINDS.items()}
    if counts["compressed tars"]:
        raise UsageError(_compressed(folder))
    formats = {"webdataset": counts["tars"], "parquet": counts["parquet files"], "files": counts["pictures"]}
    there = [name for name, count in formats.items() if count]
    if counts["pictures"] and counts["parquet files"] and not counts["tars"] and _is_download_of_files(listing):
        return "files"
    if "files" in there and len(there) > 1:
        kinds = ((kind.removesuffix("s") if count == 1 else kind, count) for kind, count in counts.items())
        held = ", ".join(f"{count} {kind}" for kind, count in kinds if count and not kind.startswith("sidecar"))
        raise UsageError(f"{folder} holds {held}: say which to read with --input_format {' or '.join(there)}")
    if there:
        return there[0]
    if counts["captions"]:
        return "files"
    raise UsageError(f"nothing to read in {folder}: no pictures, captions (.txt), tars or parquet files")


def _is_download_of_files(listing: Listing) -> bool:
    """Whether img2dataset wrote the folder as files: its tables list the pictures that lie in folders beside them."""
    names = {name for name, _ in listing}
    tables = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
    return all(f"{table}_stats.json" in names for table in tables)


def _compressed(source: str) -> str:
    return f"{source}: compressed tars cannot be read in part; uncompress them first, pictures gain nothing by it"


class Files(Sequence[Found]):
    """Files as `root + name`; what is kept of each is its name and its size, some 80 bytes."""

    def __init__(self, root: str, named: Iterable[tuple[str, int]]):
        self.root, self.names, self.sizes = root, [], array("q")
        for name, size in named:
            self.names.append(name)
            self.sizes.append(size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        return Found(self.root + self.names[place], self.sizes[place], self.names[place])


def find(source: str, suffix: str, listing: Listing | None = None) -> Files:
    """The files of a source that is a folder, a path, or a brace or glob pattern. Raises UsageError where one is not.

    A folder's files are sorted by name, a pattern's as `storage.expand` orders them; each file comes once.
    """
    path = storage.absolute(source)
    if storage.is_folder(path):
        listing = _list(path, (suffix,)) if listing is None else listing
        kind = kind_of(suffix)
        found = Files(storage.join(path, ""), (item for item in listing if kind_of(item[0]) == kind))
        if not found:
            raise UsageError(f"no {suffix} files in {source}")
        return found
    try:
        paths = list(dict.fromkeys(path.replace(os.sep, "/") for path in storage.expand(source)))
    except ClipIndexError as error:
        raise UsageError(str(error)) from error
    sizes = list(ahead(_size, paths)) if storage.is_url(paths[0]) else [_size(path) for path in paths]
    missing = [path for path, size in zip(paths, sizes, strict=True) if size is None]
    if missing:
        of = f" ({len(missing)} of {len(paths)} are missing; a glob such as *{suffix} takes those that are there)"
        raise UsageError(f"no such file: {missing[0]}{of if len(paths) > 1 else ''}")
    folders = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, folders)
    start = sum(len(parts[0]) + 1 for parts in shared)
    return Files(paths[0][:start], ((path[start:], size) for path, size in zip(paths, sizes, strict=True)))


def _size(path: str) -> int | None:
    try:
        if storage.is_folder(path):
            raise UsageError(f"{path} is a folder: end the pattern in file names, or give the folder alone")
        return storage.size(path)
    except FileNotFoundError:
        return None


def key_prefixes(names: list[str], suffix: str) -> Callable[[str], str]:
    """What the keys of a file's samples begin with, by its name: the name without the suffix.

    The suffix stays where a key of the file could otherwise be one of another file too, as with `a.tar` and `a/b.tar`.
    """
    folders = {name.rpartition("/")[0] for name in names}
    taken = {name[:end] for name in folders for end in range(len(name)) if name[end] == "/"} | folders | set(names)
    ambiguous = {name for name in names if name.removesuffix(suffix) in taken}
    return lambda name: name if name in ambiguous else name.removesuffix(suffix)


def choose_modalities(
    asked: tuple[str, ...] | None, source: str, *, images: bool, texts: bool, hint: str = ""
) -> tuple[str, ...]:
    """What to embed: what was asked for, or all that is there. Raises UsageError where something is not there."""
    there = {"image": images, "text": texts}
    for name in asked or ():
        if not there[name]:
            what = {"image": "pictures", "text": "captions"}[name]
            raise UsageError(f"no {what} in {source}, and modality {','.join(asked)} asks for them{hint}")
    found = asked or tuple(name for name, present in there.items() if present)
    if not found:
        raise UsageError(f"no pictures or captions in {source}{hint}")
    return found


def read_image(path: str, what: str, size: int | None = None) -> bytes:
    """A picture's bytes; `size` saves asking for it. Raises as `read_file` does, and SampleError for an empty file."""
    data = read_file(path, what, MAX_IMAGE_BYTES, size)
    if not data:
        raise SampleError(f"{what} is empty")
    return data


def read_file(path: str, what: str, limit: int, size: int | None = None) -> bytes:
    """A file's bytes. Raises SampleError for one that is missing, unreadable or larger than `limit`.

    Raises ClipIndexError where a remote store fails otherwise: the same request may succeed later.
    """
    remote = storage.is_url(path)
    try:
        if not remote:
            info = os.stat(path)
            size = info.st_size
            if not stat.S_ISREG(info.st_mode):
                raise SampleError(f"{what} is no regular file")
        if (storage.size(path) if size is None else size) > limit:
            raise SampleError(f"{what} is larger than {limit >> 20} MB")
        return storage.read_bytes(path)
    except OSError as error:
        if remote and not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise ClipIndexError(f"cannot read {path}: {error}") from error
        raise SampleError(f"cannot read {what}: {error.strerror or error}") from error


def printable(name: str) -> str:
    """A file name as valid Unicode, distinct names staying distinct: undecodable bytes become backslash escapes."""
    if storage.is_unicode(name) and not re.search(r"\\ud[89a-f]", name):
        return name
    return name.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()


_In = TypeVar("_In")
_Out = TypeVar("_Out")


def ahead(function: Callable[[_In], _Out], items: Iterable[_In], threads: int = 16) -> Iterator[_Out]:
    """`map` on threads, in order, at most twice as many items under way as threads: requests' latencies overlap."""
    pool = ThreadPoolExecutor(threads)
    try:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
