"""What an index of so many rows would take, before there are any: family, bytes, time, how many parts and machines.

1. The family, its bytes and its training sample follow from the number of rows and dimensions as in a build.
2. Rates are measured here and now on random vectors: arithmetic, encoding, gathering and writing.
3. Time is the work of each step over its rate. Where the codes exceed the memory, the rows are split into parts of
   equal size, an index each, to be built one after the other or on a machine each.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_index import families, partition, two_stage_build
from clip_index.types import UsageError

_USABLE = 0.8  # of the memory: the rest is for what is not the index
_PROBE_ROWS, _PROBE_LISTS = 65_536, 4096  # as a build adds them at 1M rows
_WRITE_PROBE = 64 << 20
_QUERIES = 2000  # of both kinds: what a build measures with


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: arithmetic, rows times dimensions encoded, bytes written with checksum."""

    flops: float
    encoded: float
    written: float


def parse_size(text: str) -> tuple[int, int]:
    """(rows, dimensions) of "1000000x512". Raises UsageError."""
    found = re.fullmatch(r"([1-9][\d_]*)x([1-9]\d*)", text.strip())
    if not found:
        raise UsageError(f"{text!r} is not ROWSxDIMENSIONS, such as 1000000x512")
    return int(found[1].replace("_", "")), int(found[2])


def plan(rows: int, dim: int, memory: int, rates: Rates | None = None) -> dict[str, Any]:
    """The plan for one modality; without `rates` they are measured, which takes some seconds."""
    rates = rates or measure_rates(dim)
    usable = int(memory * _USABLE)
    parts = 1
    while _build_bytes(math.ceil(rows / parts), dim, usable) > usable:
        parts += 1
        if parts > rows:
            raise UsageError(f"{memory} bytes of memory do not hold an index of one row")
    each = math.ceil(rows / parts)
    engine, key = families.choose(each, "auto", None)
    exact = not families.is_two_stage(engine, key)
    lists = 0 if exact else two_stage_build.lists_for(each)
    sample = two_stage_build.SAMPLE_PER_LIST * lists
    steps = _seconds(each, dim, lists, rates)
    resident = 2 * dim * each if exact else two_stage_build.search_bytes(each, dim, lists)
    disk = 2 * dim * each if exact else two_stage_build.disk_bytes(each, dim, lists)
    return {
        "rows": rows,
        "dim": dim,
        "memory": memory,
        "family": key,
        "parts": parts,
        "machines": parts,
        "rows_per_part": each,
        "training_rows": sample,
        "memory_bytes_per_part": resident,
        "memory_bytes_per_vector": resident / each,
        "build_bytes_per_part": _build_bytes(each, dim, usable),
        "disk_bytes_per_part": disk,
        "seconds": steps,
        "seconds_per_part": sum(steps.values()),
        "rates": {"flops": rates.flops, "encoded": rates.encoded, "written": rates.written},
    }


def _build_bytes(rows: int, dim: int, memory: int) -> int:
    if rows < families.EXACT_ROWS:
        return 2 * dim * rows
    lists = two_stage_build.lists_for(rows)
    return max(two_stage_build.build_bytes(rows, dim, lists, memory), two_stage_build.search_bytes(rows, dim, lists))


def _seconds(rows: int, dim: int, lists: int, rates: Rates) -> dict[str, float]:
    measured = 2.0 * _QUERIES * rows * dim / rates.flops
    if not lists:
        return {"write": 2 * dim * rows / rates.written, "measure": measured}
    sample, groups = two_stage_build.SAMPLE_PER_LIST * lists, partition.group_count(lists)
    compared = partition.compared(lists)
    train = sample * (dim + groups + 6 * lists / groups + 3 * compared) + 4 * 10 * lists * groups
    add = rows * (dim + compared)
    written = rows * (2 * dim + two_stage_build.code_bytes(dim) + 12)
    return {
        "train": 2.0 * dim * train / rates.flops,
        "add": 2.0 * dim * add / rates.flops + rows * dim / rates.encoded,
        "write": written / rates.written,
        "measure": measured,
    }


def measure_rates(dim: int) -> Rates:
    """Measure this machine with vectors of so many dimensions."""
    import faiss

    rows = np.random.default_rng(0).standard_normal((_PROBE_ROWS, dim), dtype=np.float32)
    centroids = rows[:_PROBE_LISTS].copy()

    def best(work: Any) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    parts = partition.Partition(centroids)
    pairs = _PROBE_ROWS * partition.compared(_PROBE_LISTS)
    flops = 2.0 * dim * pairs / best(lambda: parts.assign(rows))
    quantizer = faiss.IndexFlatL2(dim)
    quantizer.add(centroids)
    index = faiss.IndexIVFRaBitQ(quantizer, dim, _PROBE_LISTS, faiss.METRIC_INNER_PRODUCT)
    index.train(centroids)
    numbers, lists = np.arange(_PROBE_ROWS), parts.assign(rows)
    pointers = [faiss.swig_ptr(array) for array in (rows, numbers, lists)]

    def encode() -> None:
        rows.astype(np.float16).astype(np.float32)
        index.add_core(len(rows), *pointers)

    encoded = rows.size / best(encode)
    data = np.zeros(_WRITE_PROBE, np.uint8)
    places = np.random.default_rng(1).permutation(_WRITE_PROBE // 1024)

    def write() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(hashlib.sha256(data.reshape(-1, 1024)[places]).digest())
            file.write(data)

    return Rates(flops, encoded, _WRITE_PROBE / best(write))


def format_plan(planned: dict[str, Any]) -> str:
    """The plan for people."""
    parts = planned["parts"]
    each = "" if parts == 1 else " each"
    steps = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in planned["seconds"].items())
    lines = [
        f"{planned['rows']:,} rows of {planned['dim']} dimensions, {planned['memory'] / 1e9:,.1f} GB of memory",
        f"family      {planned['family']}",
        f"parts       {parts}, of {planned['rows_per_part']:,} rows{each}",
        f"machines    {planned['machines']} to search, a part each; 1 or more to build",
        f"in memory   {planned['memory_bytes_per_part'] / 1e9:,.2f} GB{each}, "
        f"{planned['memory_bytes_per_vector']:.1f} bytes a vector",
        f"to build    {planned['build_bytes_per_part'] / 1e9:,.2f} GB of memory{each}",
        f"on disk     {planned['disk_bytes_per_part'] / 1e9:,.2f} GB{each}",
        f"training    {planned['training_rows']:,} rows{each}",
        f"time        {_duration(planned['seconds_per_part'])}{each}: {steps}, at the rates measured here",
    ]
    if parts > 1:
        lines.append(f"            {_duration(parts * planned['seconds_per_part'])} for all parts on one machine")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
