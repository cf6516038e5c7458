"""A parquet file as a stream: opened locally or by ranges, read in record batches of bounded size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from clip_index import storage
from clip_index.readers import sources
from clip_index.types import ClipIndexError, SampleError

_BATCH_BYTES = 32 << 20
_BATCH_ROWS = 1024
_BUFFER_BYTES = 4 << 20


class _Ranges(io.RawIOBase):
    """A remote file of which every read is one request: pyarrow reads ahead itself, in each column apart."""

    def __init__(self, path: str):
        self._path, self._size, self._position = path, storage.size(path), 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; returns the new position."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, length: int = -1) -> bytes:
        """At most `length` bytes, fewer only at the end."""
        left = max(0, self._size - self._position)
        data = storage.read_bytes(self._path, self._position, left if length < 0 else min(length, left))
        self._position += len(data)
        return data


@contextlib.contextmanager
def open_table(path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises SampleError for damaged contents, ClipIndexError for a file that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _Ranges(path) if storage.is_url(path) else open(path, "rb") as file:
            # pre_buffer would hold whole row groups, which may be gigabytes of pictures
            yield pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except pa.ArrowException as error:
        raise SampleError(f"{sources.printable(path)} is damaged: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if storage.is_url(path) or error.errno is not None:
            raise ClipIndexError(f"cannot read {path}: {reason}") from error
        raise SampleError(f"{sources.printable(path)} is damaged: {reason}") from error


def batches(parquet: Any, first: int, rows: int, names: list[str]) -> Iterator[tuple[int, Any]]:
    """(first row, record batch) over some rows of a file, read as a stream."""
    metadata = parquet.metadata
    groups, position, end, widest = [], 0, 0, 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if end + group.num_rows > first and end < first + rows:
            position = position if groups else end
            groups.append(number)
            widest = max(widest, group.total_byte_size // max(1, group.num_rows))
        end += group.num_rows
    size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // widest))
    for batch in parquet.iter_batches(size, row_groups=groups, columns=names, use_threads=False):
        begin, stop = max(first - position, 0), min(first + rows - position, batch.num_rows)
        if begin < stop:
            yield position + begin, batch.slice(begin, stop - begin)
        position += batch.num_rows
