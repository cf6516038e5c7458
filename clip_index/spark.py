"""Tasks as the rows of a DataFrame, run by the Python workers of a Spark cluster.

1. Rows are tasks, a few hundred bytes each: what they read and write goes straight between worker and storage.
2. A worker runs its rows one by one, and keeps its encoder for the next ones (`spark.python.worker.reuse`).
3. Back come id, rows and failures of each task. Spark may run a row twice: a shard that is finished is left as it is.

A task that needs a GPU gets one by a resource profile, except in local mode, where Spark knows no GPUs and would wait.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from clip_index import executors
from clip_index.types import ClipIndexError, Task, UsageError

Result = TypeVar("Result")

_PARTITIONS = 10_000
"""At most so many; a partition is what Spark hands out and tries again."""


class Made(NamedTuple):
    """What Spark tells of a finished task."""

    id: int
    rows: int
    failed: int


def choose_device(devices: str) -> str:
    """`cpu` or `cuda`, from `--devices`: auto is cuda where the executors have GPUs. Raises UsageError."""
    if devices == "auto":
        return "cuda" if _amount("spark.executor.resource.gpu.amount") else "cpu"
    if devices not in ("cpu", "cuda"):
        raise UsageError(f"--devices {devices}: with Spark give auto, cpu or cuda; Spark says which GPU a task gets")
    return devices


def call(function: Callable[[], Result], device: str) -> Result:
    """What a function gives where the tasks will run. It and its result are pickled."""
    import pickle

    def run(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        for batch in batches:
            yield pa.RecordBatch.from_pydict({"id": batch["id"], "result": [pickle.dumps(function())]})

    row = _map(_session().range(1), run, "id long, result binary", device)[0]
    return pickle.loads(bytes(row["result"]))


def run_in_spark(tasks: Sequence[Task], job: Any, report: executors.Report) -> Iterator[Made]:
    """Run every task on the cluster of the active session. Raises ClipIndexError where Spark gave one up.

    `job` is an executor's job with the fields `device` and `threads`, which are set where it runs.
    """
    if not tasks:
        return
    rows = [(task.id, json.dumps(task.inputs), task.rows) for task in tasks]
    frame = _session().createDataFrame(rows, "id long, inputs string, rows long")
    frame = frame.coalesce(1).repartition(min(len(tasks), _PARTITIONS))  # from one partition, it deals them out evenly
    schema = "id long, rows long, failed long"
    for row in _map(frame, functools.partial(_run_rows, job), schema, job.device):
        report(row["rows"], row["failed"])
        yield Made(row["id"], row["rows"], row["failed"])


def _run_rows(job: Any, batches: Iterator[Any]) -> Iterator[Any]:
    """In a Python worker: run the tasks of a partition, a row each."""
    import pyarrow as pa
    from pyspark import TaskContext

    context = TaskContext.get()
    gpus = context.resources().get("gpu")
    device = f"cuda:{gpus.addresses[0]}" if gpus and job.device == "cuda" else job.device
    here = replace(job, device=device, threads=max(1, context.cpus()))
    tasks = (
        Task(row["id"], tuple(tuple(item) for item in json.loads(row["inputs"])), row["rows"])
        for batch in batches
        for row in batch.to_pylist()
    )
    for made in executors.run_in_process(tasks, here, lambda rows, failed: None):
        yield pa.RecordBatch.from_pydict({"id": [made.id], "rows": [made.rows], "failed": [made.failed]})


def _map(frame: Any, function: Callable[..., Iterator[Any]], schema: str, device: str) -> Iterable[Any]:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        return frame.mapInArrow(function, schema, profile=_profile(device)).collect()
    except (PySparkException, Py4JError) as error:
        raise ClipIndexError(_reason(str(error))) from error


def _reason(message: str) -> str:
    """One line out of Spark's many: our own error, else why the stage was given up."""
    for pattern in (r"clip_index\.types\.\w+: (.+)", r"(Job aborted due to stage failure: .+)", r"(.+)"):
        found = re.search(pattern, message)
        if found:
            return found[1] if "clip_index" in pattern else f"Spark gave up: {found[1]}"
    return "Spark gave up"


def _profile(device: str) -> Any:
    """One GPU a task, and its share of the executor's cores; None where tasks need none, and in local mode."""
    if device != "cuda":
        return None
    if _session().conf.get("spark.master", "").split("[")[0] == "local":
        raise UsageError("Spark in local mode knows no GPUs: run without --executor spark, which takes all of them")
    from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests

    cores, gpus = _amount("spark.executor.cores") or 1, _amount("spark.executor.resource.gpu.amount") or 1
    builder = ResourceProfileBuilder().require(TaskResourceRequests().cpus(max(1, cores // gpus)).resource("gpu", 1))
    if _session().conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        executor = ExecutorResourceRequests().cores(cores)
        script = _session().conf.get("spark.executor.resource.gpu.discoveryScript", "")
        builder.require(executor.resource("gpu", gpus, script))
    return builder.build


def _amount(name: str) -> int:
    return int(_session().conf.get(name, "0") or 0)


def _session() -> Any:
    """The active Spark session, or a new one as the environment configures it."""
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UsageError("Spark is not installed: pip install 'clip-index[spark]'") from error
    active = SparkSession.getActiveSession()
    if active is None:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # `python3` of the path is seldom this environment
        try:
            active = SparkSession.builder.appName("clip-index").getOrCreate()
            atexit.register(active.stop)  # or its executors are killed, and started again
        except RuntimeError as error:
            raise ClipIndexError(f"Spark does not start: {' '.join(str(error).split())}; it needs Java 17") from error
    return active
