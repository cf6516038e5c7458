"""Build an index folder from a folder of embeddings, and state what it gives.

1. Check the manifest and every shard's shape.
2. Copy the metadata: parquet for other tools, one Arrow file for the search.
3. For each modality build an index over all rows, in manifest order (`clip_index.families`).
4. Choose how far to look and measure what that gives, with held-out queries (`clip_index.measure`).
5. Swap the finished folder in (`clip_index.index_folder`).
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from clip_index import families, locations, recall, storage
from clip_index.index_folder import IndexFolder
from clip_index.index_writer import IndexWriter
from clip_index.measure import measure
from clip_index.metadata import Metadata, write_keys, write_tables
from clip_index.opened import Opened, open_files
from clip_index.report import below_target, infos
from clip_index.source import Source, open_source
from clip_index.speed import measure_cold
from clip_index.steps import Steps
from clip_index.two_stage import ROWS, VECTORS, TwoStage
from clip_index.two_stage_build import search_bytes
from clip_index.types import ClipIndexError, UsageError
from clip_index.vectors import Vectors

_EXACT_QUERIES = 100  # exact search needs no estimate, only a check


def build_index(
    embeddings: str,
    index: str,
    *,
    memory: str | int = "4G",
    index_key: str | None = None,
    recall_target: float = 0.99,
    engine: str = "auto",
    modality: str | None = None,
    model: str | None = None,
    queries: int = 1000,
    verbose: bool = False,
) -> dict[str, Any]:
    """Build the index folder `index` over the folder `embeddings`, both local paths or fsspec URLs.

    `memory` bounds what a build may hold ("4G", or bytes). `index_key` is a faiss factory string; without it, sets of
    less than 100,000 rows are searched exactly and larger ones in two stages (`clip_index.two_stage`). `engine` is
    "auto", "faiss" or "autofaiss", which chooses for itself. `recall_target` is what two stages are tuned to reach of
    the 10 nearest. `modality` is what to index, "image" or "text", where the embeddings have both; the other one still
    gives queries to tune and measure with. `model` names the encoder of embeddings that have no manifest, such as
    clip-retrieval's; without it the index answers vectors alone. `queries` is how many of each modality recall is
    measured with, at most.

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
    source = open_source(storage.absolute(embeddings), model)
    if modality is not None and modality not in source.config.modalities:
        raise UsageError(f"no {modality!r} vectors in {embeddings}, only {' and '.join(source.config.modalities)}")
    options = {"memory": limit, "recall_target": recall_target, "queries": queries, "verbose": verbose}
    family = families.choose(source.rows, engine, index_key)
    indexed = (modality,) if modality else source.config.modalities
    return build_from(source, index, source.folder, family=family, indexed=indexed, started=started, **options)


def build_from(
    source: Source,
    index: str,
    embeddings: str,
    *,
    family: tuple[str, str | None],
    indexed: tuple[str, ...],
    memory: int,
    started: float,
    recall_target: float = 0.99,
    queries: int = 1000,
    verbose: bool = False,
    like: IndexFolder | None = None,
) -> dict[str, Any]:
    """Build an index over opened embeddings, as `build_index`; `family` is (engine, key).

    `embeddings` is where they are said to be from. The lists of two stages are those of the index `like`, if given.
    """
    index, config, matrices = storage.absolute(index), source.config, source.matrices
    engine, key = family
    if not source.rows:
        raise ClipIndexError(f"nothing to index: {embeddings} has no rows")
    report: dict[str, Any] = {"index": index, "embeddings": embeddings, "encoder": config.encoder}
    report |= {"rows": source.rows, "dim": config.dim, "recall_target": recall_target, "indices": {}, "warnings": []}
    with IndexWriter(index) as writer:
        if like is not None:
            like.check_current()
        metadata = _copy_metadata(source, writer)
        exact = key in families.EXACT_KEYS
        held_out = _held_out(matrices, metadata, min(queries, _EXACT_QUERIES) if exact else queries)
        search = {}
        for modality in indexed:
            vectors, steps = matrices[modality], Steps()
            asked = [
                recall.Queries(kind, found, rows if kind == modality else None)
                for kind, (rows, found) in held_out.items()
            ]
            built_key, parameters = families.make(
                vectors,
                engine,
                key,
                path=lambda suffix, name=modality: writer.path(f"{name}.{suffix}"),
                memory=memory,
                steps=steps,
                verbose=verbose,
                like=like and like.local(f"{modality}.index"),
            )
            suffixes = ("index", VECTORS, ROWS) if families.is_two_stage(engine, built_key) else ("index",)
            files = [writer.path(f"{modality}.{suffix}") for suffix in suffixes]
            opened = open_files(*files)
            measured, points = measure(opened, vectors, asked, recall_target, steps)
            if asked and not exact:
                measured["speed"]["cold"] = measure_cold(
                    lambda names=tuple(files): open_files(*names), files, asked[0].vectors, points.get(asked[0].kind)
                )
            size = sum(os.path.getsize(name) for name in files)
            memory_bytes = _memory_of(opened, size)
            part = {"engine": engine, "index_key": built_key, "index_param": parameters, "bytes": size}
            part |= {"bytes_per_vector": size / vectors.rows, "memory_bytes": memory_bytes}
            part |= {"memory_bytes_per_vector": memory_bytes / vectors.rows, **measured}
            part |= {"seconds": steps.seconds, "peak_memory_bytes": steps.peak_memory_bytes}
            report["warnings"] += below_target(modality, part, recall_target)
            report["indices"][modality] = part
            search[modality] = {kind: asdict(point) for kind, point in points.items()}
            writer.write(
                f"{modality}.json",
                _to_json(infos(part, files[0], vectors, storage.join(index, f"{modality}.index"))),
            )
        report["seconds"] = time.perf_counter() - started
        report["peak_memory_bytes"] = _peak_memory()
        writer.write("report.json", _to_json(report))
        made_of = {"embeddings": embeddings, "embeddings_digest": source.digest}
        writer.commit(replace(config, modalities=indexed), rows=source.rows, **made_of, search=search)
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


def _copy_metadata(source: Source, writer: IndexWriter) -> Metadata:
    path = writer.path("metadata.arrow")
    if source.tables:
        write_tables(source.folder, source.tables, source.table_rows, path)
    else:
        write_keys(source.rows, path)
    for name in source.tables:
        writer.carry(storage.join(source.folder, *name.split("/")), f"metadata/{name.split('/')[-1]}")
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


def _memory_of(opened: Opened, size: int) -> int:
    """Bytes that searches read again and again: all of a faiss index, but of two stages the codes and centroids."""
    if not isinstance(opened, TwoStage):
        return size
    return search_bytes(opened.rows, opened.dim, opened.lists)


def _to_json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
