"""What `build-index --plan` says beside the build that it is about: seconds by step, bytes in memory and on disk.

    python benchmarks/plan.py                      # 1M x 512 CLIP-like vectors; needs 4 GB of disk and some minutes
    python benchmarks/plan.py --data vectors/      # those that benchmarks/index.py --data keeps

The last column is the plan's figure over the build's; on a machine that does nothing else the totals are within 0.8
and 1.2. `rest` of a build are its checks, its metadata and its checksums.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from index import make_truth, make_vectors, open_vectors

from clip_index.index import build_index, parse_memory
from clip_index.plan import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--memory", default="4G")
    parser.add_argument("--data", type=Path, help="where to keep the vectors, to use them again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or Path(scratch)
        if not (data / "truth_text.npy").exists():
            make_vectors(data, options.rows, options.dim)
            make_truth(data)
        vectors = open_vectors(data)
        print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", flush=True)
        planned = plan(vectors.rows, vectors.dim, parse_memory(options.memory))
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=data) as index:
            report = build_index(str(data), index, modality="image", memory=options.memory)
            whole = time.perf_counter() - started
        part = report["indices"]["image"]
        rest = whole - sum(part["seconds"].values())
        print(f"{vectors.rows} x {vectors.dim}, {planned['family']}, {planned['parts']} part(s)")
        print(f"{'':20}{'plan':>10}{'build':>10}{'ratio':>8}")
        for step, seconds in {**part["seconds"], "rest": rest}.items():
            show(step, planned["seconds"]["commit" if step == "rest" else step], seconds, "s")
        show("all steps", planned["seconds_per_part"], whole, "s")
        show("in memory", planned["memory_bytes_per_part"] / 1e6, part["memory_bytes"] / 1e6, "MB")
        show("on disk", planned["disk_bytes_per_part"] / 1e6, part["bytes"] / 1e6, "MB")
        for step, peak in part["peak_memory_bytes"].items():
            print(f"peak of {step:25}{peak / 1e6:7.1f} MB")
        show("peak", planned["build_bytes_per_part"] / 1e6, max(part["peak_memory_bytes"].values()) / 1e6, "MB")
        print(f"load {os.getloadavg()[0]:.1f}")


def show(name: str, said: float, found: float, unit: str) -> None:
    print(f"{name:20}{said:10.1f}{found:10.1f}{said / found:8.2f}  {unit}", flush=True)


if __name__ == "__main__":
    main()
