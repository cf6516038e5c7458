"""What `clip-index embed --dry_run` finds out: a few samples tried, nothing written."""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass
from typing import Any

from clip_index import executors, store
from clip_index.embed_job import chunks, cores, encode_samples, worker_pool
from clip_index.embed_plan import plan_embedding


@dataclass(frozen=True)
class Preview:
    """What `--dry_run` says, from the first unfinished samples; `samples` is None where only reading tells how many."""

    source: str
    output: str
    model: str
    modalities: tuple[str, ...]
    shards: int
    finished_shards: int
    finished_rows: int
    samples: int | None
    tried: int
    failed: int
    samples_per_s: float
    bytes_per_sample: int


def preview(source: str, output: str, *, tried: int = 64, **options: Any) -> Preview:
    """Try a few samples and write nothing. The options are those of `plan_embedding`."""
    plan = plan_embedding(source, output, **options)
    job, config = plan.job, plan.job.config
    encoder = job.encoder()
    samples = [sample for task in plan.todo[:1] for sample in itertools.islice(job.reader.read(task), tried)]
    encode = functools.partial(encode_samples, encoder, config.modalities)
    pool = worker_pool(job.threads or cores())
    list(executors.ordered_map(pool, encode, chunks(iter(samples[:2]), 1), 2))  # the first call is slow
    started = time.monotonic()
    batches = chunks(iter(samples), max(1, min(job.batch_size, len(samples) // 4)))
    encoded = list(executors.ordered_map(pool, encode, batches, len(samples) + 1))
    seconds = time.monotonic() - started
    counted = [task.rows for task in plan.todo]
    return Preview(
        source=source,
        output=job.output,
        model=config.encoder,
        modalities=config.modalities,
        shards=len(plan.tasks),
        finished_shards=len(plan.done),
        finished_rows=int(plan.done.rows.sum()),
        samples=None if None in counted else sum(counted),
        tried=len(samples),
        failed=sum(len(failures) for _, _, failures in encoded),
        samples_per_s=len(samples) / seconds if samples else 0.0,
        bytes_per_sample=config.dim * store.DTYPE.itemsize * len(config.modalities),
    )
