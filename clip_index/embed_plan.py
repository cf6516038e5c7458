"""What a run would do: the tasks of an input, which of them are finished, and whether input and output go together."""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_index import cluster, executors, spark, storage, store
from clip_index.embed_job import EmbedJob, cores, describe
from clip_index.markers import ShardTable, name_width, read_markers
from clip_index.readers import open_reader
from clip_index.types import Task, Tasks, UsageError


@dataclass(frozen=True)
class EmbedPlan:
    """What a run would do: the job, the rank's tasks, and what the markers of those that are finished say.

    `shards` counts the tasks of all ranks, `stale` has the shards of this one whose inputs have changed, with what they
    were made from.
    """

    job: EmbedJob
    tasks: Sequence[Task]
    done: ShardTable
    devices: list[str]
    shards: int
    stale: dict[int, str]
    rank: cluster.Rank
    executor: str

    @property
    def todo(self) -> Tasks:
        """The tasks without a marker."""
        open_ = np.ones(len(self.tasks), bool)
        open_[self.done.ids // self.rank.world] = False
        return Tasks(self.tasks.__getitem__, array("q", np.flatnonzero(open_).astype(np.int64).tobytes()))


_BATCH_SIZES = {"cpu": 32, "cuda": 256}


def plan_embedding(
    source: str,
    output: str,
    *,
    model: str = "mini",
    input_format: str = "auto",
    modality: str = "auto",
    devices: str = "auto",
    precision: str = "auto",
    decode: str = "exact",
    batch_size: int | None = None,
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
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    output = storage.absolute(output)
    reader = open_reader(
        source,
        input_format=input_format,
        modality=modality,
        image_column=image_column,
        caption_column=caption_column,
    )
    if decode != "exact" and "image" not in reader.modalities:
        raise UsageError(f"--decode {decode} is for pictures, and of {source} captions are embedded")
    tasks = reader.plan(rows_per_shard)
    if not tasks:
        raise UsageError(f"nothing to embed in {source}")
    if executor == "spark":
        if part.world > 1:
            raise UsageError("Spark spreads the work itself: give --executor spark or --rank and --world, not both")
        workers = [spark.choose_device(devices)]
        told = functools.partial(describe, model, workers[0], precision, reader.modalities, decode)
        config = spark.call(told, workers[0])
    else:
        cuda_devices = _cuda_devices(devices)
        workers = executors.parse_devices(part.devices(cuda_devices) if devices == "auto" else devices, cuda_devices)
        config = describe(model, workers[0], precision, reader.modalities, decode)
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
        batch_size=batch_size or _BATCH_SIZES[workers[0].partition(":")[0]],
        width=width,
        retry_failed=retry_failed,
    )
    return EmbedPlan(job, tasks, done, workers, shards, stale, part, executor)


def _cuda_devices(devices: str) -> int:
    if devices.startswith("cpu") and "cuda" not in devices:
        return 0
    import torch

    return torch.cuda.device_count()


def _check_output(output: str, config: store.EmbeddingConfig, tasks: int) -> int:
    if not storage.exists(storage.join(output, "manifest.json")):
        return name_width(tasks)
    existing = store.Manifest.load(output)
    refuse_others(output, existing.config, config)
    if name_width(tasks) > existing.width:
        raise UsageError(f"{output} has room for {10**existing.width} shards, the input needs {tasks}")
    return existing.width


def refuse_others(output: str, existing: store.EmbeddingConfig, config: store.EmbeddingConfig) -> None:
    """Raise UsageError where a folder's embeddings are not those that would be added."""
    differences = existing.differences(config)
    if differences:
        raise UsageError(
            f"{output} holds other embeddings ({'; '.join(differences)}): name another output folder, "
            "or embed with what made this one"
        )


def _finished(
    output: str, tasks: Sequence[Task], part: cluster.Rank, *, update: bool, retry_failed: bool
) -> tuple[ShardTable, dict[int, str]]:
    """(the markers that count, the inputs of those whose inputs have changed) of a rank."""
    markers = ShardTable(read_markers(output, rank=part.rank, world=part.world))
    same = np.zeros(len(markers), bool)
    for place, (shard, inputs) in enumerate(zip(markers.ids.tolist(), markers.inputs, strict=True)):
        at = shard // part.world
        same[place] = at < len(tasks) and tasks[at].digest.encode() == inputs
    changed = {int(markers.ids[at]): markers.inputs[at].decode() for at in np.flatnonzero(~same)}
    if changed and not update:
        raise UsageError(
            f"{len(changed)} of the {len(markers)} finished shards in {output} were made from other inputs (the first "
            f"is shard {min(changed)}): name another output folder, or give --update to embed them again"
        )
    return markers.select(same & ~((markers.failed > 0) & retry_failed)), changed
