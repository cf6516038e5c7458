"""The folder that a download fills: img2dataset's shards, and a marker that says what they were made from.

A shard is finished when its `NNNNN_stats.json`, which is written last, can be read and its data is whole. What lies
there of other shards was cut off: it is removed, and downloaded again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from contextlib import suppress
from typing import Any

from clip_index import storage
from clip_index.types import UsageError

MARKER = "clip_index_download"
"""Without a suffix: img2dataset takes each .json here for its own, readers each .txt for a caption."""
_STATS = re.compile(r"(\d+)_stats\.json$")
_SHARD = re.compile(r"(\d+)(\.tar|\.parquet|\.tfrecord|_stats\.json)?$")
_DATA = {"webdataset": ".tar", "parquet": ".parquet", "tfrecord": ".tfrecord", "files": "", "dummy": None}
_TAR_END = bytes(1024)


class DownloadFolder:
    """What is in the folder. Raises UsageError where other people's files would be in the way."""

    def __init__(self, path: str, output_format: str):
        self.path = storage.absolute(path)
        self._data = _DATA[output_format]
        if storage.is_url(self.path) and self._data == "":
            self._data = None  # a shard without pictures has no folder in an object store
        self._known: dict[str, dict[str, Any]] = {}
        if storage.exists(self.path) and not storage.is_folder(self.path):
            raise UsageError(f"{path} is a file: name a folder to download into")
        names = storage.list_names(self.path)
        strange = [name for name in names if name.endswith(".json") and not _STATS.match(name)]
        if MARKER not in names and not self.begun():  # what looks like a shard is one of something else
            strange += [name for name in names if _SHARD.match(name)]
        if strange:
            raise UsageError(f"{path} holds other files ({strange[0]}): name a new folder to download into")

    def begun(self) -> bool:
        """Whether any shard was ever finished."""
        return any(_STATS.match(name) for name in storage.list_names(self.path))

    def marker(self) -> dict[str, Any]:
        """What the shards were made from; empty where that is not known."""
        try:
            found = json.loads(storage.read_bytes(storage.join(self.path, MARKER)))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("shards"), int) else {}

    def mark(self, made_from: dict[str, Any]) -> None:
        """Write what the shards are made from."""
        storage.make_folder(self.path)
        storage.write_bytes(storage.join(self.path, MARKER), (json.dumps(made_from, indent=1) + "\n").encode())

    def finished(self) -> dict[int, dict[str, Any]]:
        """The counts of each finished shard, by number."""
        names = storage.list_names(self.path)
        found = {}
        for name in names:
            if match := _STATS.match(name):
                if name not in self._known and not (stats := self._read(match[1], name, set(names))):
                    continue
                elif name not in self._known:
                    self._known[name] = stats
                found[int(match[1])] = self._known[name]
        return found

    def _read(self, shard: str, name: str, names: set[str]) -> dict[str, Any] | None:
        """A shard's counts, or None where it is not whole."""
        with suppress(OSError, ValueError, TypeError):
            stats = json.loads(storage.read_bytes(storage.join(self.path, name)))
            data = None if self._data is None else f"{shard}{self._data}"
            if not isinstance(stats["status_dict"], dict) or not (data is None or data in names):
                return None
            if data and data.endswith(".tar") and not storage.is_url(self.path):
                path = storage.join(self.path, data)
                if storage.read_bytes(path, max(0, storage.size(path) - len(_TAR_END))) != _TAR_END:
                    return None
            return {name: int(stats[name]) for name in ("count", "successes")} | {"status": stats["status_dict"]}
        return None

    def remove_unfinished(self) -> None:
        """Remove what was cut off, so that what is there can be read."""
        self._remove_but(set(self.finished()))

    def remove_all(self) -> None:
        """Remove all shards, and nothing else."""
        self._known.clear()
        self._remove_but(set())
        storage.remove(storage.join(self.path, MARKER))

    def _remove_but(self, kept: set[int]) -> None:
        for name in storage.list_names(self.path):
            match = _SHARD.match(name)
            if name == "_tmp" or (match and int(match[1]) not in kept):
                self._known.pop(name, None)
                _remove(storage.join(self.path, name))

    def bytes(self) -> int:
        """How much lies in the data files of a local folder."""
        if storage.is_url(self.path):
            return 0
        with suppress(OSError):
            return sum(entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file())
        return 0


def _remove(path: str) -> None:
    if not storage.is_folder(path):
        storage.remove(path)
    elif storage.is_url(path):
        fs, name = storage.filesystem(path)
        fs.rm(name, recursive=True)
    else:
        shutil.rmtree(path)


def reasons(shards: dict[int, dict[str, Any]]) -> Counter[str]:
    """How often each thing went wrong in finished shards."""
    found: Counter[str] = Counter()
    for stats in shards.values():
        told = {status: count for status, count in stats["status"].items() if status != "success"}
        for reason, count in told.items():
            found[_cleaned(reason)] += count
        lost = stats["count"] - stats["successes"] - sum(told.values())
        if lost > 0:
            found["could not be written"] += lost
    return found


def _cleaned(reason: str) -> str:
    """A reason in the words that count: failures of the same kind come together, whatever their addresses."""
    reason = re.sub(r"^<urlopen error (.*)>$", r"\1", reason.strip())
    reason = re.sub(r"^\[Errno -?\d+\] |^\[SSL: \w+\] ", "", reason)
    reason = re.sub(r"\b0x[0-9a-f]+\b|\(_ssl\.c:\d+\)|'[^']{20,}'|\S+://\S+", "...", reason)
    return " ".join(reason.split())[:80]
