"""Checking a folder of embeddings: every byte against what its run recorded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import numpy as np

from clip_index import columns, storage
from clip_index.markers import Shard, read_markers, shard_files
from clip_index.store import DTYPE, FOLDERS, EmbeddingConfig, Manifest

_UNIT_TOLERANCE = 4e-3  # float16 keeps 11 bits: a unit row's norm is within 5e-4 of 1, whatever its dimension


def verify(folder: str) -> list[str]:
    """What is wrong with a folder of embeddings, a line each: markers, checksums, row counts, unit norms, strays."""
    manifest = Manifest.load(folder)
    markers = {shard.id: shard for shard in read_markers(folder)}
    problems = [
        f"shard {task:0{manifest.width}d} has no marker" for task in range(manifest.tasks) if task not in markers
    ]
    problems += [f"shard {task:0{manifest.width}d} is not in the plan" for task in markers if task >= manifest.tasks]
    table = dict(zip(manifest.ids, zip(manifest.shard_rows, manifest.shard_failed, strict=True), strict=True))
    if not manifest.complete:
        problems.append(f"manifest.json lists {len(manifest.ids)} of {manifest.tasks} shards: the run did not finish")
    expected = set()
    for shard in markers.values():
        expected |= set(shard.files)
        if shard.id in table and table[shard.id] != (shard.rows, shard.failed):
            problems.append(
                f"shard {shard.id:0{manifest.width}d}: manifest.json and its marker differ in rows or failed"
            )
        problems += _verify_shard(folder, manifest, shard)
    for name in [*FOLDERS.values(), "metadata", "failed"]:
        for file in storage.list_names(storage.join(folder, name)):
            if f"{name}/{file}" not in expected:
                problems.append(f"{name}/{file} belongs to no finished shard")
    return problems


def _verify_shard(folder: str, manifest: Manifest, shard: Shard) -> Iterator[str]:
    names = shard_files(shard.id, manifest.width)
    needed = [*manifest.config.modalities, "metadata"] if shard.rows else []
    needed += ["failed"] if shard.failed else []
    for kind in needed:
        if names[kind] not in shard.files:
            yield f"{names[kind]} is not in its marker"
    for name, recorded in shard.files.items():
        try:
            data = storage.read_bytes(storage.join(folder, *name.split("/")))
        except FileNotFoundError:
            yield f"{name} is missing"
            continue
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror or error}"
            continue
        if len(data) != recorded["bytes"]:
            yield f"{name} has {len(data)} bytes, its marker says {recorded['bytes']}"
        elif hashlib.sha256(data).hexdigest() != recorded["sha256"]:
            yield f"{name} was altered: its checksum is not the marker's"
        else:
            yield from _verify_contents(name, data, shard, manifest.config)


def _verify_contents(name: str, data: bytes, shard: Shard, config: EmbeddingConfig) -> Iterator[str]:
    if name.endswith(".npy"):
        vectors = np.load(io.BytesIO(data), allow_pickle=False)
        if vectors.shape != (shard.rows, config.dim) or vectors.dtype != DTYPE:
            yield f"{name} is {vectors.dtype} {vectors.shape}, expected {DTYPE} {(shard.rows, config.dim)}"
            return
        norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) < _UNIT_TOLERANCE))
        if len(wrong):
            yield f"{name} has {len(wrong)} rows that are not of unit norm, the first is row {wrong[0]}"
    else:
        rows = columns.parquet_rows(data)
        expected = shard.failed if name.startswith("failed/") else shard.rows
        if rows != expected:
            yield f"{name} has {rows} rows, its marker says {expected}"
