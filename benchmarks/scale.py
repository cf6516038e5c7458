"""How the pipeline scales: workers, the queue, a million shards, memory, an object store.

    python benchmarks/scale.py [workers] [queue] [pool] [shards] [memory] [s3] [--shards 100000] [--gigabytes 20] ...

- workers: samples per second of `mini` with 1 and 2 workers of one core each.
- queue: `mini` on JPEGs on one core, tasks in a plain loop, two overlapping in a process, and handed to a worker.
- pool: JPEGs decoded and resized by threads and by processes.
- shards: seconds and peak memory to plan and to resume so many tars; see `benchmarks/shards.py`.
- memory: peak memory of `embed` for more and more of so many GB of tars; see `benchmarks/memory.py`.
- s3: the samples of a tar per second, read from a local file and from an S3 server on this machine.

Where there are rounds, all contenders take turns in each, and medians are printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path

import numpy as np
from embed import make_tar
from memory import cpu_seconds, memory
from shards import shards

from clip_index import executors, storage
from clip_index.embed_job import EmbedJob, describe
from clip_index.preprocess import Preprocess
from clip_index.readers import open_reader
from clip_index.types import Task

_PAIRS_A_TASK = 16


def nothing(rows: int, failed: int) -> None:
    """A report that nobody reads."""


def workers(folder: Path, pairs: int, rounds: int) -> None:
    """Throughput of 1 worker on one core, and of 2 on two."""
    for part in range(4):
        make_tar(folder / f"in/{part}.tar", pairs // 4)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number, count in itertools.product(range(rounds), rates):
        cores = sorted(os.sched_getaffinity(0))[:count]
        output = str(folder / f"out{number}-{count}")
        command = ["embed", str(folder / "in"), output, "--devices", f"cpu*{count}", "--json"]
        result = subprocess.run(
            [sys.executable, "-m", "clip_index", *command],
            capture_output=True,
            text=True,
            preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
        )
        assert result.returncode == 0, result.stderr
        rates[count].append(json.loads(result.stdout)["samples_per_s"])
    one, two = (statistics.median(found) for found in rates.values())
    print(f"workers  1 of one core: {one:.1f} samples/s, 2: {two:.1f}, {two / one:.2f} times as many")


def plain_loop(tasks: Sequence[Task], job: EmbedJob) -> Iterator[object]:
    """One task after the other."""
    return (job.run(task) for task in tasks)


def overlapping(tasks: Sequence[Task], job: EmbedJob) -> Iterator[object]:
    """As `--devices cpu`."""
    return executors.run_in_process(tasks, job.run, nothing)


def handed_out(tasks: Sequence[Task], job: EmbedJob) -> Iterator[object]:
    """As each worker of `--devices cpu*2`."""
    return executors.run_in_processes(tasks, [job], nothing)


def queue(folder: Path, pairs: int, rounds: int) -> None:
    """What a pair takes, from the end of the first task to the end of the last, all on one core."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    make_tar(folder / "in/0.tar", _PAIRS_A_TASK)
    for number in range(1, pairs // _PAIRS_A_TASK):
        os.link(folder / "in/0.tar", folder / f"in/{number}.tar")
    reader = open_reader(str(folder / "in"))
    tasks = reader.plan(1)
    config = describe("mini", "cpu", "auto", reader.modalities)
    taken: dict[Callable[..., Iterator[object]], list[np.ndarray]] = {plain_loop: [], overlapping: [], handed_out: []}
    for number, run in itertools.product(range(rounds), taken):
        output = str(folder / f"out{number}-{run.__name__}")
        job = EmbedJob(reader, output, config, threads=1)
        ends = [(time.perf_counter(), cpu_seconds(os.getpid())) for _ in run(tasks, job)]
        taken[run].append(1e3 * np.subtract(ends[-1], ends[0]) / (len(ends) - 1) / _PAIRS_A_TASK)
    loop = np.median(taken[plain_loop], axis=0)
    for run, found in taken.items():
        wall, cpu = np.median(found, axis=0)
        more = f"({wall / loop[0] - 1:+.1%}), {cpu:.2f} of them CPU ({cpu / loop[1] - 1:+.1%})"
        print(f"queue    {run.__name__:11} {wall:.2f} ms a pair {more}")


def pool(folder: Path, pairs: int, rounds: int) -> None:
    """The same pictures through the same preprocessing, on as many threads as on processes."""
    import torch

    torch.set_num_threads(1)
    make_tar(folder / "in/0.tar", pairs)
    reader = open_reader(str(folder / "in"))
    pictures = [sample.image for task in reader.plan(1) for sample in reader.read(task)]
    cores = len(os.sched_getaffinity(0))
    pools = {
        "threads": futures.ThreadPoolExecutor(cores),
        "processes": futures.ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _one_thread),
    }
    rates: dict[str, list[float]] = {name: [] for name in pools}
    for number, (name, workers) in itertools.product(range(rounds + 1), pools.items()):
        started = time.perf_counter()
        for pixels, _ in workers.map(Preprocess(), pictures, chunksize=8):
            assert pixels.shape == (224, 224, 3)
        if number:  # the first is a warm-up
            rates[name].append(len(pictures) / (time.perf_counter() - started))
    for name, found in rates.items():
        pools[name].shutdown()
        print(f"pool     {cores} {name:9} {statistics.median(found):.0f} JPEGs/s decoded and resized")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def s3(folder: Path, pairs: int) -> None:
    """The same tar from a file and from S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    make_tar(folder / "pairs.tar", pairs)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    boto3.client("s3").create_bucket(Bucket="bucket")
    storage.write_bytes("s3://bucket/pairs.tar", (folder / "pairs.tar").read_bytes())
    size = (folder / "pairs.tar").stat().st_size / 2**20
    for source in (str(folder / "pairs.tar"), "s3://bucket/pairs.tar"):
        reader = open_reader(source, modality="image,text")
        (task,) = reader.plan(10_000)
        started = time.perf_counter()
        samples = sum(sample.error is None for sample in reader.read(task))
        seconds = time.perf_counter() - started
        name = "s3" if source.startswith("s3") else "local"
        print(f"s3       {name:5} {samples / seconds:8.0f} samples/s, {size / seconds:6.0f} MB/s")
    server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = {
        "workers": lambda folder: workers(folder, options.pairs, options.rounds),
        "queue": lambda folder: queue(folder, options.pairs, options.rounds),
        "pool": lambda folder: pool(folder, options.pairs, options.rounds),
        "shards": lambda folder: shards(folder, options.shards),
        "memory": lambda folder: memory(folder, options.gigabytes),
        "s3": lambda folder: s3(folder, options.pairs),
    }
    parser.add_argument("what", nargs="*", help=f"{', '.join(run)}; all where none is named")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--gigabytes", type=float, default=20)
    options = parser.parse_args()
    if set(options.what) - run.keys():
        parser.error(f"choose from {', '.join(run)}")
    for name in options.what or run:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "in").mkdir()
            run[name](Path(folder))


if __name__ == "__main__":
    main()
