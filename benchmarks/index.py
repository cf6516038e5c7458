"""An index against its peers in one run: build time, memory, size, recall for image and text queries, speed.

    python benchmarks/index.py                         # 1M x 512 CLIP-like vectors; hours, as HNSW takes long
    python benchmarks/index.py --rows 100000           # the same in minutes
    python benchmarks/index.py --methods ours,flat     # only some
    python benchmarks/index.py --pictures openclipart-png.deb   # real pictures and captions through `mini`

Each method runs in a process of its own, on the same embeddings and the same held-out queries; exact search of the
float16 rows says what is right. `p50` and `p99` are milliseconds of one query of 10 results on one thread, `CPU` its
processor time, which other programs on the machine change less, `QPS` one batch of all queries on all threads. `MB`
is on disk, `B/row` what is read again and again from memory. `peak` is memory that is not a page of a file. A line of
`ours` says how long a new process takes from its imports to the first answer of `Searcher(index).search(...)`.
The pictures are those of the Debian package openclipart-png; `apt-get download openclipart-png` fetches it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("ours", "autofaiss", "autofaiss-same-bytes", "flat", "hnsw", "script")
TARGETS = "at 1M x 512 on two idle cores: 60 s, 80 B/row, recall 0.99 and 0.99, p50 1.5 ms"
SHARD_ROWS, QUERIES, K = 50_000, 1000, 10


def make_vectors(folder: Path, rows: int, dim: int) -> None:
    """Embeddings of CLIP-like vectors, as `clip-index embed` writes them, and held-out queries."""
    from clip_like import ClipLike

    from clip_index.shard_writer import EmbeddingWriter
    from clip_index.store import EmbeddingConfig, Manifest, finalize
    from clip_index.types import Task

    source, config = ClipLike(dim), EmbeddingConfig("none", "", "fp32", {}, ("image", "text"), dim)
    shards = range(0, rows, SHARD_ROWS)
    for shard, start in enumerate(shards):
        count = min(SHARD_ROWS, rows - start)
        vectors = {kind: source.rows(count, kind, 10 + 2 * shard + at) for at, kind in enumerate(config.modalities)}
        names = [{"key": str(row), "caption": f"caption {row}"} for row in range(start, start + count)]
        with EmbeddingWriter(str(folder), Task(shard, ((shard,),)), config) as writer:
            writer.append(vectors, names)
            writer.commit()
    finalize(str(folder), Manifest(config, tasks=len(shards)))
    for seed, kind in enumerate(config.modalities):
        np.save(folder / f"queries_{kind}.npy", source.rows(QUERIES, kind, seed))


def make_pictures(folder: Path, package: Path) -> None:
    """`mini` embeddings of the package's captioned pictures; one in ten is held out to make queries of."""
    from clip_index.embed import embed
    from clip_index.store import Manifest, read_vectors

    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
        pictures = sorted(path for path in Path(scratch).rglob("*.png") if path.is_file() and not path.is_symlink())
        for at, path in enumerate(pictures):
            place = Path(scratch, "held_out" if at % 10 == 0 else "rows", f"{at:05d}.png")
            place.parent.mkdir(exist_ok=True)
            path.rename(place)
            place.with_suffix(".txt").write_text(path.stem.replace("_", " "))
        embed(f"{scratch}/rows", str(folder), modality="image,text", max_failure_rate=1)
        held_out = Path(scratch, "embeddings")
        embed(f"{scratch}/held_out", str(held_out), modality="image,text", max_failure_rate=1)
        manifest = Manifest.load(str(held_out))
        for kind in ("image", "text"):
            shards = [read_vectors(str(held_out), kind, shard) for shard in manifest.ids]
            np.save(folder / f"queries_{kind}.npy", np.concatenate(shards).astype(np.float32))


def open_vectors(folder: Path) -> Any:
    """The image vectors of the embeddings."""
    from clip_index.store import Manifest
    from clip_index.vectors import Vectors

    return Vectors(str(folder), Manifest.load(str(folder)), "image")


def make_truth(folder: Path) -> None:
    """The exact scores of the 10 nearest rows of each query."""
    from clip_index.recall import Queries, exact_neighbours

    for kind in ("image", "text"):
        queries = Queries(kind, np.load(folder / f"queries_{kind}.npy"))
        np.save(folder / f"truth_{kind}.npy", exact_neighbours(open_vectors(folder), queries, K)[0])


Search = Callable[[np.ndarray, str], tuple[np.ndarray, np.ndarray]]
Built = tuple[Search, list[str], float]
"""A search of (queries, kind of query), the files that it reads, the bytes that it reads again and again."""


FIRST = """
import sys, time
import faiss, numpy, pyarrow
from clip_index import metadata, search
query = numpy.load(sys.argv[2])[0]
started = time.perf_counter()
search.Searcher(sys.argv[1]).search(vector=query)
print(1000 * (time.perf_counter() - started))
"""


def first_answer(index: str, queries: Path) -> float:
    """Milliseconds from opening an index to its first answer, in a process of its own; the median of five."""
    command = [sys.executable, "-c", FIRST, index, str(queries)]
    return float(np.median([float(subprocess.check_output(command)) for _ in range(5)]))


def build_ours(folder: Path, scratch: str, options: argparse.Namespace) -> Built:
    """`clip-index build-index` of the images, tuned with the texts."""
    from clip_index.index import build_index
    from clip_index.index_folder import IndexFolder
    from clip_index.opened import open_index
    from clip_index.points import Point

    report = build_index(str(folder), scratch, modality="image", recall_target=options.recall_target)
    index, part = IndexFolder(scratch), report["indices"]["image"]
    opened, points = open_index(index, "image"), index.marker.search["image"]
    files = [f"{scratch}/{name}" for name in os.listdir(scratch) if name.startswith("image.")]
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in part["seconds"].items())
    print(f"  ours: {part['index_key']}, points {points}; seconds: {steps}", file=sys.stderr)
    return (
        lambda queries, kind: opened.search(queries, K, Point(**points[kind]) if points else None),
        files,
        part["memory_bytes"],
    )


def written(index: Any, scratch: str) -> Built:
    """A faiss index that is written, and searched as it is."""
    import faiss

    path = f"{scratch}/knn.index"
    faiss.write_index(index, path)
    return lambda queries, _: index.search(queries, K), [path], os.path.getsize(path)


def build_autofaiss(folder: Path, scratch: str, options: argparse.Namespace) -> Built:
    """autofaiss with the memory that the command takes by default, or with that of our codes."""
    from clip_index import autofaiss_compat

    vectors = open_vectors(folder)
    memory = 4 << 30 if options.one == "autofaiss" else int(1.25 * options.same_bytes * vectors.rows)
    index, key, parameters = autofaiss_compat.build(vectors.path, index_key=None, memory=memory, available=4 << 30)
    print(f"  {options.one}: {key} {parameters}", file=sys.stderr)
    return written(index, scratch)


def build_faiss(folder: Path, scratch: str, options: argparse.Namespace) -> Built:
    """faiss's own: exact search, and HNSW as most people build it."""
    import faiss

    vectors = open_vectors(folder)
    index = faiss.index_factory(
        vectors.dim, {"flat": "Flat", "hnsw": "HNSW32"}[options.one], faiss.METRIC_INNER_PRODUCT
    )
    if options.one == "hnsw":
        index.hnsw.efSearch = 256
    for _, block in vectors.blocks():
        index.add(block)
    return written(index, scratch)


def build_script(folder: Path, scratch: str, options: argparse.Namespace) -> Built:
    """What ten lines of faiss and numpy give: IVF and RaBitQ, the best 400 of 128 lists compared exactly."""
    import faiss

    vectors = open_vectors(folder)
    lists = min(4096, vectors.rows // 40)
    index = faiss.index_factory(vectors.dim, f"IVF{lists},RaBitQ", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid, index.qb, index.nprobe = 8, 10**6, 4, 128
    rows = np.random.default_rng(0).choice(vectors.rows, min(vectors.rows, 200_000), replace=False)
    index.train(vectors.take(rows))
    for _, block in vectors.blocks():
        index.add(block)
    faiss.write_index(index, f"{scratch}/knn.index")

    def search(queries: np.ndarray, _: str) -> tuple[np.ndarray, np.ndarray]:
        found = index.search(queries, min(400, vectors.rows))[1]
        scores = np.stack([vectors.take(row) @ query for row, query in zip(found, queries, strict=True)])
        order = np.argsort(-scores, axis=1)[:, :K]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)

    return search, [f"{scratch}/knn.index"], os.path.getsize(f"{scratch}/knn.index")


BUILDERS = {"ours": build_ours, "flat": build_faiss, "hnsw": build_faiss, "script": build_script}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build with one method, in this process, and measure it."""
    import faiss

    from clip_index.recall import scores_of, tie_aware_recall
    from clip_index.steps import Steps

    vectors, steps = open_vectors(folder), Steps()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with steps.timed("build"):
            search, files, memory = BUILDERS.get(options.one, build_autofaiss)(folder, scratch, options)
        if options.one == "ours":
            first = first_answer(scratch, folder / "queries_text.npy")
            print(f"  ours: first answer in {first:.0f} ms", file=sys.stderr)
        result = {
            "method": options.one,
            "build": steps.seconds["build"],
            "peak": steps.peak_memory_bytes["build"] / 1e6,
        }
        result |= {"MB": sum(map(os.path.getsize, files)) / 1e6, "B/row": memory / vectors.rows}
        queries = {kind: np.load(folder / f"queries_{kind}.npy") for kind in ("image", "text")}
        for kind, asked in queries.items():
            started = time.perf_counter()
            found = search(asked, kind)[1]
            result["QPS"] = len(asked) / (time.perf_counter() - started)
            truth = np.load(folder / f"truth_{kind}.npy")
            result[kind] = float(tie_aware_recall(truth, scores_of(vectors, asked, found), K).mean())
        faiss.omp_set_num_threads(1)
        times, cpu = [], time.process_time()
        for query in queries["text"][:200]:
            started = time.perf_counter()
            search(query[None], "text")
            times.append(1000 * (time.perf_counter() - started))
        result["CPU"] = 1000 * (time.process_time() - cpu) / len(times)
        return result | {"p50": float(np.median(times)), "p99": float(np.quantile(times, 0.99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--recall_target", type=float, default=0.99)
    parser.add_argument("--pictures", type=Path, help="the package openclipart-png, in place of CLIP-like vectors")
    parser.add_argument("--data", type=Path, help="where to keep the vectors, to use them again")
    parser.add_argument("--same_bytes", type=float, default=80, help="bytes a row of autofaiss-same-bytes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.data, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.data = options.data or Path(scratch)
        if not (options.data / "truth_text.npy").exists():
            if options.pictures:
                make_pictures(options.data, options.pictures)
            else:
                make_vectors(options.data, options.rows, options.dim)
            make_truth(options.data)
        columns = ("build", "peak", "MB", "B/row", "image", "text", "p50", "p99", "CPU", "QPS")
        print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; {TARGETS}")
        print(f"{'':22}" + "".join(f"{name:>9}" for name in columns), flush=True)
        for method in options.methods.split(","):
            flags = [
                "--data",
                options.data,
                "--recall_target",
                options.recall_target,
                "--same_bytes",
                options.same_bytes,
            ]
            command = [sys.executable, __file__, "--one", method, *map(str, flags)]
            done = subprocess.run(command, stdout=subprocess.PIPE)
            if done.returncode:
                print(f"{method:22}    could not build: the reason is above", flush=True)
                continue
            result = json.loads(done.stdout)
            cells = (
                f"{result[name]:9.3f}" if name in ("image", "text") else f"{result[name]:9.1f}" for name in columns
            )
            print(f"{method:22}" + "".join(cells), f" load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
