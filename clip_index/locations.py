"""Which index the user means, and where this package keeps what it fetched."""

from __future__ import annotations

import contextlib
import os

from clip_index import storage
from clip_index.types import ClipIndexError, UsageError

MARKER = "clip_index.json"


def is_index(folder: str) -> bool:
    """Whether a folder holds an index."""
    return storage.exists(storage.join(folder, MARKER))


def cache_folder() -> str:
    """Where this package keeps what it can fetch or find again: $XDG_CACHE_HOME/clip-index."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clip-index")


def remember(folder: str) -> None:
    """Record the index built last on this machine; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError):
        storage.write_bytes(os.path.join(cache_folder(), "last_index"), storage.absolute(folder).encode())


def last_built() -> str | None:
    """The index built last on this machine, if it is still there."""
    with contextlib.suppress(OSError, ClipIndexError):
        folder = storage.read_bytes(os.path.join(cache_folder(), "last_index")).decode()
        return folder if is_index(folder) else None
    return None


def find_index(index: str | None = None) -> str:
    """The index to search: the one named, else $CLIP_INDEX, else ./index, else the one built last on this machine.

    Raises UsageError where the one named is no index, and where there is none at all.
    """
    for name, said in ((index, "--index"), (os.environ.get("CLIP_INDEX"), "$CLIP_INDEX")):
        if name:
            folder = storage.absolute(name)
            if not is_index(folder):
                raise UsageError(f"{said} names {folder}, which holds no index: make one with `clip-index build-index`")
            return folder
    if is_index("index"):
        return storage.absolute("index")
    if folder := last_built():
        return folder
    raise UsageError("no index found: name one with --index, or make one with `clip-index build-index`")
