"""The file of a faiss IVF index, its lists written one after the other: faiss itself would hold them all in memory.

1. faiss writes the index without rows: transform, quantizer, codec, and at the end the block of its lists, which are
   empty.
2. That block is written again with the sizes of the lists; where at most half of the lists have rows, faiss expects
   the sizes of those alone, with their numbers.
3. What follows are the lists in order, the codes of each and then its row numbers. Codes arrive in blocks that begin
   and end anywhere.

What comes out is byte for byte what `faiss.write_index` writes of the same index (`write_InvertedLists` in faiss).
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from clip_index.types import ClipIndexError

_LISTS = struct.Struct("<4sQQ4sQ")  # "ilar", lists, bytes of a code, how the sizes are written, how many numbers follow


class InvertedFile:
    """A file at `path` of an IVF index within a transform that faiss made, trained and without rows.

    `sizes` int64 [lists] says how many rows each list gets; `rows` int64 are their numbers in the order of the lists.
    To be used in a `with` block, in which `append` is given all codes. Raises ClipIndexError where faiss writes another
    format than the one known here.
    """

    def __init__(self, path: str, index: Any, sizes: np.ndarray, rows: np.ndarray):
        import faiss

        inverted = faiss.downcast_index(index.index)
        self._code_bytes, self._rows = inverted.code_size, rows
        self._ends = np.cumsum(sizes)
        self._written = self._list = 0
        index.ntotal = inverted.ntotal = len(rows)
        head, lists = np.split(faiss.serialize_index(index), [-_LISTS.size])
        if lists.tobytes() != _LISTS.pack(b"ilar", len(sizes), self._code_bytes, b"sprs", 0):
            raise ClipIndexError(f"faiss {faiss.__version__} writes lists otherwise than 1.15: install that release")
        filled = np.flatnonzero(sizes)
        kind, table = b"full", sizes
        if len(filled) <= len(sizes) // 2:
            kind, table = b"sprs", np.stack([filled, sizes[filled]], axis=1)
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  # closed by __exit__
        self._file.write(head.data)
        self._file.write(_LISTS.pack(b"ilar", len(sizes), self._code_bytes, kind, table.size))
        self._file.write(table.astype("<u8").data)

    def __enter__(self) -> InvertedFile:
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        self._file.close()
        assert error or self._written == len(self._rows), "codes of some rows are missing"

    def append(self, codes: np.ndarray) -> None:
        """The codes uint8 [n, bytes of a code] of the next n rows in the order of the lists."""
        at = 0
        while at < len(codes):
            while self._ends[self._list] == self._written:
                self._list += 1
            end = int(self._ends[self._list])
            count = min(end - self._written, len(codes) - at)
            self._file.write(codes[at : at + count].data)
            at, self._written = at + count, self._written + count
            if self._written == end:
                start = int(self._ends[self._list - 1]) if self._list else 0
                self._file.write(self._rows[start:end].astype("<i8").data)
