"""The work of one task: samples in, one shard out.

1. Samples are read in chunks of `batch_size`.
2. Each chunk is decoded and encoded on a pool of threads, several chunks at a time.
3. The rows are written in the order of the samples, and the shard is marked as finished.

A chunk's numbers depend on its own samples alone, and on the CPU a chunk is encoded by one thread: the number of
cores, threads or workers changes no byte of the result.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_index import executors, storage, store
from clip_index.markers import Shard, read_marker, shard_files
from clip_index.shard_writer import EmbeddingWriter
from clip_index.types import Encoder, Reader, Sample, SampleError, Task

_CHUNK_BYTES = 64 << 20
"""A chunk ends early at this many bytes of pictures, so that memory is bounded whatever their size."""


@dataclass(frozen=True)
class EmbedJob:
    """Everything that turns a task into a shard; picklable, so that any worker can have it."""

    reader: Reader
    output: str
    config: store.EmbeddingConfig
    device: str = "cpu"
    threads: int | None = None
    batch_size: int = 32
    width: int = 5
    retry_failed: bool = False

    def __call__(self, task: Task, report: executors.Report) -> Shard:
        return self.run(task, report)

    def run(self, task: Task, report: executors.Report = lambda rows, failed: None) -> Shard:
        """Make one shard and return its marker; one that another worker has finished meanwhile is left as it is.

        Raises ClipIndexError where the shard cannot be written.
        """
        done = read_marker(storage.join(self.output, shard_files(task.id, self.width)["done"]))
        if done is not None and done.inputs == task.digest and not (self.retry_failed and done.failed):
            report(done.rows, done.failed)
            return done
        encoder = self.encoder()
        threads = self.threads or cores()
        pool = worker_pool(threads)
        batches = chunks(self.reader.read(task), self.batch_size)
        encode = functools.partial(encode_samples, encoder, self.config.modalities)
        with EmbeddingWriter(self.output, task, self.config, width=self.width) as writer:
            for vectors, rows, failures in executors.ordered_map(pool, encode, batches, threads + 1):
                writer.append(vectors, rows)
                for failure in failures:
                    writer.fail(*failure)
                report(len(rows), len(failures))
            return writer.commit()

    def encoder(self) -> Encoder:
        """What the configuration says, in this process."""
        decode = self.config.preprocess.get("preset", "exact")
        return worker_encoder(self.config.encoder, self.device, self.config.precision, decode)


def describe(
    model: str, device: str, precision: str, modalities: tuple[str, ...], decode: str = "exact"
) -> store.EmbeddingConfig:
    """What will decide the numbers, told by the encoder where it will run."""
    encoder = worker_encoder(model, device, precision, decode)
    return store.EmbeddingConfig(
        encoder=encoder.name,
        fingerprint=encoder.fingerprint,
        precision=encoder.precision,
        preprocess=encoder.preprocess.describe() if "image" in modalities else {},
        modalities=tuple(modalities),
        dim=encoder.dim,
    )


_loading = threading.Lock()


def worker_encoder(name: str, device: str, precision: str, decode: str) -> Encoder:
    """The encoder of this process, loaded once."""
    with _loading:
        return _load_once(name, device, precision, decode)


@functools.lru_cache(maxsize=1)
def _load_once(name: str, device: str, precision: str, decode: str) -> Encoder:
    from clip_index.encoders import load_encoder

    return load_encoder(name, device=device, precision=precision, threads=1, decode=decode)


def worker_pool(threads: int) -> ThreadPoolExecutor:
    """The threads of this process that decode and encode.

    Not processes: decoders and torch release the GIL, so threads are as fast, and hand over pixels without a copy
    (`benchmarks/scale.py pool`).
    """
    with _loading:
        return _pool_once(threads)


@functools.lru_cache(maxsize=1)
def _pool_once(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="encode")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks(samples: Iterator[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Samples in lists of `batch_size`, fewer where the pictures are very large."""
    chunk: list[Sample] = []
    held = 0
    for sample in samples:
        chunk.append(sample)
        held += len(sample.image or b"")
        if len(chunk) == batch_size or held >= _CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


Encoded = tuple[dict[str, np.ndarray], list[dict[str, Any]], list[tuple[str, str, str]]]


def encode_samples(encoder: Encoder, modalities: tuple[str, ...], samples: list[Sample]) -> Encoded:
    """(vectors of each modality, metadata rows, (key, source, error) of what failed) of some samples."""
    images, good, rows, failures = [], [], [], []
    for sample in samples:
        try:
            row = _row(sample, modalities)
            if "image" in modalities:
                pixels, (row["width"], row["height"]) = encoder.preprocess(sample.image)
                images.append(pixels)
        except SampleError as error:
            failures.append((sample.key, sample.source, str(error)))
        else:
            good.append(sample)
            rows.append(row)
    if not good:
        return {modality: np.empty((0, encoder.dim), np.float32) for modality in modalities}, [], failures
    vectors = {}
    if "image" in modalities:
        vectors["image"] = encoder.encode_image(np.stack(images))
    if "text" in modalities:
        vectors["text"] = encoder.encode_text([sample.text or "" for sample in good])
    finite = np.all([np.isfinite(block).all(axis=1) for block in vectors.values()], axis=0)
    if not finite.all():
        failures += [
            (sample.key, sample.source, "its embedding is not finite")
            for sample, kept in zip(good, finite, strict=True)
            if not kept
        ]
        vectors = {modality: block[finite] for modality, block in vectors.items()}
        rows = [row for row, kept in zip(rows, finite, strict=True) if kept]
    return vectors, rows, failures


def _row(sample: Sample, modalities: tuple[str, ...]) -> dict[str, Any]:
    if sample.error is not None:
        raise SampleError(sample.error)
    if "image" in modalities and not sample.image:
        raise SampleError("no image")
    if modalities == ("text",) and not sample.text:
        raise SampleError("no caption")
    row: dict[str, Any] = {"image_path": sample.image_path}
    if "text" in modalities or sample.text is not None:
        row["caption"] = sample.text or ""
    return row | {"key": sample.key, "source": sample.source} | sample.meta
