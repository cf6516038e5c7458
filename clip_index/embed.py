"""From pictures and captions to a folder of shards.

1. `plan_embedding` looks at input and output: the tasks, and which of them are finished.
2. `embed` has an executor run `EmbedJob` on the others, and counts samples and failures.
3. The manifest is written over all markers at the end; where several ranks share the work, `store.finalize` does that
   when all have ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from clip_index import executors, spark, storage, store
from clip_index.embed_plan import EmbedPlan, plan_embedding, refuse_others
from clip_index.markers import Shard, read_marker, shard_files
from clip_index.progress import Clock, Judge, Progress
from clip_index.types import ClipIndexError, IncompleteError, UsageError


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


def _run(plan: EmbedPlan, report: executors.Report, bar: Progress) -> Iterator[Shard | spark.Made | executors.Lost]:
    if plan.executor == "spark":
        return spark.run_in_spark(plan.todo, plan.job, report)
    if len(plan.devices) == 1:
        return executors.run_in_process(plan.todo, plan.job.run, report)
    jobs = [replace(plan.job, device=name) for name in plan.devices]
    return executors.run_in_processes(plan.todo, jobs, report, bar.by_device)


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
        rows=int(plan.done.rows.sum()),
        failed=int(plan.done.failed.sum()),
        shards=len(plan.tasks),
        skipped_shards=len(plan.done),
        new_rows=0,
        seconds=0.0,
        rank=plan.rank.rank,
        world=plan.rank.world,
    )
    _prepare(plan)
    judge = Judge(max_failure_rate, summary.rows, summary.failed)
    lock = threading.Lock()
    clock = Clock()
    with (progress or Progress)(plan) as bar:

        def report(good: int, failed: int) -> None:
            with lock:
                clock.add(good + failed)
                bar.add(good, failed)
                judge.add(good, failed)

        samples, shards = summary.rows + summary.failed, len(plan.done)
        new_rows = new_failed = 0
        with_failures = plan.done.ids[plan.done.failed > 0].tolist()
        lost: list[executors.Lost] = []
        for shard in _run(plan, report, bar):
            if isinstance(shard, executors.Lost):
                lost.append(shard)
                continue
            new_rows, new_failed = new_rows + shard.rows, new_failed + shard.failed
            with_failures += [shard.id] if shard.failed else []
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
    failed_files = [
        storage.join(job.output, shard_files(shard, job.width)["failed"]) for shard in sorted(with_failures)
    ]
    return replace(
        summary,
        rows=summary.rows + new_rows,
        failed=summary.failed + new_failed,
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
        refuse_others(job.output, existing.config, job.config)  # one that began at the same moment
        if existing.tasks != plan.shards or (plan.todo and existing.ids):
            manifest.write(job.output)
    for shard, inputs in plan.stale.items():
        names = shard_files(shard, job.width)
        marker = read_marker(storage.join(job.output, names["done"]))
        if marker is not None and marker.inputs == inputs:  # not one that another run has made anew
            for name in reversed(names.values()):  # its marker first
                storage.remove(storage.join(job.output, *name.split("/")))


def _finish(plan: EmbedPlan) -> None:
    """Write the manifest, or leave it to who comes when all ranks have ended. Raises ClipIndexError."""
    job = plan.job
    if plan.rank.world == 1:
        manifest = store.Manifest(job.config, tasks=plan.shards, width=job.width)
        inputs = np.empty(plan.shards, "S16")
        inputs[plan.done.ids] = plan.done.inputs
        for task in plan.todo:
            inputs[task.id] = task.digest
        store.finalize(job.output, manifest, inputs)
        return
    now = store.Manifest.load(job.output)
    refuse_others(job.output, now.config, job.config)
    if now.tasks != plan.shards:
        raise ClipIndexError(
            f"{job.output} is planned for {now.tasks} shards now, rank {plan.rank.rank} found {plan.shards}: give all "
            "ranks the same input, and run them again"
        )
