"""How the pipeline scales: workers, the queue, a million shards, an object store.

    python benchmarks/scale.py [workers] [queue] [shards] [s3] [--shards 100000] [--pairs 512]

- workers: samples per second of `mini` with 1 and 2 workers of one core each.
- queue: what it costs to hand a task to a worker process and take its result, of a shard that takes a second.
- shards: seconds and peak memory to plan, to look at finished markers and to finalize, for so many tars and markers
  of a few bytes. A million takes some GB of disk and some minutes to make.
- s3: the samples of a tar per second, read from a local file and from an S3 server on this machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from embed import make_tar

from clip_index import executors, store
from clip_index.markers import Shard, ShardTable, name_width, read_markers, shard_files
from clip_index.types import Task


def nothing(rows: int, failed: int) -> None:
    """A report that nobody reads."""


class Empty:
    """A job that takes no time: what remains is the queue."""

    def __call__(self, task: Task, report: executors.Report) -> Shard:
        report(10_000, 0)
        return Shard(task.id, task.digest, 10_000, 0)


def workers(folder: Path, pairs: int) -> None:
    """Throughput of 1 worker on one core, and of 2 on two."""
    for part in range(4):
        make_tar(folder / f"{part}.tar", pairs // 4)
    for count in (1, 2):
        cores = sorted(os.sched_getaffinity(0))[:count]
        command = ["embed", str(folder), str(folder / f"out{count}"), "--devices", f"cpu*{count}", "--json"]
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "clip_index", *command],
            capture_output=True,
            text=True,
            preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
        )
        assert result.returncode == 0, result.stderr
        rate = json.loads(result.stdout)["samples_per_s"]
        print(f"workers  {count} of one core: {rate:.1f} samples/s, {time.perf_counter() - started:.1f} s in all")


def queue(tasks: int = 5000) -> None:
    """Tasks that take no time, in a loop and handed to a worker process."""
    made = [Task(number, ((f"in{number}",),)) for number in range(tasks)]
    job = Empty()
    started = time.perf_counter()
    for task in made:
        job(task, nothing)
    loop = (time.perf_counter() - started) / tasks
    times = [time.perf_counter() for _ in executors.run_in_processes(made, [job], nothing)]
    handed = (times[-1] - times[0]) / (tasks - 1)
    share = f"{handed - loop:.2%} of a shard of a second"
    print(f"queue    {1e3 * loop:.3f} ms a task in a loop, {1e3 * handed:.3f} ms handed out: {share}")


CONFIG = store.EmbeddingConfig("mini", "mini-1:0", "fp32", {"size": 224}, ("image", "text"), dim=384)


def make_shards(folder: Path, shards: int) -> None:
    """Empty tars, and a marker for each as `embed` writes it, with files of that size that take no room."""
    from clip_index.readers.webdataset import WebdatasetReader

    (folder / "in").mkdir()
    for name in ("done", "img_emb", "text_emb", "metadata"):
        (folder / "out" / name).mkdir(parents=True)
    for number in range(shards):
        (folder / f"in/{number:07d}.tar").touch()
    width = name_width(shards)
    for task in WebdatasetReader(str(folder / "in"), ("image", "text")).plan(1):
        names = shard_files(task.id, width)
        files = {names[kind]: {"bytes": 7680128, "sha256": task.digest * 4} for kind in ("image", "text", "metadata")}
        for name in files:
            with open(folder / "out" / name, "wb") as file:
                file.truncate(7680128)
        marker = {"id": task.id, "inputs": task.digest, "rows": 10_000, "failed": 0, "files": files}
        (folder / "out" / names["done"]).write_text(json.dumps(marker, indent=1))


def shards_plan(folder: Path, shards: int) -> None:
    """List the tars and make the tasks."""
    from clip_index.readers import open_reader

    tasks = open_reader(str(folder / "in"), modality="image,text").plan(10_000)
    assert len(tasks) == shards


def shards_resume(folder: Path, shards: int) -> None:
    """Look at every marker, as each run does first."""
    assert len(ShardTable(read_markers(str(folder / "out")))) == shards


def shards_finalize(folder: Path, shards: int) -> None:
    """Write the manifest over all markers."""
    store.finalize(str(folder / "out"), store.Manifest(CONFIG, tasks=shards, width=name_width(shards)))


def shards_load(folder: Path, shards: int) -> None:
    """Read the manifest, and find the last row."""
    manifest = store.Manifest.load(str(folder / "out"))
    assert manifest.locate(manifest.rows - 1) == (shards - 1, 9999)


def measured(function: Callable[..., None], *given: object) -> tuple[float, float]:
    """(seconds, peak MB) of a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (function, given))


def _measure(function: Callable[..., None], given: tuple[object, ...]) -> tuple[float, float]:
    started = time.perf_counter()
    function(*given)
    seconds = time.perf_counter() - started
    # not ru_maxrss, which a process inherits from the one that started it
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak.split()[1]) / 1024


def shards(folder: Path, count: int) -> None:
    """A plan and a manifest of so many shards."""
    make_shards(folder, count)
    for function in (shards_plan, shards_resume, shards_finalize, shards_load):
        seconds, megabytes = measured(function, folder, count)
        print(f"shards   {count:,}: {function.__name__[7:]:8} {seconds:6.1f} s, {megabytes:5.0f} MB")


def s3(folder: Path, pairs: int) -> None:
    """The same tar from a file and from S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    from clip_index import storage
    from clip_index.readers import open_reader

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
    parser.add_argument("what", nargs="*", help="workers, queue, shards, s3; all where none is named")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=512)
    options = parser.parse_args()
    chosen = options.what or ["workers", "queue", "shards", "s3"]
    run = {
        "workers": lambda folder: workers(folder, options.pairs),
        "queue": lambda folder: queue(),
        "shards": lambda folder: shards(folder, options.shards),
        "s3": lambda folder: s3(folder, options.pairs),
    }
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            run[name](Path(folder))


if __name__ == "__main__":
    main()
