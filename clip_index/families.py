"""Which faiss index for how many rows, and how it is made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from clip_index import autofaiss_compat
from clip_index.types import ClipIndexError
from clip_index.vectors import Vectors

ENGINES = ("auto", "autofaiss", "faiss")
EXACT_KEY = "SQfp16"
"""Exact search over float16, as the shards hold already: half of Flat's bytes and half of its time."""
EXACT_KEYS = (EXACT_KEY, "Flat")
EXACT_ROWS = 100_000
"""Below this an exact scan answers within some 10 ms on one thread, and there is nothing to tune."""
_TRAINING_ROWS = 100_000


def choose(rows: int, engine: str, index_key: str | None) -> tuple[str, str | None]:
    """(engine, key) for a number of rows; a key of None leaves the choice to autofaiss."""
    if index_key:
        if engine == "auto":
            engine = "autofaiss" if autofaiss_compat.supports(index_key) else "faiss"
        return engine, index_key
    if engine == "autofaiss" or (engine == "auto" and rows >= EXACT_ROWS):
        return "autofaiss", None
    return "faiss", EXACT_KEY


def make(
    vectors: Vectors, engine: str, key: str | None, *, memory: int, seconds: dict[str, float], verbose: bool = False
) -> tuple[Any, str, str]:
    """(faiss index over all rows in order, key, search parameters); `seconds` receives the time of each step."""
    if engine == "autofaiss":
        with timed(seconds, "build"):
            return autofaiss_compat.build(vectors.path, index_key=key, memory=memory, verbose=verbose)
    key = key or EXACT_KEY
    return _with_faiss(vectors, key, seconds), key, ""


def _with_faiss(vectors: Vectors, key: str, seconds: dict[str, float]) -> Any:
    import faiss

    try:
        built = faiss.index_factory(vectors.dim, key, faiss.METRIC_INNER_PRODUCT)
        if not built.is_trained:
            with timed(seconds, "train"):
                # the first rows of a set are rarely like the rest of it
                rows = np.random.default_rng(0).choice(
                    vectors.rows, min(vectors.rows, _TRAINING_ROWS), replace=False, shuffle=False
                )
                built.train(vectors.take(rows))
        with timed(seconds, "add"):
            for _, block in vectors.blocks():
                built.add(block)
    except RuntimeError as error:
        raise ClipIndexError(f"faiss cannot build {key} over {vectors.rows} rows: {reason(error)}") from error
    return built


def reason(error: RuntimeError) -> str:
    """What faiss says without the C++ function that said it."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1]


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add the time of a block to a step."""
    started = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started
