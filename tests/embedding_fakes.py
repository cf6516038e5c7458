"""Folders of embeddings with vectors from a random number generator, written as the product writes them."""

from __future__ import annotations

import numpy as np

from clip_index.shard_writer import EmbeddingWriter
from clip_index.store import EmbeddingConfig, Manifest, finalize
from clip_index.types import Task, normalize

FINGERPRINT = "0123456789abcdef"


def random_rows(count, dim=16, seed=0):
    return normalize(np.random.default_rng(seed).standard_normal((count, dim)))


def metadata_rows(first, count):
    return [
        {
            "image_path": f"pictures/{row}.jpg",
            "caption": f"caption {row}" if row % 3 else "",
            "key": f"key-{row}",
            "source": f"/data/{row}.jpg",
            "width": 640,
            "height": 480,
        }
        for row in range(first, first + count)
    ]


def make_embeddings(folder, vectors, *, shard_rows=None, rows=None, config=None):
    """Write {modality: [n, dim]} as shards of the given lengths (by default three); returns the manifest."""
    count, dim = next(iter(vectors.values())).shape
    shard_rows = shard_rows or [count // 3, count // 3, count - 2 * (count // 3)]
    rows = rows or metadata_rows(0, count)
    config = config or EmbeddingConfig("fake", FINGERPRINT, "fp32", {"size": 8}, tuple(vectors), dim)
    start = 0
    for shard, length in enumerate(shard_rows):
        part = slice(start, start + length)
        with EmbeddingWriter(str(folder), Task(shard, ((f"input {shard}",),)), config) as writer:
            writer.append({modality: block[part] for modality, block in vectors.items()}, rows[part])
            writer.commit()
        start += length
    return finalize(str(folder), Manifest(config, tasks=len(shard_rows)))


def stored(vectors):
    """The float32 values that a shard holds: those that float16 can express."""
    return vectors.astype(np.float16).astype(np.float32)


def brute_force(vectors, queries, k):
    """Rows [n, k] by falling inner product in float64."""
    return np.argsort(-(queries.astype(np.float64) @ vectors.astype(np.float64).T), axis=1, kind="stable")[:, :k]
