"""What so many shards cost before and after any of them is embedded: `python benchmarks/scale.py shards`.

Made are empty tars, and for each the marker that `embed` writes and files of the size that it says, which take no room
on the disk. A million takes 4 million files and some minutes to make. Then, each in a process of its own:

- plan: list the tars and make the tasks;
- resume: read every marker;
- run: all of `embed`, which finds that nothing is left to do: plan, resume, the model, finalize;
- finalize: every marker, every file's size, the manifest;
- load: read the manifest and find the last row.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

from clip_index import store
from clip_index.markers import ShardTable, name_width, read_markers, shard_files
from clip_index.readers import open_reader
from clip_index.readers.webdataset import WebdatasetReader

CONFIG = store.EmbeddingConfig("mini", "mini-1:0", "fp32", {"size": 224}, ("image", "text"), dim=384)


def make_shards(folder: Path, shards: int) -> None:
    """Empty tars, and a marker for each as `embed` writes it, with files of that size that take no room."""
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


def plan(folder: Path, shards: int) -> None:
    """List the tars and make the tasks."""
    tasks = open_reader(str(folder / "in"), modality="image,text").plan(10_000)
    assert len(tasks) == shards


def resume(folder: Path, shards: int) -> None:
    """Look at every marker, as each run does first."""
    assert len(ShardTable(read_markers(str(folder / "out")))) == shards


def finalize(folder: Path, shards: int) -> None:
    """Write the manifest over all markers."""
    store.finalize(str(folder / "out"), store.Manifest(CONFIG, tasks=shards, width=name_width(shards)))


def run(folder: Path, shards: int) -> None:
    """All of `embed` where nothing is left to do."""
    from clip_index.embed import embed

    summary = embed(str(folder / "in"), str(folder / "out"), modality="image,text", devices="cpu", precision="fp32")
    assert (summary.shards, summary.new_rows) == (shards, 0)


def load(folder: Path, shards: int) -> None:
    """Read the manifest, and find the last row."""
    manifest = store.Manifest.load(str(folder / "out"))
    assert manifest.locate(manifest.rows - 1) == (shards - 1, 9999)


def measured(function: Callable[..., None], *given: object) -> tuple[float, float, float]:
    """(seconds, seconds of CPU, peak MB) of a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (function, given))


def _measure(function: Callable[..., None], given: tuple[object, ...]) -> tuple[float, float, float]:
    started = time.perf_counter(), time.process_time()
    function(*given)
    seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    # not ru_maxrss, which a process inherits from the one that started it
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, cpu, int(peak.split()[1]) / 1024


def shards(folder: Path, count: int) -> None:
    """A plan and a manifest of so many shards."""
    make_shards(folder, count)
    for function in (plan, resume, run, finalize, load):
        seconds, cpu, megabytes = measured(function, folder, count)
        told = f"{seconds:6.1f} s, {cpu:5.1f} s of CPU, {megabytes:5.0f} MB"
        print(f"shards   {count:,}: {function.__name__:8} {told}", flush=True)
