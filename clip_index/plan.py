"""What an index of so many rows would take, before there are any: family, bytes, time, how many parts and machines.

1. The family, its bytes and its training sample follow from the number of rows and dimensions as in a build.
2. Rates are measured here and now on random vectors (`clip_index.rates`).
3. Time is the work of each step over its rate. Where the codes exceed the memory, the rows are split into parts of
   equal size, an index each, to be built one after the other or on a machine each.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

from clip_index import families, partition, points, two_stage_build
from clip_index.measure import MORE_STEPS
from clip_index.rates import Rates, measure_rates
from clip_index.types import UsageError

_USABLE = 0.8  # of the memory: the rest is for what is not the index
_QUERIES = 2000  # of both kinds: what a build measures with
_TYPICAL_LISTS = 64  # to look into: fewer or more are found when an index is tuned
_SEARCHES = 2500  # in a batch; those of one thread, of which there are fewer, take longer


def parse_size(text: str) -> tuple[int, int]:
    """(rows, dimensions) of "1000000x512". Raises UsageError."""
    found = re.fullmatch(r"([1-9][\d_]*)x([1-9]\d*)", text.strip())
    if not found:
        raise UsageError(f"{text!r} is not ROWSxDIMENSIONS, such as 1000000x512")
    return int(found[1].replace("_", "")), int(found[2])


def plan(rows: int, dim: int, memory: int, rates: Rates | None = None) -> dict[str, Any]:
    """The plan for one modality; without `rates` they are measured, which takes some seconds."""
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
    rates = rates or measure_rates(dim, max(1, each // max(1, lists)))
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
        "rates": asdict(rates),
    }


def _build_bytes(rows: int, dim: int, memory: int) -> int:
    if rows < families.EXACT_ROWS:
        return 2 * dim * rows
    lists = two_stage_build.lists_for(rows)
    return max(two_stage_build.build_bytes(rows, dim, lists, memory), two_stage_build.search_bytes(rows, dim, lists))


def _seconds(rows: int, dim: int, lists: int, rates: Rates) -> dict[str, float]:
    exact = _QUERIES * rows / rates.compared
    if not lists:
        return {"write": 2 * dim * rows / rates.hashed, "measure": exact}
    training = partition.training(two_stage_build.SAMPLE_PER_LIST * lists, lists)
    tried = [count for count in points.grid(lists) if count <= _TYPICAL_LISTS]
    tried += points.grid(lists)[len(tried) :][:MORE_STEPS]
    return {
        "train": training / rates.trained,
        "add": rows * partition.compared(lists) / rates.assigned,
        "write": rows / rates.encoded,
        "exact search": exact,
        "tune": _QUERIES / 2 * sum(rates.query_s + count * rates.list_s for count in tried),
        "measure": _SEARCHES * rates.search_s,
        "commit": two_stage_build.disk_bytes(rows, dim, lists) / rates.hashed,
    }


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
