"""What this machine does in a second: the steps of a build, each run on a small part of what a large one would do.

1. A sample is split among lists; rows are assigned to as many lists as a million rows have.
2. An index over them is built in a temporary folder, with lists as long as the planned ones.
3. Exact search, tuning, searches and checksums are timed on it, by the functions that a build calls.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip_index import partition, recall, two_stage_build
from clip_index.index_folder import sha256
from clip_index.measure import try_lists
from clip_index.opened import open_files
from clip_index.points import Point
from clip_index.recall import Queries
from clip_index.source import OthersVectors
from clip_index.steps import Steps
from clip_index.two_stage import ROWS, VECTORS
from clip_index.types import normalize

_ROWS, _LISTS = 65_536, 4096
_QUERIES, _TUNED, _SEARCHED = 2000, 128, 64
_POINT, _K = Point(64, 400), 101


@dataclass(frozen=True)
class Rates:
    """What a second does, and what takes how many seconds.

    `trained` and `assigned` comparisons of a vector with a centroid, in training and afterwards; `encoded` rows
    gathered, encoded and written; `compared` queries times rows in exact search; `hashed` bytes of finished files.
    `query_s` seconds of a query in one step of tuning, and `list_s` more for each list that it looks into; `search_s`
    of a query of many at once.
    """

    trained: float
    assigned: float
    encoded: float
    compared: float
    query_s: float
    list_s: float
    search_s: float
    hashed: float


def measure_rates(dim: int, rows_per_list: int = 256) -> Rates:
    """Measure this machine with vectors of so many dimensions, in some seconds."""
    rng = np.random.default_rng(0)
    rows = normalize(rng.standard_normal((_ROWS, dim), dtype=np.float32)).astype(np.float16)
    sample, few_lists = rows[: _ROWS // 2].astype(np.float32), _ROWS // 2 // two_stage_build.SAMPLE_PER_LIST
    trained = partition.training(len(sample), few_lists) / _seconds(lambda: partition.train(sample, few_lists))
    parts = partition.Partition(rows[:_LISTS])
    with tempfile.TemporaryDirectory(prefix="clip-index-") as folder:
        np.save(f"{folder}/given.npy", rows)
        vectors, steps = OthersVectors(folder, ["given.npy"]), Steps()
        assigning = _seconds(lambda: [parts.assign(block) for _, block in vectors.stored_blocks(_ROWS)])
        assigned = _ROWS * partition.compared(_LISTS) / assigning
        lists = max(4, _ROWS // rows_per_list)
        two_stage_build.build(vectors, lambda name: f"{folder}/{name}", lists, 1 << 40, steps)
        files = [f"{folder}/{name}" for name in ("index", VECTORS, ROWS)]
        opened = open_files(*files)
        queries = Queries("image", vectors.take(rng.integers(0, _ROWS, _QUERIES)), np.full(_QUERIES, -1))
        exact = _QUERIES * _ROWS / _seconds(lambda: recall.exact_neighbours(vectors, queries, _K - 1))
        few = Queries("image", queries.vectors[:_TUNED])
        truth = recall.exact_neighbours(vectors, few, _K - 1)
        asked = queries.vectors[:_SEARCHED]
        search_s = _seconds(lambda: opened.search(asked, _K, _POINT)) / _SEARCHED
        near, far = lists // 8, lists // 2
        short = _seconds(lambda: try_lists(opened, vectors, few, truth, near)) / _TUNED
        long = _seconds(lambda: try_lists(opened, vectors, few, truth, far)) / _TUNED
        list_s = max(0.0, long - short) / (far - near)
        hashed = sum(map(os.path.getsize, files)) / _seconds(lambda: [_check(name) for name in files])
    query_s = max(0.0, short - near * list_s)
    return Rates(trained, assigned, _ROWS / steps.seconds["write"], exact, query_s, list_s, search_s, hashed)


def _check(name: str) -> None:
    with open(name, "rb") as file:
        os.fsync(file.fileno())
        sha256(file)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
