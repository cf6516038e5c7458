"""What a build says about its index: warnings, the file that autofaiss writes beside an index, a table for people."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from clip_index.opened import read_file
from clip_index.vectors import Vectors


def below_target(modality: str, part: dict[str, Any], target: float) -> Iterator[str]:
    """A warning, naming what to change, for each kind of query that misses the recall target."""
    advice = "give it more --memory or another --index_key (SQfp16 is exact)"
    if "points" in part:
        advice = "raise --recall_target, or choose another --index_key (SQfp16 is exact)"
    if part["recall_against"] == "codes" and part["recall"]:
        yield (
            f"recall of the {modality} index is measured against what its codes say of its rows, since the embeddings "
            "that it was built from are gone or have changed: it looks better than it is"
        )
    for kind, measured in part["recall"].items():
        found = measured["recall@10"]
        mean = found["mean"]
        # two stages are tuned to the target, and miss it by chance as often as not
        if mean + ("points" in part) * found["interval"] < target:
            yield (
                f"the {modality} index finds {mean:.3f} of the 10 nearest for {kind} queries, less than the target of "
                f"{target}: {advice}"
            )


def infos(part: dict[str, Any], file: str, vectors: Vectors, path: str) -> dict[str, Any]:
    """What autofaiss writes beside an index, under its names; its readers expect them. It is read from `file`."""
    built = read_file(file)
    sample = vectors.take(np.arange(min(1000, vectors.rows)))
    try:
        error = float(np.linalg.norm(built.sa_decode(built.sa_encode(sample)) - sample, axis=1).mean())
    except RuntimeError:  # a family that stores the vectors themselves
        error = 0.0
    return {
        "index_key": part["index_key"],
        "index_param": part["index_param"],
        "index_path": path,
        "size in bytes": os.path.getsize(file),
        "avg_search_speed_ms": part["ms"]["mean"],
        "99p_search_speed_ms": part["ms"]["p99"],
        "reconstruction error %": 100 * error,
        "nb vectors": vectors.rows,
        "vectors dimension": vectors.dim,
        "compression ratio": 4 * vectors.rows * vectors.dim / os.path.getsize(file),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    parts = report["indices"]
    two_stage = any("points" in part for part in parts.values())
    rows = [("", *parts)]

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        rows.append((name, *(cell(part) for part in parts.values())))

    row("family", lambda part: f"{part['index_key']} ({part['engine']})")
    row("size", lambda part: f"{part['bytes'] / 1e6:,.1f} MB")
    row("bytes a vector", lambda part: f"{part['bytes_per_vector']:,.0f}")
    if two_stage:
        row("bytes a vector in memory", lambda part: f"{part['memory_bytes_per_vector']:,.1f}")
        row("lists, imbalance", lambda part: f"{part['lists']['count']:,}, {part['lists']['imbalance']:.2f}")
    for kind in dict.fromkeys(kind for part in parts.values() for kind in part["recall"]):
        count = next(part["recall"][kind]["queries"] for part in parts.values())
        for at in ("recall@1", "recall@10", "recall@100"):
            row(f"{at}, {count:,} {kind} queries", lambda part: _mean(part["recall"][kind][at]))  # noqa: B023
        if two_stage:
            row("  recall@10 by codes alone", lambda part: _mean(part["coarse_recall"][kind]["recall@10"]))  # noqa: B023
            row("  lists looked at, re-ranked", lambda part: "{nprobe}, {rerank}".format(**part["points"][kind]))  # noqa: B023
    row("ms a query, p50 / p99", lambda part: _ms(part["ms"]))
    if any("cold" in part["speed"] for part in parts.values()):
        threads = next(iter(parts.values()))["speed"]["threads"]
        row(f"  on {threads} threads at once", lambda part: _ms(part["speed"]["all_threads"]))
        row("  files not in memory yet", lambda part: _ms(part["speed"].get("cold")))
        row(
            "queries/s, one by one / batch",
            lambda part: "{queries_per_s:,.0f} / {batch_queries_per_s:,.0f}".format(**part["speed"]),
        )
    row("seconds", lambda part: f"{sum(part['seconds'].values()):.1f}")
    if two_stage:
        for step in dict.fromkeys(step for part in parts.values() for step in part["seconds"]):
            row(f"  {step}, peak memory", lambda part: _step(part, step))  # noqa: B023
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{report['index']}: {report['rows']:,} rows of {report['dim']} dimensions, encoder {report['encoder']}"
    foot = f"built in {report['seconds']:.1f} s, peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB"
    return "\n".join([head, "", *lines, "", foot, *(f"warning: {warning}" for warning in report["warnings"])])


def _mean(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} ± {found['interval']:.3f}"


def _ms(times: dict[str, float] | None) -> str:
    return f"{times['p50']:.2f} / {times['p99']:.2f}" if times else "not measured"


def _rates(speed: dict[str, Any]) -> str:
    return f"{speed['queries_per_s']:,.0f} / {speed['batch_queries_per_s']:,.0f}"


def _step(part: dict[str, Any], step: str) -> str:
    return f"{part['seconds'].get(step, 0):.1f}, {part['peak_memory_bytes'].get(step, 0) / 1e6:,.0f} MB"
