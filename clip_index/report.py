"""What a build says about its index: warnings, the file that autofaiss writes beside an index, a table for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from clip_index.vectors import Vectors


def below_target(modality: str, part: dict[str, Any], target: float) -> Iterator[str]:
    """A warning, naming what to change, for each kind of query that misses the recall target."""
    for kind, measured in part["recall"].items():
        mean = measured["recall@10"]["mean"]
        if mean < target:
            yield (
                f"the {modality} index finds {mean:.3f} of the 10 nearest for {kind} queries, less than the target of "
                f"{target}: give it more --memory or another --index_key (SQfp16 is exact)"
            )


def infos(part: dict[str, Any], built: Any, vectors: Vectors, path: str) -> dict[str, Any]:
    """What autofaiss writes beside an index, under its names; its readers expect them."""
    sample = vectors.take(np.arange(min(1000, vectors.rows)))
    try:
        error = float(np.linalg.norm(built.sa_decode(built.sa_encode(sample)) - sample, axis=1).mean())
    except RuntimeError:  # a family that stores the vectors themselves
        error = 0.0
    return {
        "index_key": part["index_key"],
        "index_param": part["index_param"],
        "index_path": path,
        "size in bytes": part["bytes"],
        "avg_search_speed_ms": part["ms"]["mean"],
        "99p_search_speed_ms": part["ms"]["p99"],
        "reconstruction error %": 100 * error,
        "nb vectors": vectors.rows,
        "vectors dimension": vectors.dim,
        "compression ratio": 4 * vectors.rows * vectors.dim / part["bytes"],
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    parts = report["indices"]
    rows = [("", *parts)]
    rows.append(("family", *(f"{part['index_key']} ({part['engine']})" for part in parts.values())))
    rows.append(("size", *(f"{part['bytes'] / 1e6:,.1f} MB" for part in parts.values())))
    rows.append(("bytes a vector", *(f"{part['bytes_per_vector']:,.0f}" for part in parts.values())))
    for kind in dict.fromkeys(kind for part in parts.values() for kind in part["recall"]):
        for at in ("recall@1", "recall@10", "recall@100"):
            cells = (part["recall"][kind][at] for part in parts.values())
            values = (f"{cell['mean']:.3f} ± {cell['interval']:.3f}" for cell in cells)
            count = next(part["recall"][kind]["queries"] for part in parts.values())
            rows.append((f"{at}, {count:,} {kind} queries", *values))
    rows.append(("ms a query, p50 / p99", *(f"{p['ms']['p50']:.2f} / {p['ms']['p99']:.2f}" for p in parts.values())))
    rows.append(("seconds", *(f"{sum(part['seconds'].values()):.1f}" for part in parts.values())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{report['index']}: {report['rows']:,} rows of {report['dim']} dimensions, encoder {report['encoder']}"
    foot = f"built in {report['seconds']:.1f} s, peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB"
    return "\n".join([head, "", *lines, "", foot, *(f"warning: {warning}" for warning in report["warnings"])])
