"""What lies below a remote folder.

1. S3 is asked page by page, and nothing is kept of a page but names and sizes: its fsspec filesystem would make a
   dictionary and some folders for each name, and would list a whole folder to tell that it is one.
2. Other stores are listed as their fsspec filesystems do it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from clip_index import remote

_UNREAD = re.compile(rb"<(LastModified|ETag|StorageClass|ChecksumAlgorithm|ChecksumType)>[^<]*</\1>")


def files(folder: str) -> Iterator[tuple[str, int]]:
    """(path relative to the folder, bytes) of every object below it, less those with a hidden part."""
    found = _s3_files(folder) if _is_s3(folder) else _other_files(folder)
    return ((name, size) for name, size in found if name and not name.endswith("/") and "/." not in f"/{name}")


def names(folder: str) -> Iterator[str]:
    """The names directly in a folder. Raises FileNotFoundError where there is none."""
    if _is_s3(folder):
        for page in _s3_pages(folder, Delimiter="/"):
            found = [item["Key"] for item in page.get("Contents", ())]
            found += [item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", ())]
            yield from (key.rpartition("/")[2] for key in found if not key.endswith("/"))
    else:
        for path in remote.call(folder, lambda fs, name: fs.ls(name, detail=False)):
            yield path.rstrip("/").rpartition("/")[2]


def exists(path: str) -> bool:
    """Whether a file or folder is there. Raises OSError where that cannot be told."""
    if _is_s3(path):
        return remote.call(path, lambda fs, name: fs.exists(name))
    return _about(path) is not None


def is_folder(path: str) -> bool:
    """Whether anything lies below a path; a bucket is a folder though it be empty. Raises OSError as `exists` does."""
    if not _is_s3(path):
        found = _about(path) or {}
        if remote.is_web(path):  # a page of links
            return found.get("mimetype") == "text/html" and remote.call(path, lambda fs, name: fs.isdir(name))
        return found.get("type") == "directory"
    try:
        page = next(_s3_pages(path, MaxKeys=1))
    except FileNotFoundError:
        return False
    return bool(page.get("Contents")) or not _s3_location(path)[1]


def _about(path: str) -> dict[str, Any] | None:
    """What a store says of a path; its own `exists` and `isdir` say no where it does not answer."""
    try:
        return remote.call(path, lambda fs, name: fs.info(name))
    except FileNotFoundError:
        return None


def _is_s3(path: str) -> bool:
    return path.startswith(("s3://", "s3a://"))


def _s3_location(folder: str) -> tuple[str, str]:
    """(bucket, what the keys below a folder begin with)."""
    bucket, _, key = folder.partition("://")[2].rstrip("/").partition("/")
    return bucket, f"{key}/" if key else ""


def _s3_files(folder: str) -> Iterator[tuple[str, int]]:
    start = len(_s3_location(folder)[1])
    for page in _s3_pages(folder):
        yield from ((item["Key"][start:], item["Size"]) for item in page.get("Contents", ()))


def _s3_pages(folder: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The answers of list_objects_v2; each is asked for again where that may help."""
    fs = shared = remote.filesystem(folder)[0]
    bucket, prefix = _s3_location(folder)
    asked = {"Bucket": bucket, "Prefix": prefix, **options}
    while True:
        page = remote.persist(folder, partial(fs.call_s3, "list_objects_v2", **asked))
        yield page
        if not page.get("IsTruncated"):
            return
        if fs is shared:
            fs = remote.persist(folder, partial(_for_listings, shared))
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _for_listings(shared: Any) -> Any:
    """A filesystem of the same settings, for listings alone: two thirds of their time would go into reading dates."""
    fs = type(shared)(*shared.storage_args, **{**shared.storage_options, "skip_instance_cache": True})
    fs.connect().meta.events.register("before-parse.s3.ListObjectsV2", _leave_out_unread)
    return fs


def _leave_out_unread(response_dict: dict[str, Any], **_: Any) -> None:
    if response_dict["status_code"] < 300:
        response_dict["body"] = _UNREAD.sub(b"", response_dict["body"])


def _other_files(folder: str) -> Iterator[tuple[str, int]]:
    name = remote.filesystem(folder)[1]
    root = name.rstrip("/") + "/"
    for path, info in remote.call(folder, lambda fs, name: fs.find(name, detail=True)).items():
        relative = path[len(root) :] if path.startswith(root) else path.removeprefix(name).lstrip("/")
        yield relative, int(info.get("size") or 0)
