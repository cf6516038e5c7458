"""Rows of metadata fetched at random places, a second, from an index's own file and from parquet.

    python benchmarks/metadata.py                      # 1,000,000 rows
    python benchmarks/metadata.py --rows 10000000      # about 2 GB of disk

The rows are like those of `embed`: path, caption of 60 characters on average, key, source, width, height, and two
columns of a sidecar. They are fetched as dicts, 1,000 a time as a search of 1,000 results does it, and 10 a time; then
the caption alone. `cold` is the first pass after the file has been dropped from the page cache, as far as the system
does that for an unprivileged process. Parquet is what clip-retrieval reads without its own format: one row group of
65,536 rows is decoded for each row that is asked for, in order, so that none is decoded twice.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHARD_ROWS = 100_000


def make(folder: Path, rows: int) -> list[str]:
    """Parquet files of rows; their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, names = np.random.default_rng(0), []
    words = np.array(["a", "red", "dog", "on", "the", "beach", "old", "photograph", "of", "mountains", "and", "snow"])
    for start in range(0, rows, SHARD_ROWS):
        numbers = range(start, min(start + SHARD_ROWS, rows))
        table = pa.table(
            {
                "image_path": [f"{row // 10_000:05d}/{row:09d}.jpg" for row in numbers],
                "caption": [" ".join(words[rng.integers(0, len(words), rng.integers(4, 20))]) for _ in numbers],
                "key": [f"{row:09d}" for row in numbers],
                "source": [f"{row // 10_000:05d}.tar#{row % 10_000 * 30_720}+30000" for row in numbers],
                "width": rng.integers(200, 2000, len(numbers)),
                "height": rng.integers(200, 2000, len(numbers)),
                "license": [("by", "by-sa", None)[row % 3] for row in numbers],
                "similarity_to_caption": rng.random(len(numbers)),
            }
        )
        names.append(f"metadata_{len(names):05d}.parquet")
        pq.write_table(table, folder / names[-1], row_group_size=65_536, compression="zstd")
    return names


def rate(fetch: Callable[[np.ndarray], object], wanted: np.ndarray, at_once: int) -> float:
    """Rows a second, fetched so many at once."""
    started = time.perf_counter()
    for start in range(0, len(wanted), at_once):
        fetch(wanted[start : start + at_once])
    return len(wanted) / (time.perf_counter() - started)


def drop(path: Path) -> None:
    """Let go of a file's pages."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--fetch", type=int, default=200_000, help="random rows to fetch")
    options = parser.parse_args()
    import pyarrow.parquet as pq

    from clip_index.metadata import Metadata, write_tables

    with tempfile.TemporaryDirectory() as scratch:
        folder, path = Path(scratch), Path(scratch, "metadata.arrow")
        names = make(folder, options.rows)
        lengths = [pq.read_metadata(folder / name).num_rows for name in names]
        started = time.perf_counter()
        write_tables(scratch, names, lengths, str(path))
        written = time.perf_counter() - started
        size = path.stat().st_size / 1e6
        print(f"load {os.getloadavg()[0]:.1f}; {options.rows:,} rows, {size:,.0f} MB, written in {written:.1f} s")
        wanted = np.random.default_rng(1).integers(0, options.rows, options.fetch)
        drop(path)
        metadata = Metadata(str(path))
        print(f"{'cold, 1,000 a time':34}{rate(metadata.take, wanted, 1000):12,.0f} rows/s")
        print(f"{'1,000 a time':34}{rate(metadata.take, wanted, 1000):12,.0f} rows/s")
        print(f"{'10 a time':34}{rate(metadata.take, wanted, 10):12,.0f} rows/s")
        captions = rate(lambda rows: metadata.take(rows, ["caption"]), wanted, 1000)
        print(f"{'1,000 captions a time':34}{captions:12,.0f} rows/s")
        files = [pq.ParquetFile(folder / name) for name in names]

        def from_parquet(rows: np.ndarray) -> None:
            groups: dict[tuple[int, int], list[int]] = {}
            for row in rows.tolist():
                shard, offset = divmod(row, SHARD_ROWS)
                groups.setdefault((shard, offset // 65_536), []).append(offset % 65_536)
            for (shard, group), offsets in sorted(groups.items()):
                files[shard].read_row_group(group).take(offsets).to_pylist()

        few = wanted[:2000]
        print(f"{'parquet, 1,000 a time':34}{rate(from_parquet, few, 1000):12,.0f} rows/s")


if __name__ == "__main__":
    main()
