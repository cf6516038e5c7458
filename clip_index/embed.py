"""From pictures and captions to a folder of shards.

1. `plan_embedding` looks at input and output: the tasks, which of them are finished, and whether they go together.
2. `embed` has an executor run `EmbedJob` on the others, and counts samples and failures.
3. The manifest is written over all markers at the end; where several ranks share the work, `store.finalize` does that
   when all have ended.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from clip_index import cluster, executors, spark, storage, store
from clip_index.embed_job import EmbedJob, chunks, cores, describe, encode_samples, worker_encoder, worker_pool
from clip_index.readers import open_reader
from clip_index.types import ClipIndexError, IncompleteError, Task, UsageError

_JUDGED_FROM = 100
"""The failure rate is judged once this many samples have been seen, or at the end."""


@dataclass(frozen=True)
class EmbedSummary:
    """What a run did, and what the folder now holds: rows and failures of all of it, or of this rank's part.

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
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class EmbedPlan:
    """What a run would do: the job, the rank's tasks, and the markers of those that are finished.

    `shards` counts the tasks of all ranks, `stale` has the shards of this one whose inputs have changed, with what they
    were made from.
    """

    job: EmbedJob
    tasks: list[Task]
    done: dict[int, store.Shard]
    devices: list[str]
    shards: int
    stale: dict[int, str]
    rank: cluster.Rank
    executor: str

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
    rank: int | None = None,
    world: int | None = None,
    executor: str = "local",
) -> EmbedPlan:
    """Look at input and output, and write nothing. Raises UsageError where they do not go together.

    Of `world` processes that share the work, this is number `rank`: its tasks are every world-th. Where neither is
    given, Slurm, torchrun or MPI may have told (`cluster.find_rank`). `executor` is local, or spark: the cluster of the
    active session.
    """
    if executor not in ("local", "spark"):
        raise UsageError(f"executor must be local or spark, not {executor!r}")
    part = cluster.find_rank(rank, world, {} if executor == "spark" else os.environ)
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
    if executor == "spark":
        if part.world > 1:
            raise UsageError("Spark spreads the work itself: give --executor spark or --rank and --world, not both")
        workers = [spark.choose_device(devices)]
        config = spark.call(functools.partial(describe, model, workers[0], precision, reader.modalities), workers[0])
    else:
        cuda_devices = _cuda_devices(devices)
        workers = executors.parse_devices(part.devices(cuda_devices) if devices == "auto" else devices, cuda_devices)
        config = describe(model, workers[0], precision, reader.modalities)
    width = _check_output(output, config, len(tasks))
    shards = len(tasks)
    tasks = tasks[part.rank :: part.world]
    done, stale = _finished(output, tasks, part, update=update, retry_failed=retry_failed)
    bound = cores() < (os.cpu_count() or 1)  # the launcher has given each process its cores already
    threads = max(1, cores() // (len(workers) * (1 if bound else part.local_world)))
    job = EmbedJob(
        reader,
        output,
        config,
        workers[0],
        threads=threads,
        batch_size=batch_size,
        width=width,
        retry_failed=retry_failed,
    )
    return EmbedPlan(job, tasks, done, workers, shards, stale, part, executor)


def _cuda_devices(devices: str) -> int:
    if devices.startswith("cpu") and "cuda" not in devices:
        return 0
    import torch

    return torch.cuda.device_count()


def _run(plan: EmbedPlan, report: executors.Report) -> Iterator[store.Shard | spark.Made | executors.Lost]:
    if plan.executor == "spark":
        return spark.run_in_spark(plan.todo, plan.job, report)
    if len(plan.devices) == 1:
        return executors.run_in_process(plan.todo, plan.job.run, report)
    return executors.run_in_processes(plan.todo, [replace(plan.job, device=name) for name in plan.devices], report)


def _check_output(output: str, config: store.EmbeddingConfig, tasks: int) -> int:
    if not storage.exists(storage.join(output, "manifest.json")):
        return store.name_width(tasks)
    existing = store.Manifest.load(output)
    _refuse_others(output, existing.config, config)
    if store.name_width(tasks) > existing.width:
        raise UsageError(f"{output} has room for {10**existing.width} shards, the input needs {tasks}")
    return existing.width


def _refuse_others(output: str, existing: store.EmbeddingConfig, config: store.EmbeddingConfig) -> None:
    differences = existing.differences(config)
    if differences:
        raise UsageError(
            f"{output} holds other embeddings ({'; '.join(differences)}): name another output folder, "
            "or embed with what made this one"
        )


def _finished(
    output: str, tasks: list[Task], part: cluster.Rank, *, update: bool, retry_failed: bool
) -> tuple[dict[int, store.Shard], dict[int, str]]:
    """(the markers that count, the inputs of those whose inputs have changed) of a rank."""
    markers = store.read_markers(output, rank=part.rank, world=part.world, files=False)
    planned = {task.id: task.digest for task in tasks if task.id in markers}
    changed = {shard: marker.inputs for shard, marker in markers.items() if planned.get(shard) != marker.inputs}
    if changed and not update:
        raise UsageError(
            f"{len(changed)} of the {len(markers)} finished shards in {output} were made from other inputs (the first "
            f"is shard {min(changed)}): name another output folder, or give --update to embed them again"
        )
    done = {
        shard: marker
        for shard, marker in markers.items()
        if shard not in changed and not (retry_failed and marker.failed)
    }
    return done, changed


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
    summary = EmbedSummary(
        output=job.output,
        modalities=job.config.modalities,
        rows=sum(shard.rows for shard in plan.done.values()),
        failed=sum(shard.failed for shard in plan.done.values()),
        shards=len(plan.tasks),
        skipped_shards=len(plan.done),
        new_rows=0,
        seconds=0.0,
        rank=plan.rank.rank,
        world=plan.rank.world,
    )
    _prepare(plan)
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
        made: list[tuple[int, int, int]] = []
        lost: list[executors.Lost] = []
        for shard in _run(plan, report):
            if isinstance(shard, executors.Lost):
                lost.append(shard)
                continue
            made.append((shard.id, shard.rows, shard.failed))
            samples, shards = samples + shard.rows + shard.failed, shards + 1
            with lock:
                bar.shard_done(samples, shards)
    if lost:
        raise IncompleteError(
            f"{len(lost)} of {len(plan.tasks)} shards were given up after their workers died (the first is shard "
            f"{lost[0].task.id}: {lost[0].reason}); the others are finished, run the command again to try these"
        )
    _finish(plan)
    judge.end()
    new_rows = sum(rows for _, rows, _ in made)
    made += [(shard.id, shard.rows, shard.failed) for shard in plan.done.values()]
    failed_files = [
        storage.join(job.output, store.shard_files(shard, job.width)["failed"])
        for shard, _, failed in sorted(made)
        if failed
    ]
    return replace(
        summary,
        rows=summary.rows + new_rows,
        failed=sum(failed for _, _, failed in made),
        new_rows=new_rows,
        seconds=time.monotonic() - started,
        samples_per_s=clock.rate if plan.executor == "local" else 0.0,  # Spark tells of all rows at the end
        failed_files=failed_files,
    )


def _prepare(plan: EmbedPlan) -> None:
    """Claim the folder for this configuration, and forget the shards that count no longer."""
    job = plan.job
    manifest = store.Manifest(job.config, tasks=plan.shards, width=job.width)
    if not manifest.write_first(job.output):
        existing = store.Manifest.load(job.output)
        _refuse_others(job.output, existing.config, job.config)  # one that began at the same moment
        if existing.tasks != plan.shards or (plan.todo and existing.ids):
            manifest.write(job.output)
    for shard, inputs in plan.stale.items():
        names = store.shard_files(shard, job.width)
        marker = store.read_marker(job.output, names["done"])
        if marker is not None and marker.inputs == inputs:  # not one that another run has made anew
            for name in reversed(names.values()):  # its marker first
                storage.remove(storage.join(job.output, *name.split("/")))


def _finish(plan: EmbedPlan) -> None:
    """Write the manifest, or leave it to who comes when all ranks have ended. Raises ClipIndexError."""
    job = plan.job
    if plan.rank.world == 1:
        manifest = store.Manifest(job.config, tasks=plan.shards, width=job.width)
        store.finalize(job.output, manifest, [task.digest for task in plan.tasks])
        return
    now = store.Manifest.load(job.output)
    _refuse_others(job.output, now.config, job.config)
    if now.tasks != plan.shards:
        raise ClipIndexError(
            f"{job.output} is planned for {now.tasks} shards now, rank {plan.rank.rank} found {plan.shards}: give all "
            "ranks the same input, and run them again"
        )


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
