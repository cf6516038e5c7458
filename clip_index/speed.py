"""How long a query takes: alone, beside others, from a cold disk, in batches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clip_index.opened import Opened
from clip_index.points import Point

_WARM_UP, _QUERIES, _COLD_QUERIES = 10, 200, 50
_K = 10

Ask = Callable[[np.ndarray], Any]


def measure(opened: Opened, queries: np.ndarray, point: Point | None) -> dict[str, Any]:
    """Milliseconds a query on one thread and on all, and queries a second, for 10 results each."""
    import faiss

    queries, k, threads = queries[:_QUERIES], min(_K, opened.rows), faiss.omp_get_max_threads()

    def ask(query: np.ndarray) -> float:
        faiss.omp_set_num_threads(1)  # of this thread alone
        started = time.perf_counter()
        opened.search(query[None], k, point)
        return 1000 * (time.perf_counter() - started)

    with ThreadPoolExecutor(1) as pool:
        list(pool.map(ask, queries[:_WARM_UP]))
        alone = list(pool.map(ask, queries))
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        beside = list(pool.map(ask, queries))
        rate = len(queries) / (time.perf_counter() - started)
    started = time.perf_counter()
    opened.search(queries, k, point)
    batch = len(queries) / (time.perf_counter() - started)
    return {"one_thread": _summary(alone), "threads": threads, "all_threads": _summary(beside)} | {
        "queries_per_s": rate,
        "batch_queries_per_s": batch,
    }


def measure_cold(
    reopen: Callable[[], Opened], files: list[str], queries: np.ndarray, point: Point | None
) -> dict[str, float] | None:
    """Milliseconds of first queries after the system has dropped the files' pages; None where it cannot be told to."""
    if not hasattr(os, "posix_fadvise"):
        return None
    for name in files:
        with open(name, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    opened, times = reopen(), []
    for query in queries[-_COLD_QUERIES:]:
        started = time.perf_counter()
        opened.search(query[None], min(_K, opened.rows), point)
        times.append(1000 * (time.perf_counter() - started))
    return _summary(times)


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(times)),
        "p50": float(np.median(times)),
        "p99": float(np.quantile(times, 0.99)),
    }
