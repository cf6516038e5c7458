"""Search results as files: a list of their rows, or copies of their pictures that can be embedded again."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clip_index import columns, storage
from clip_index.types import ClipIndexError, Hit

_SIGNATURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tiff"}
_SIGNATURES |= {b"MM\0*": ".tiff", b"RIFF": ".webp"}
_OWN = ("image_path", "caption", "source", "width", "height")
_AT_ONCE = 256
_THREADS = 8  # the latencies of a disk or an object store overlap


def write_list(hits: Sequence[Hit], path: str) -> None:
    """Write rows as they are to a .parquet or .csv file: row, score, key and the columns of the metadata."""
    import pyarrow as pa
    from pyarrow import csv

    rows = [{"row": hit.row, "score": hit.score, "key": hit.key, **hit.meta} for hit in hits]
    table = pa.Table.from_pylist(rows) if rows else pa.table({"row": [], "score": [], "key": []})
    if path.endswith(".parquet"):
        storage.write_bytes(path, columns.to_parquet(table))
        return
    buffer = io.BytesIO()
    csv.write_csv(table, buffer)
    storage.write_bytes(path, buffer.getvalue())


def write_copies(hits: Sequence[Hit], folder: str, fetch: Callable[[str], bytes] | None) -> list[str]:
    """Write N.jpg as it is stored, N.txt and N.json for each hit, N from 1; returns a line for each that failed.

    Without `fetch` there are no pictures, captions alone.
    """
    width = len(str(len(hits)))
    failed = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(hits), _AT_ONCE):
            numbered = list(enumerate(hits[start : start + _AT_ONCE], start + 1))
            stems = [storage.join(folder, f"{number:0{width}d}") for number, _ in numbered]
            written = pool.map(_write, (hit for _, hit in numbered), stems, [fetch] * len(stems))
            failed += [line for line in written if line is not None]
    return failed


def _write(hit: Hit, stem: str, fetch: Callable[[str], bytes] | None) -> str | None:
    source = str(hit.meta.get("source") or "")
    if fetch is not None:
        try:
            data = fetch(source)
        except ClipIndexError as error:
            return f"{hit.key}: {error}"
        storage.write_bytes(stem + _suffix(data, str(hit.meta.get("image_path") or "")), data)
    caption = hit.meta.get("caption")
    if caption is not None and (caption or fetch is None):
        storage.write_bytes(f"{stem}.txt", str(caption).encode("utf-8", "replace"))
    kept = dict(_sidecar(hit))
    storage.write_bytes(f"{stem}.json", json.dumps(kept, ensure_ascii=False, indent=1).encode("utf-8", "replace"))
    return None


def _sidecar(hit: Hit) -> Iterator[tuple[str, Any]]:
    """What a picture and its caption do not say: its columns, and where it is from."""
    yield from (("score", hit.score), ("from_key", hit.key), ("from_source", hit.meta.get("source")))
    yield from ((name, value) for name, value in hit.meta.items() if name not in _OWN)


def _suffix(data: bytes, name: str) -> str:
    """What the bytes are; what the name says where they are nothing known."""
    for signature, suffix in _SIGNATURES.items():
        if data.startswith(signature):
            return suffix
    return os.path.splitext(name)[1].lower() or ".jpg"
