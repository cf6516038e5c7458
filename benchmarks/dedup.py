"""Near-duplicates that were planted, found by `dedup` and by comparing everything with everything, in one run.

    python benchmarks/dedup.py                         # 200,000 x 512 CLIP-like vectors
    python benchmarks/dedup.py --rows 1000000
    python benchmarks/dedup.py --data vectors          # the embeddings that benchmarks/index.py --data has kept

Of the rows 1% are exact copies of others, and 2% are copies with noise, of a cosine of 0.985 to 0.9995 in float32; all
lie at random places. Without them no two rows are as similar as the threshold. `dedup` works on an index as
`build-index` makes it, whose build is not counted. Brute force is faiss's range search over all rows; it is asked for
`--queries` of them, and its time for all rows is worked out from that. `found` counts the planted pairs of which one
row is dropped in favour of the other, among all rows or among those that brute force was asked for; `false` counts
rows that are dropped, or found to be alike, and were not planted. `peak` is memory that is not a page of a file. The
two methods run in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHARD_ROWS, EXACT, NOISY = 50_000, 0.01, 0.02
COSINES = 0.985, 0.9995


def plant(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Make rows copies of others, in place; int64 [pairs, 2], (copy, original)."""
    rng = np.random.default_rng(seed)
    rows, dim = vectors.shape
    exact, noisy = int(rows * EXACT), int(rows * NOISY)
    chosen = rng.permutation(rows)[: 2 * (exact + noisy)].reshape(2, -1)
    copies, originals = chosen
    vectors[copies] = vectors[originals]
    noise = rng.standard_normal((noisy, dim)).astype(np.float32)
    source = vectors[originals[exact:]].astype(np.float32)
    source /= np.linalg.norm(source, axis=1, keepdims=True)
    noise -= np.einsum("nd,nd->n", noise, source)[:, None] * source
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosine = rng.uniform(*COSINES, (noisy, 1)).astype(np.float32)
    vectors[copies[exact:]] = cosine * source + np.sqrt(1 - cosine**2) * noise
    return chosen.T


def make(folder: Path, options: argparse.Namespace) -> None:
    """Embeddings with copies among them in folder/e, their index in folder/i."""
    from clip_like import ClipLike

    from clip_index.index import build_index
    from clip_index.shard_writer import EmbeddingWriter
    from clip_index.store import EmbeddingConfig, Manifest, finalize
    from clip_index.types import Task
    from clip_index.vectors import Vectors

    if options.data:
        held = Vectors(str(options.data), Manifest.load(str(options.data)), "image")
        vectors = held.take(np.arange(min(options.rows, held.rows)), np.float16)
    else:
        source = ClipLike(options.dim)
        starts = range(0, options.rows, SHARD_ROWS)
        vectors = np.concatenate(
            [
                source.rows(min(SHARD_ROWS, options.rows - start), "image", 10 + at).astype(np.float16)
                for at, start in enumerate(starts)
            ]
        )
    np.save(folder / "planted.npy", plant(vectors))
    config = EmbeddingConfig("none", "", "fp32", {}, ("image",), vectors.shape[1])
    starts = range(0, len(vectors), SHARD_ROWS)
    for shard, start in enumerate(starts):
        part = vectors[start : start + SHARD_ROWS].astype(np.float32)
        with EmbeddingWriter(str(folder / "e"), Task(shard, ((shard,),)), config) as writer:
            part /= np.linalg.norm(part, axis=1, keepdims=True)
            writer.append({"image": part}, [{"key": str(start + at)} for at in range(len(part))])
            writer.commit()
    finalize(str(folder / "e"), Manifest(config, tasks=len(starts)))
    build_index(str(folder / "e"), str(folder / "i"), queries=20)


def by_dedup(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The pairs that `clip-index dedup` drops one row of."""
    import pyarrow.parquet as pq

    from clip_index.duplicate_lists import write_duplicate_lists

    planted = np.load(folder / "planted.npy")

    def work() -> set[tuple[int, int]]:
        write_duplicate_lists(str(folder / "i"), str(folder / "lists"), threshold=options.threshold)
        dropped = pq.read_table(folder / "lists/dropped.parquet")
        return set(zip(dropped["row"].to_pylist(), dropped["kept_row"].to_pylist(), strict=True))

    return measure(work, planted)


def by_brute_force(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The pairs that faiss's range search finds for some of the rows."""
    import faiss

    from clip_index.store import Manifest
    from clip_index.vectors import Vectors

    vectors = Vectors(str(folder / "e"), Manifest.load(str(folder / "e")), "image")
    planted = np.load(folder / "planted.npy")
    count = min(options.queries, vectors.rows)
    asked = np.random.default_rng(1).permutation(vectors.rows)[:count]

    index = faiss.IndexFlatIP(vectors.dim)
    for _, block in vectors.blocks():
        index.add(block)

    def work() -> set[tuple[int, int]]:
        pairs = set()
        for start in range(0, count, 1024):
            rows = asked[start : start + 1024]
            limits, _, found = index.range_search(vectors.take(rows), options.threshold)
            left = np.repeat(rows, np.diff(limits).astype(np.int64))
            pairs |= {(int(a), int(b)) for a, b in zip(left, found, strict=True) if a != b}
        return pairs

    return {**measure(work, planted[np.isin(planted, asked).any(axis=1)]), "share": count / vectors.rows}


def measure(work: Any, planted: np.ndarray) -> dict[str, Any]:
    """Time some work that returns pairs of rows, and compare them with the planted ones, in either order."""
    from clip_index.steps import Steps

    steps, cpu = Steps(), time.process_time()
    with steps.timed("work"):
        pairs = {tuple(sorted(pair)) for pair in work()}
    cpu = time.process_time() - cpu
    wanted = {tuple(sorted(pair)) for pair in planted.tolist()}
    told = {"planted": len(wanted), "found": len(pairs & wanted), "false": len(pairs - wanted)}
    return {**told, "seconds": steps.seconds["work"], "cpu": cpu, "peak": steps.peak_memory_bytes["work"] / 1e6}


METHODS = {"dedup": by_dedup, "brute force": by_brute_force}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--queries", type=int, default=5000, help="rows that brute force is asked for")
    parser.add_argument("--data", type=Path, help="embeddings to plant copies in, instead of CLIP-like vectors")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(METHODS[options.one](options.scratch, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), options)
        results = {}
        for method in METHODS:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", method, "--scratch", scratch]
            results[method] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; pairs of a cosine of {options.threshold} or more")
    columns = ("planted", "found", "false", "seconds", "cpu", "peak")
    print(f"{'':28}" + "".join(f"{name:>10}" for name in columns))
    brute = results["brute force"]
    share = brute.pop("share")
    whole = {
        **dict.fromkeys(("planted", "found", "false"), ""),
        **{name: brute[name] / share for name in ("seconds", "cpu")},
    }
    if share < 1:
        results |= {f"brute force, {share:.1%} of the rows": results.pop("brute force")}
        results |= {"brute force, worked out": {**whole, "peak": brute["peak"]}}
    for method, row in results.items():
        cells = (f"{row[name]:10,.1f}" if isinstance(row[name], float) else f"{row[name]:>10}" for name in columns)
        print(f"{method:28}" + "".join(cells))
    ratio = whole["cpu"] / results["dedup"]["cpu"]
    print(f"brute force takes {ratio:,.1f} times the CPU time of dedup")


if __name__ == "__main__":
    main()
