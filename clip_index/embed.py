"""From pictures and captions to a folder of shards.

1. `plan_embedding` looks at input and output: the tasks, which of them are finished, and whether they go together.
2. `embed` has an executor run `EmbedJob` on the others, and counts samples and failures.
3. The manifest is written over all markers at the end.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from clip_index import executors, storage, store
from clip_index.embed_job import EmbedJob, chunks, cores, encode_samples, worker_encoder, worker_pool
from clip_index.readers import open_reader
from clip_index.types import ClipIndexError, IncompleteError, Task, UsageError

_JUDGED_FROM = 100
"""The failure rate is judged once this many samples have been seen, or at the end."""


@dataclass(frozen=True)
class EmbedSummary:
    """What a run did, and what the folder now holds: rows and failures of all of it.

    `samples_per_s` is the rate once running: from the first encoded batch to the last.
    """

    output: str
    modalities: tuple[str, ...]
    rows: int
    failed: int
    shards: int
    skipped_shards: int
    new_rows: int
    seconds: float
    samples_per_s: float = 0.0
    failed_files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EmbedPlan:
    """What a run would do: the job, its tasks, and the markers of those that are finished."""

    job: EmbedJob
    tasks: list[Task]
    done: dict[int, store.Shard]
    devices: list[str]

    @property
    def todo(self) -> list[Task]:
        """The tasks without a marker."""
        return [task for task in self.tasks if task.id not in self.done]


def plan_embedding(
    source: str,
    output: str,
    *,
    model: str = "mini",
    input_format: str = "auto",
    modality: str = "auto",
    devices: str = "auto",
    precision: str = "auto",
    batch_size: int = 32,
    rows_per_shard: int = 10_000,
    update: bool = False,
    retry_failed: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> EmbedPlan:
    """Look at input and output, and write nothing. Raises UsageError where they do not go together."""
    for name, value in {"batch_size": batch_size, "rows_per_shard": rows_per_shard}.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    output = storage.absolute(output)
    reader = open_reader(
        source,
        input_format=input_format,
        modality=modality,
        image_column=image_column,
        caption_column=caption_column,
    )
    tasks = reader.plan(rows_per_shard)
    if not tasks:
        raise UsageError(f"nothing to embed in {source}")
    workers = executors.parse_devices(devices, _cuda_devices(devices))
    encoder = worker_encoder(model, workers[0], precision)
    config = store.EmbeddingConfig(
        encoder=encoder.name,
        fingerprint=encoder.fingerprint,
        precision=encoder.precision,
        preprocess=encoder.preprocess.describe() if "image" in reader.modalities else {},
        modalities=tuple(reader.modalities),
        dim=encoder.dim,
    )
    width = _check_output(output, config, len(tasks))
    done = _finished(output, tasks, update=update, retry_failed=retry_failed)
    threads = None if len(workers) == 1 else max(1, cores() // len(workers))
    job = EmbedJob(reader, output, config, workers[0], threads=threads, batch_size=batch_size, width=width)
    return EmbedPlan(job, tasks, done, workers)


def _cuda_devices(devices: str) -> int:
    if devices.startswith("cpu") and "cuda" not in devices:
        return 0
    import torch

    return torch.cuda.device_count()


def _run(plan: EmbedPlan, report: executors.Report) -> Iterator[store.Shard | executors.Lost]:
    if len(plan.devices) == 1:
        return executors.run_in_process(plan.todo, plan.job.run, report)
    return executors.run_in_processes(plan.todo, [replace(plan.job, device=name) for name in plan.devices], report)


def _check_output(output: str, config: store.EmbeddingConfig, tasks: int) -> int:
    if not storage.exists(storage.join(output, "manifest.json")):
        return store.name_width(tasks)
    existing = store.Manifest.load(output)
    differences = existing.config.differences(config)
    if differences:
        raise UsageError(
            f"{output} holds other embeddings ({'; '.join(differences)}): name another output folder, "
            "or embed with what made this one"
        )
    if store.name_width(tasks) > existing.width:
        raise UsageError(f"{output} has room for {10**existing.width} shards, the input needs {tasks}")
    return existing.width


def _finished(output: str, tasks: list[Task], *, update: bool, retry_failed: bool) -> dict[int, store.Shard]:
    markers = store.read_markers(output)
    planned = {task.id: task.digest for task in tasks if task.id in markers}
    changed = sorted(shard for shard, marker in markers.items() if planned.get(shard) != marker.inputs)
    if changed and not update:
        raise UsageError(
            f"{len(changed)} of the {len(markers)} finished shards in {output} were made from other inputs (the first "
            f"is shard {changed[0]}): name another output folder, or give --update to embed them again"
        )
    return {
        shard: marker
        for shard, marker in markers.items()
        if shard not in changed and not (retry_failed and marker.failed)
    }


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
    encoder = worker_encoder(config.encoder, job.device, config.precision)
    samples = [sample for task in plan.todo[:1] for sample in itertools.islice(job.reader.read(task), tried)]
    encode = functools.partial(encode_samples, encoder, config.modalities)
    list(
        executors.ordered_map(worker_pool(job.threads or cores()), encode, chunks(iter(samples[:2]), 1), 2)
    )  # the first call is slow
    started = time.monotonic()
    batches = chunks(iter(samples), max(1, min(job.batch_size, len(samples) // 4)))
    encoded = list(executors.ordered_map(worker_pool(job.threads or cores()), encode, batches, len(samples) + 1))
    seconds = time.monotonic() - started
    counted = [task.rows for task in plan.todo]
    return Preview(
        source=source,
        output=job.output,
        model=config.encoder,
        modalities=config.modalities,
        shards=len(plan.tasks),
        finished_shards=len(plan.done),
        finished_rows=sum(shard.rows for shard in plan.done.values()),
        samples=None if None in counted else sum(counted),
        tried=len(samples),
        failed=sum(len(failures) for _, _, failures in encoded),
        samples_per_s=len(samples) / seconds if samples else 0.0,
        bytes_per_sample=config.dim * store.DTYPE.itemsize * len(config.modalities),
    )


def embed(
    source: str,
    output: str,
    *,
    max_failure_rate: float = 0.5,
    progress: Callable[[EmbedPlan], Progress] | None = None,
    **options: Any,
) -> EmbedSummary:
    """Embed pictures and captions into a folder of shards, or go on with what an earlier run began.

    `source` is a folder of pictures, tars, or parquet files, `output` a folder; both may be URLs. The options are those
    of `plan_embedding`. Raises UsageError for arguments that do not go together, ClipIndexError where the output cannot
    be written or more than `max_failure_rate` of the samples fail; finished shards are kept.
    """
    if not 0 <= max_failure_rate <= 1:
        raise UsageError(f"max_failure_rate must lie between 0 and 1, not {max_failure_rate}")
    started = time.monotonic()
    plan = plan_embedding(source, output, **options)
    job = plan.job
    manifest = store.Manifest(job.config, tasks=len(plan.tasks), width=job.width)
    rows = sum(shard.rows for shard in plan.done.values())
    summary = EmbedSummary(
        output=job.output,
        modalities=job.config.modalities,
        rows=rows,
        failed=sum(shard.failed for shard in plan.done.values()),
        shards=len(plan.tasks),
        skipped_shards=len(plan.done),
        new_rows=0,
        seconds=0.0,
    )
    _prepare(job.output, manifest, plan)
    judge = _Judge(max_failure_rate, summary.rows, summary.failed)
    lock = threading.Lock()
    clock = _Clock()
    with (progress or Progress)(plan) as bar:

        def report(good: int, failed: int) -> None:
            with lock:
                clock.add(good + failed)
                bar.add(good, failed)
                judge.add(good, failed)

        samples, shards = summary.rows + summary.failed, len(plan.done)
        lost: list[executors.Lost] = []
        for shard in _run(plan, report):
            if isinstance(shard, executors.Lost):
                lost.append(shard)
                continue
            samples, shards = samples + shard.rows + shard.failed, shards + 1
            with lock:
                bar.shard_done(samples, shards)
    if lost:
        raise IncompleteError(
            f"{len(lost)} of {len(plan.tasks)} shards were given up after their workers died (the first is shard "
            f"{lost[0].task.id}: {lost[0].reason}); the others are finished, run the command again to try these"
        )
    manifest = store.finalize(job.output, manifest)
    judge.end()
    failed_files = [
        storage.join(job.output, store.shard_files(shard, job.width)["failed"])
        for shard, failed in zip(manifest.ids, manifest.shard_failed, strict=True)
        if failed
    ]
    return replace(
        summary,
        rows=manifest.rows,
        failed=manifest.failed,
        new_rows=manifest.rows - rows,
        seconds=time.monotonic() - started,
        samples_per_s=clock.rate,
        failed_files=failed_files,
    )


def _prepare(output: str, manifest: store.Manifest, plan: EmbedPlan) -> None:
    """Claim the folder for this configuration, and forget the markers that count no longer."""
    if plan.todo or not storage.exists(storage.join(output, "manifest.json")):
        manifest.write(output)
    for shard in store.read_markers(output):
        if shard not in plan.done:
            for name in reversed(store.shard_files(shard, manifest.width).values()):  # its marker first
                storage.remove(storage.join(output, name))


class Progress:
    """Told what was done; the base class shows nothing."""

    def __init__(self, plan: EmbedPlan):
        self.plan = plan

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, rows: int, failed: int) -> None:
        """So many rows and failures more."""

    def shard_done(self, rows: int, shards: int) -> None:
        """So many samples are now in so many finished shards."""


class _Clock:
    """Samples per second between the first report and the last."""

    def __init__(self) -> None:
        self._first = self._last = 0.0
        self._samples = 0

    def add(self, samples: int) -> None:
        self._last = time.monotonic()
        if self._first:
            self._samples += samples
        else:
            self._first = self._last

    @property
    def rate(self) -> float:
        return self._samples / (self._last - self._first) if self._samples else 0.0


class _Judge:
    """Stops a run whose failure rate is too high, before its next shard is marked as finished."""

    def __init__(self, limit: float, rows: int, failed: int):
        self.limit, self.rows, self.failed = limit, rows, failed

    def add(self, rows: int, failed: int) -> None:
        self.rows += rows
        self.failed += failed
        if self.rows + self.failed >= _JUDGED_FROM:
            self.end()

    def end(self) -> None:
        seen = self.rows + self.failed
        if self.failed > self.limit * seen:
            raise ClipIndexError(
                f"{self.failed} of {seen} samples failed, more than --max_failure_rate {self.limit:g} allows; "
                "finished shards are kept, and their failures are listed under failed/"
            )
