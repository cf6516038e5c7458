"""What `done/` says: one marker for each finished shard, and a table of them that stays small with a million.

1. `read_marker` reads one, `read_markers` all of a folder or of a rank, one after the other.
2. `ShardTable` keeps what they say by columns, some 70 bytes a shard.
3. `wrong_files` compares the files that the markers name with a listing of the folder.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip_index import storage
from clip_index.types import ClipIndexError

KINDS = {"image": "img_emb", "text": "text_emb", "metadata": "metadata", "failed": "failed"}
"""The kinds of files that a shard has, and the folder of each."""
NPY_HEADER = 128
"""Bytes of an .npy file before its first row, as `EmbeddingWriter` and numpy write it."""
_NONE = {"bytes": -1}
_AT_ONCE = 64
_BLOCK = 1 << 16
_SLOW_S = 2e-4
"""A marker that takes longer to read than this lies on a network: reading many at once hides the latency. On a local
disk threads would only wait for each other."""


@dataclass(frozen=True)
class Shard:
    """What a marker says: how many rows a task gave, and the bytes and SHA-256 of each of its files."""

    id: int
    inputs: str
    rows: int
    failed: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def shard_files(shard: int, width: int) -> dict[str, str]:
    """The names of a shard's files, relative to the folder: image, text, metadata, failed and done."""
    number = f"{shard:0{width}d}"
    return {
        "image": f"img_emb/img_emb_{number}.npy",
        "text": f"text_emb/text_emb_{number}.npy",
        "metadata": f"metadata/metadata_{number}.parquet",
        "failed": f"failed/failed_{number}.parquet",
        "done": f"done/{number}.json",
    }


def name_width(tasks: int) -> int:
    """Digits of a shard number: fixed over a folder, so that names sort in row order."""
    return max(5, len(str(max(0, tasks - 1))))


def read_marker(path: str) -> Shard | None:
    """A finished shard, None where it has no marker. Raises ClipIndexError for a marker that cannot be read."""
    try:
        return Shard(**json.loads(storage.read_bytes(path).decode()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ClipIndexError(f"{path} is not a marker: {error}; remove it to embed its shard again") from error


def read_markers(folder: str, *, rank: int = 0, world: int = 1) -> Iterator[Shard]:
    """The finished shards, in order of their names: those of a rank, where there are several.

    Raises ClipIndexError for a marker that cannot be read.
    """
    done = storage.join(folder, "done")
    names = [
        name
        for name in storage.list_names(done)
        if name.endswith(".json") and (not name[:-5].isdigit() or int(name[:-5]) % world == rank)
    ]

    def read(start: int) -> list[Shard]:
        found = [read_marker(f"{done}/{name}") for name in names[start : start + _AT_ONCE]]
        return [shard for shard in found if shard is not None]

    started = time.perf_counter()
    yield from read(0)
    slow = time.perf_counter() - started > _SLOW_S * min(len(names), _AT_ONCE)
    starts = range(_AT_ONCE, len(names), _AT_ONCE)
    if not slow:
        for start in starts:
            yield from read(start)
        return
    with ThreadPoolExecutor(16) as pool:
        # in groups, since `map` would read all that there are before the first is taken
        for group in (starts[i : i + 64] for i in range(0, len(starts), 64)):
            for block in pool.map(read, group):
                yield from block


class ShardTable:
    """Finished shards by columns, in order of their ids.

    `ids`, `rows`, `failed`: int64 [n]. `inputs`: bytes [n]. `sizes`, where the `width` of names is given: int64 [n, 4],
    the bytes of the files of each of `KINDS`, -1 where the marker names none.
    """

    def __init__(self, shards: Iterable[Shard] = (), *, width: int | None = None):
        numbers, sizes = array("q"), array("q")
        inputs: list[bytes] = []
        blocks: list[np.ndarray] = []
        for shard in shards:
            numbers.extend((shard.id, shard.rows, shard.failed))
            inputs.append(shard.inputs.encode())
            if len(inputs) == _BLOCK:
                blocks.append(np.array(inputs, "S"))
                inputs.clear()
            if width is not None:
                names = shard_files(shard.id, width)
                sizes.extend(shard.files.get(names[kind], _NONE)["bytes"] for kind in KINDS)
        table = np.array(numbers, np.int64).reshape(-1, 3)
        order = np.argsort(table[:, 0], kind="stable")
        self.ids, self.rows, self.failed = table[order].T
        self.inputs = np.concatenate([*blocks, np.array(inputs, "S")])[order]
        self.sizes = np.array(sizes, np.int64).reshape(-1, len(KINDS))[order] if width is not None else None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, chosen: np.ndarray) -> ShardTable:
        """The shards that a mask or positions choose."""
        table = copy(self)
        for name in ("ids", "rows", "failed", "inputs"):
            setattr(table, name, getattr(self, name)[chosen])
        table.sizes = None if self.sizes is None else self.sizes[chosen]
        return table

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """int64 [m]: where each of some ids is in the table, -1 for those that are not."""
        if not len(self):
            return np.full(len(ids), -1)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.where(self.ids[places] == ids, places, -1)


def wrong_files(
    folder: str, table: ShardTable, *, width: int, modalities: tuple[str, ...], row_bytes: int
) -> Iterator[tuple[int, str]]:
    """(shard, what is wrong) for each file that is missing, or of another size than its marker or its rows say.

    `table` has sizes. Each folder is listed once and no file is opened: whether the bytes are right, `verify` says.
    """
    for column, kind in enumerate(KINDS):
        told = table.sizes[:, column]
        there = _listed_sizes(folder, kind, table, width) if (told >= 0).any() else np.full(len(table), -1)
        needed = table.failed > 0 if kind == "failed" else (table.rows > 0) & (kind in (*modalities, "metadata"))
        fits = (told == NPY_HEADER + table.rows * row_bytes) | (kind not in modalities)
        for at in np.flatnonzero((needed & (told < 0)) | ((told >= 0) & ~((there == told) & fits))).tolist():
            shard = int(table.ids[at])
            yield shard, _what_is_wrong(shard_files(shard, width)[kind], told[at], there[at], table.rows[at])


def _listed_sizes(folder: str, kind: str, table: ShardTable, width: int) -> np.ndarray:
    """int64 [n]: the bytes of the file that each shard of the table has, -1 where there is none."""
    sizes = np.full(len(table), -1)
    path = storage.join(folder, KINDS[kind])
    before, _, after = shard_files(0, width)[kind].partition("/")[2].partition("0" * width)
    numbers, found = array("q"), array("q")
    for name, size in storage.list_sizes(path):
        number = name[len(before) : len(name) - len(after)]
        if len(number) == width and number.isdecimal() and name == f"{before}{number}{after}":
            numbers.append(int(number))
            found.append(size)
    places = table.positions(np.array(numbers, np.int64))
    sizes[places[places >= 0]] = np.array(found, np.int64)[places >= 0]
    return sizes


def _what_is_wrong(name: str, told: int, there: int, rows: int) -> str:
    if told < 0:
        return f"{name} is not in its marker"
    if there < 0:
        return f"{name} is missing"
    if there != told:
        return f"{name} has {there} bytes, its marker says {told}"
    return f"{name} has {there} bytes, which is not {rows} rows"
