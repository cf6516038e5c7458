"""autofaiss as a function that returns an index or raises, in silence.

What autofaiss does of its own accord, and what is made of it here:
- its index factory calls `faiss.OPQMatrix(d, M=..., d2=...)`, which faiss >= 1.14 refuses: it is given a faiss that
  accepts the keywords;
- it configures the root logger and shows progress bars: for the length of the call it does neither;
- on error it logs and returns (None, None): the logged line becomes an exception.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import re
from collections.abc import Iterator
from typing import Any

from clip_index.types import ClipIndexError

_KEYS = re.compile(
    r"Flat|IVF\d+,Flat|HNSW\d+|OPQ\d+_\d+,IVF\d+(_HNSW\d+)?,PQ\d+(x\d+)?|Pad\d+,IVF\d+_HNSW\d+,PQ\d+(x\d+)?"
)


def supports(index_key: str) -> bool:
    """Whether autofaiss is there and its own factory makes this family; faiss makes many more."""
    return importlib.util.find_spec("autofaiss") is not None and _KEYS.fullmatch(index_key) is not None


class _Faiss:
    """The faiss module, but with an OPQMatrix that takes its arguments by keyword too."""

    def __init__(self, faiss: Any):
        self._faiss = faiss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._faiss, name)

    def OPQMatrix(self, d: int, M: int = 1, d2: int = -1) -> Any:
        return self._faiss.OPQMatrix(d, M, d2)


@contextlib.contextmanager
def opq_keywords() -> Iterator[None]:
    """autofaiss's index factory, and nothing else, sees a faiss whose OPQMatrix accepts keywords.

    faiss 1.14 wrapped its constructors in a function of positional arguments; autofaiss 2.18 still names them.
    """
    import faiss
    from autofaiss.indices import index_factory

    with _replaced(index_factory, "faiss", _Faiss(faiss)):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _LastError(logging.Handler):
    """Keeps the last error that autofaiss logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.message = "it gave no reason"

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[_LastError]:
    from autofaiss.external import quantize
    from embedding_reader import numpy_reader

    logger, errors = logging.getLogger("autofaiss"), _LastError()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(errors)
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    logger.propagate = verbose
    silent = functools.partial(numpy_reader.tqdm, disable=not verbose)
    try:
        with _replaced(quantize, "setup_logging", lambda _: None), _replaced(numpy_reader, "tqdm", silent):
            yield errors
    finally:
        logger.removeHandler(errors)
        logger.setLevel(level)
        logger.propagate = propagate


def build(
    vectors_path: str, *, index_key: str | None, memory: int, available: int | None = None, verbose: bool = False
) -> tuple[Any, str, str]:
    """(faiss index, key, search parameters) over the npy files of a folder, inner product, within `memory` bytes.

    `available` is what the build may hold, where that is more than the index. Without a key autofaiss chooses one.
    Raises ClipIndexError with autofaiss's reason, or where it is not installed.
    """
    import faiss

    try:
        import autofaiss
    except ModuleNotFoundError as error:
        raise ClipIndexError(
            f"{error.name} is not installed: --engine autofaiss needs it, and no release of autofaiss is for Python "
            "3.13 and later; leave the flag out to build with faiss"
        ) from error

    with opq_keywords(), _quiet(verbose) as errors:
        try:
            index, infos = autofaiss.build_index(
                vectors_path,
                save_on_disk=False,
                index_key=index_key,
                metric_type="ip",
                max_index_memory_usage=f"{int(memory * 0.8)}B",  # it insists on a tenth more than the index takes
                current_memory_available=f"{available or memory}B",
                nb_cores=faiss.omp_get_max_threads(),
            )
        except (ValueError, RuntimeError, AssertionError, LookupError) as error:
            raise ClipIndexError(f"autofaiss cannot build an index over {vectors_path}: {_line(error)}") from error
    if index is None or infos is None:
        raise ClipIndexError(f"autofaiss cannot build an index over {vectors_path}: {errors.message}")
    return index, str(infos["index_key"]), str(infos["index_param"])


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
