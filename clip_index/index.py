"""Build an index folder from a folder of embeddings, and state what it gives.

1. Check the manifest and every shard's shape.
2. For each modality build a faiss index over all rows, in manifest order, with faiss or with autofaiss.
3. Copy the metadata: parquet for other tools, one Arrow file for the search.
4. Measure recall against exact search with held-out queries of each modality, and the time of a query.
5. Swap the finished folder in (`clip_index.index_folder`).
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np

from clip_index import families, locations, recall, storage
from clip_index.families import timed
from clip_index.index_folder import IndexFolder
from clip_index.index_writer import IndexWriter
from clip_index.metadata import Metadata, metadata_files, write_metadata
from clip_index.report import below_target, infos
from clip_index.store import Manifest
from clip_index.types import ClipIndexError, UsageError
from clip_index.vectors import Vectors

_EXACT_QUERIES = 100  # exact search needs no estimate, only a check
_WARM_UP = 10
_SPEED_QUERIES, _SPEED_K = 200, 40  # as many neighbours as autofaiss asks for when it measures


def build_index(
    embeddings: str,
    index: str,
    *,
    memory: str | int = "4G",
    index_key: str | None = None,
    recall_target: float = 0.95,
    engine: str = "auto",
    queries: int = 1000,
    verbose: bool = False,
) -> dict[str, Any]:
    """Build the index folder `index` over the folder `embeddings`, both local paths or fsspec URLs.

    `memory` bounds what autofaiss may use ("4G", or bytes). `index_key` is a faiss factory string; without it, sets of
    less than 100,000 rows are searched exactly and autofaiss chooses for larger ones. `engine` is "auto", "faiss" or
    "autofaiss". `queries` is how many of each modality recall is measured with, at most.

    Returns the report that also lies in report.json; `clip_index.report.format_report` makes a table of it. An index
    that was in the folder serves until the new one is complete. Raises UsageError for bad arguments, ClipIndexError
    where the embeddings are not complete or the index cannot be built.
    """
    limit = parse_memory(memory)
    if engine not in families.ENGINES:
        raise UsageError(f"no engine {engine!r}: choose one of {', '.join(families.ENGINES)}")
    if not 0 < recall_target <= 1:
        raise UsageError(f"a recall target of {recall_target} is not between 0 and 1")
    if queries < 1:
        raise UsageError(f"recall cannot be measured with {queries} queries")
    started = time.perf_counter()
    embeddings, index = storage.absolute(embeddings), storage.absolute(index)
    manifest = Manifest.load(embeddings)
    config = manifest.config
    if not manifest.complete:
        missing = manifest.tasks - len(manifest.ids)
        raise ClipIndexError(f"{embeddings} lacks {missing} of {manifest.tasks} shards: run embed again")
    if not manifest.rows:
        raise ClipIndexError(f"nothing to index: {embeddings} has no rows")
    matrices = {modality: Vectors(embeddings, manifest, modality) for modality in config.modalities}
    for vectors in matrices.values():
        vectors.check()
    report: dict[str, Any] = {"index": index, "embeddings": embeddings, "encoder": config.encoder}
    report |= {"rows": manifest.rows, "dim": config.dim, "recall_target": recall_target, "indices": {}, "warnings": []}
    with IndexWriter(index) as writer:
        metadata = _copy_metadata(embeddings, manifest, writer)
        engine, key = families.choose(manifest.rows, engine, index_key)
        exact = key in families.EXACT_KEYS
        held_out = _held_out(matrices, metadata, min(queries, _EXACT_QUERIES) if exact else queries)
        for modality, vectors in matrices.items():
            part = _build_one(writer, modality, vectors, (engine, key), limit, verbose)
            built = _read_back(writer, modality)
            _measure_one(part, built, modality, vectors, held_out)
            report["warnings"] += below_target(modality, part, recall_target)
            report["indices"][modality] = part
            writer.write(
                f"{modality}.json", _to_json(infos(part, built, vectors, storage.join(index, f"{modality}.index")))
            )
        report["seconds"] = time.perf_counter() - started
        report["peak_memory_bytes"] = _peak_memory()
        writer.write("report.json", _to_json(report))
        writer.commit(config, rows=manifest.rows, embeddings=embeddings, embeddings_digest=manifest.digest)
    locations.remember(index)
    return report


def verify_index(index: str) -> list[str]:
    """What is wrong with an index folder, a line each: missing, truncated and altered files."""
    return IndexFolder(index).verify()


def parse_memory(memory: str | int) -> int:
    """Bytes from "4G", "512MB", "1.5T" or a number of bytes. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(memory).strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size <= 0:
        raise UsageError(f"{memory!r} is not an amount of memory: write it as 4G or 512M")
    return size


def _build_one(
    writer: IndexWriter, modality: str, vectors: Vectors, family: tuple[str, str | None], memory: int, verbose: bool
) -> dict[str, Any]:
    import faiss

    engine, key = family
    seconds: dict[str, float] = {}
    built, key, parameters = families.make(vectors, engine, key, memory=memory, seconds=seconds, verbose=verbose)
    if built.ntotal != vectors.rows or built.d != vectors.dim:
        raise ClipIndexError(
            f"the {modality} index has {built.ntotal} vectors of {built.d} dimensions, the manifest says "
            f"{vectors.rows} of {vectors.dim}: is there another .npy file in {vectors.path}?"
        )
    path = writer.path(f"{modality}.index")
    with timed(seconds, "write"):
        try:
            faiss.write_index(built, path)
        except RuntimeError as error:
            reason = families.reason(error)
            raise ClipIndexError(f"cannot write the {modality} index: {reason}; what was there stands") from error
    size = os.path.getsize(path)
    part = {"engine": engine, "index_key": key, "index_param": parameters, "bytes": size}
    return {**part, "bytes_per_vector": size / vectors.rows, "seconds": seconds}


def _copy_metadata(embeddings: str, manifest: Manifest, writer: IndexWriter) -> Metadata:
    path = writer.path("metadata.arrow")
    write_metadata(embeddings, manifest, path)
    for name in metadata_files(manifest):
        source, target = storage.join(embeddings, *name.split("/")), writer.path(name)
        if not storage.is_url(source):
            with suppress(OSError):  # another file system, or one without links
                os.link(source, target)
                continue
        with storage.open_read(source) as read, open(target, "wb") as written:
            shutil.copyfileobj(read, written, 4 << 20)
    return Metadata(path)


def _held_out(matrices: dict[str, Vectors], metadata: Metadata, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(rows, vectors) to query with, of each modality; a row without a caption is no text query."""
    found = {}
    for modality, vectors in matrices.items():
        rows = np.random.default_rng(1).permutation(vectors.rows)
        if modality == "text":
            rows = rows[: 8 * count]
            captions = metadata.take(rows, ["caption"]) if "caption" in metadata.names else []
            rows = rows[[bool((row["caption"] or "").strip()) for row in captions]] if captions else rows[:0]
        if len(rows := rows[:count]):
            found[modality] = rows, vectors.take(rows)
    return found


def _read_back(writer: IndexWriter, modality: str) -> Any:
    import faiss

    return faiss.read_index(writer.path(f"{modality}.index"), faiss.IO_FLAG_MMAP_IFC)


def _measure_one(part: dict[str, Any], built: Any, modality: str, vectors: Vectors, held_out: dict[str, Any]) -> None:
    part["recall"] = {}
    with timed(part["seconds"], "measure"):
        for kind, (rows, found) in held_out.items():
            asked = recall.Queries(kind, found, rows if kind == modality else None)
            part["recall"][kind] = recall.measure(built.search, vectors, asked)
        sample = next(iter(held_out.values()), (None, vectors.take(np.zeros(1, np.int64))))[1][:_SPEED_QUERIES]
        for query in sample[:_WARM_UP]:
            built.search(query[None], min(_SPEED_K, vectors.rows))
        times = []
        for query in sample:
            started = time.perf_counter()
            built.search(query[None], min(_SPEED_K, vectors.rows))
            times.append(1000 * (time.perf_counter() - started))
    part["ms"] = {"mean": float(np.mean(times)), "p50": float(np.median(times)), "p99": float(np.quantile(times, 0.99))}


def _to_json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
