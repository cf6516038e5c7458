"""A faiss index of one stage with other rows: without those that are deleted, with those that are added.

What was trained stays as it is: lists, codebooks, rotations, and the parameters of its search.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from clip_index.index_folder import IndexFolder
from clip_index.matrix import Matrix
from clip_index.steps import Steps


class Without:
    """An index folder with other index files."""

    def __init__(self, folder: IndexFolder, files: dict[str, str]):
        self.check_current = folder.check_current
        self.local = files.__getitem__


def without(folder: IndexFolder, gone: np.ndarray, scratch: str) -> Without | None:
    """An index that lacks some rows, a mask, its files below `scratch`; None where its family cannot lose rows."""
    names = [f"{modality}.index" for modality in folder.marker.config.modalities]
    files = {name: os.path.join(scratch, name) for name in names}
    return Without(folder, files) if all(_remove(folder.local(name), gone, files[name]) for name in names) else None


def _remove(path: str, gone: np.ndarray, target: str) -> bool:
    """Write an index file without some rows, those left numbered anew; False for graphs, which would fall apart."""
    import faiss

    index = faiss.read_index(path)
    try:
        index.remove_ids(faiss.IDSelectorBatch(np.flatnonzero(gone)))
    except RuntimeError:
        return False
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:  # lists keep the numbers that rows had; codes in a row have none, and close up
        numbers = np.cumsum(~gone) - 1
        lists = inverted.invlists
        for number in range(inverted.nlist):
            held = faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number))
            held[:] = numbers[held]
    faiss.write_index(index, target)
    return True


def grown(path: str, vectors: Matrix, steps: Steps) -> tuple[Any, str]:
    """(an index file with those rows of a matrix added that come after its own, its search parameters)."""
    import faiss

    index = faiss.read_index(path)
    with steps.timed("add"):
        step = 16384
        for start in range(index.ntotal, vectors.rows, step):
            index.add(vectors.take(np.arange(start, min(start + step, vectors.rows))))
    return index, _parameters(index)


def _parameters(index: Any) -> str:
    """The parameters of a search, under autofaiss's names."""
    import faiss

    inverted = faiss.try_extract_index_ivf(index)
    graph = index if inverted is None else faiss.downcast_index(inverted.quantizer)
    found = [] if inverted is None else [f"nprobe={inverted.nprobe}"]
    return ",".join(found + ([f"efSearch={graph.hnsw.efSearch}"] if isinstance(graph, faiss.IndexHNSW) else []))
