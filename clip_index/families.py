"""Which index for how many rows, and how its files are made."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from clip_index import autofaiss_compat, regrow, two_stage_build
from clip_index.matrix import Matrix
from clip_index.steps import Steps
from clip_index.types import ClipIndexError
from clip_index.vectors import Vectors

ENGINES = ("auto", "autofaiss", "faiss")
EXACT_KEY = "SQfp16"
"""Exact search over float16, as the shards hold already: half of Flat's bytes and half of its time."""
EXACT_KEYS = (EXACT_KEY, "Flat")
EXACT_ROWS = 100_000
"""Below this an exact scan answers within some 10 ms on one thread, and there is nothing to tune."""
_TRAINING_ROWS = 100_000
_TWO_STAGE = re.compile(r"IVF(\d+),RaBitQ")


def choose(rows: int, engine: str, index_key: str | None) -> tuple[str, str | None]:
    """(engine, key) for a number of rows; a key of None leaves the choice to autofaiss."""
    if index_key:
        if engine == "auto":
            engine = "autofaiss" if autofaiss_compat.supports(index_key) else "faiss"
        return engine, index_key
    if engine == "autofaiss":
        return "autofaiss", None
    return "faiss", EXACT_KEY if rows < EXACT_ROWS else f"IVF{two_stage_build.lists_for(rows)},RaBitQ"


def is_two_stage(engine: str, key: str | None) -> bool:
    """Whether a family has the second stage (`clip_index.two_stage`)."""
    return engine == "faiss" and _TWO_STAGE.fullmatch(key or "") is not None


def make(
    vectors: Vectors,
    engine: str,
    key: str | None,
    *,
    path: Callable[[str], str],
    memory: int,
    steps: Steps,
    verbose: bool = False,
    like: str | None = None,
) -> tuple[str, str]:
    """Write the files of an index over all rows in order, `path` giving the place of each; (key, search parameters).

    `like` is the file of an index that was built before: of two stages its lists are taken instead of trained ones; of
    one stage it is taken as it is, and the rows that come after its own are added.
    """
    if engine != "autofaiss" and (found := _TWO_STAGE.fullmatch(key or "")):
        lists = min(int(found[1]), vectors.rows)
        with _faiss_failing(f"faiss cannot build {key} over {vectors.rows} rows"):
            two_stage_build.build(vectors, path, lists, memory, steps, like)
        return key, ""
    parameters = ""
    if like:
        with _faiss_failing(f"faiss cannot add rows to {key}"):
            built, parameters = regrow.grown(like, vectors, steps)
    elif engine == "autofaiss":
        with steps.timed("build"), _as_files(vectors) as folder:
            built, key, parameters = autofaiss_compat.build(folder, index_key=key, memory=memory, verbose=verbose)
    else:
        key = key or EXACT_KEY
        with _faiss_failing(f"faiss cannot build {key} over {vectors.rows} rows"):
            built = _with_faiss(vectors, key, steps)
    if built.ntotal != vectors.rows or built.d != vectors.dim:
        raise ClipIndexError(
            f"the index has {built.ntotal} vectors of {built.d} dimensions, the manifest says "
            f"{vectors.rows} of {vectors.dim}: is there another .npy file in {vectors.path}?"
        )
    import faiss

    with steps.timed("write"), _faiss_failing("cannot write the index", "; what was there stands"):
        faiss.write_index(built, path("index"))
    return key, parameters


@contextmanager
def _as_files(vectors: Matrix) -> Iterator[str]:
    """A folder with the vectors as .npy files: their own, or one for as long as it is needed."""
    if vectors.path is not None:
        yield vectors.path
        return
    with tempfile.TemporaryDirectory(prefix="clip-index-") as folder:
        for start, block in vectors.blocks():
            np.save(os.path.join(folder, f"rows_{start:015d}.npy"), block.astype(np.float16))
        yield folder


@contextmanager
def _faiss_failing(what: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ClipIndexError(f"{what}: {reason(error)}{then}") from error


def _with_faiss(vectors: Vectors, key: str, steps: Steps) -> object:
    import faiss

    built = faiss.index_factory(vectors.dim, key, faiss.METRIC_INNER_PRODUCT)
    if not built.is_trained:
        with steps.timed("train"):
            # the first rows of a set are rarely like the rest of it
            rows = np.random.default_rng(0).choice(
                vectors.rows, min(vectors.rows, _TRAINING_ROWS), replace=False, shuffle=False
            )
            built.train(vectors.take(rows))
    with steps.timed("add"):
        for _, block in vectors.blocks():
            built.add(block)
    return built


def reason(error: RuntimeError) -> str:
    """What faiss says without the C++ function that said it."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1]
