"""The index of one modality, opened: one interface over an index of one stage and one of two.

Segments that are added after a build, and rows that are deleted, are to be merged here: `search` is the one place
where rows come out of an index, and both classes number rows as the metadata does.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np

from clip_index.index_folder import IndexFolder
from clip_index.points import Point
from clip_index.selection import parameters
from clip_index.two_stage import ROWS, VECTORS, TwoStage
from clip_index.types import ClipIndexError

_EXACT = ("IndexFlat", "IndexFlatIP", "IndexHNSWFlat", "IndexIVFFlat")


class Opened(Protocol):
    """What can be asked of an index. Safe to share between threads."""

    rows: int
    dim: int
    exact: bool
    """Whether `vectors_of` gives the vectors themselves, not what their codes say of them."""

    def search(
        self, queries: np.ndarray, k: int, point: Point | None, *, selector: Any = None, widen: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def vectors_of(self, rows: np.ndarray) -> np.ndarray: ...

    def stored(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]: ...


class OneStage:
    """A faiss index alone: exact, or with codes whose estimates are the scores. Its parameters were set when built."""

    def __init__(self, index: Any):
        self._index = index
        self.rows, self.dim = index.ntotal, index.d
        self.exact = _holds_vectors(index)
        self._lock = threading.Lock()

    def search(
        self, queries: np.ndarray, k: int, point: Point | None = None, *, selector: Any = None, widen: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 [n, k], rows int64 [n, k]) by falling score; -1 where fewer are found.

        Of the rows that a faiss IDSelector lets through, where there is one, looking `widen` times as far.
        """
        options = None if selector is None else parameters(self._index, selector, widen)
        return self._index.search(queries, k, params=options)

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 [n, dim] of rows, as the index holds them."""
        import faiss

        inverted = faiss.try_extract_index_ivf(self._index)
        try:
            with self._lock:
                if inverted is not None and inverted.direct_map.no():  # where in the lists each row is
                    inverted.make_direct_map()
            return self._index.reconstruct_batch(rows)
        except RuntimeError as error:
            raise ClipIndexError("this index does not give its vectors back: build it with --engine faiss") from error

    def stored(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(row numbers int64 [n], vectors [n, dim]) from one place to another in the order of the file."""
        rows = np.arange(start, end)
        return rows, self.vectors_of(rows)


def read_file(path: str) -> Any:
    """A faiss index, memory-mapped. Raises faiss's RuntimeError."""
    import faiss

    index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    inverted = faiss.downcast_index(faiss.try_extract_index_ivf(index))
    if isinstance(inverted, faiss.IndexIVFPQFastScan):
        inverted.fine_quantizer = inverted.pq  # faiss 1.15 forgets it, and decoding a vector ends the process
    return index


def _holds_vectors(index: Any) -> bool:
    import faiss

    if isinstance(index, faiss.IndexScalarQuantizer):
        return index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    return type(index).__name__ in _EXACT


def open_index(folder: IndexFolder, modality: str) -> Opened:
    """Open a modality's index, memory-mapped. Raises ClipIndexError for files that are damaged or of another build."""
    path = folder.local(f"{modality}.index")
    names = [f"{modality}.{suffix}" for suffix in (VECTORS, ROWS)]
    files = [folder.local(name) for name in names] if folder.has(names[0]) else []
    return open_files(path, *files)


def open_files(path: str, *stored: str) -> Opened:
    """Open an index file, with the files of its second stage if it has one."""
    try:
        index = read_file(path)
        return TwoStage(index, *stored) if stored else OneStage(index)
    except RuntimeError as error:
        raise ClipIndexError(f"{path} cannot be read by faiss: build the index again") from error
    except (ValueError, EOFError) as error:
        raise ClipIndexError(f"{path} has damaged files beside it: {error}; build the index again") from error
