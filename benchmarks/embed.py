"""The main job's speed: `clip-index embed` with `mini` on 1,024 JPEGs of 1024x768 with captions, in one tar.

    python benchmarks/embed.py [--pairs 1024] [--runs 3] [--decode fast]

Prints, for each run and as a median, the rate once running, the seconds from process start to its end, and the peak
memory of the process. The pictures are made here: random photographs-like textures, about 150 KB each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 1024, 768
TARGETS = {"pairs/s": 110, "seconds": 14, "peak MB": 1500}


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG with the smooth areas, edges and grain that make decoding cost what it costs for photographs."""
    layers = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, strength in ((4, 90), (16, 40), (128, 16)):
        small = rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        layers += (np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) - 127.5) * (
            strength / 128
        )
    layers += rng.normal(0, 4, layers.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(layers + 127.5, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_tar(path: Path, pairs: int) -> None:
    """A tar as img2dataset writes it; 64 different pictures, in turn."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(min(64, pairs))]
    words = "a photo of red small old dog car house tree on the beach near two people at night".split()
    with tarfile.open(path, "w") as tar:
        for i in range(pairs):
            caption = " ".join(rng.choice(words, 8)).encode()
            for suffix, data in (("jpg", pictures[i % len(pictures)]), ("txt", caption)):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    print(f"{pairs} pairs, {path.stat().st_size / pairs / 1024:.0f} KB each, {os.cpu_count()} cores")


def measure(tar: Path, output: Path, decode: str) -> dict[str, float]:
    """One run of the command, from process start."""
    started = time.monotonic()
    command = [sys.executable, "-m", "clip_index", "embed", str(tar), str(output), "--decode", decode, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    summary = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"embed ended with status {status}")
    return {
        "pairs/s": summary["samples_per_s"],
        "seconds": time.monotonic() - started,
        "peak MB": usage.ru_maxrss / 1024,
        "CPU seconds": usage.ru_utime + usage.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--decode", choices=["exact", "fast"], default="exact")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "00000.tar")
        make_tar(tar, arguments.pairs)
        runs = [measure(tar, Path(folder, f"run{i}"), arguments.decode) for i in range(arguments.runs)]
    print(f"{'':12}" + "".join(f"{name:>14}" for name in runs[0]))
    for i, run in enumerate(runs, 1):
        print(f"{f'run {i}':12}" + "".join(f"{value:14.1f}" for value in run.values()))
    print(f"{'median':12}" + "".join(f"{statistics.median(run[name] for run in runs):14.1f}" for name in runs[0]))
    print(f"{'target':12}" + "".join(f"{TARGETS.get(name, ''):>14}" for name in runs[0]))


if __name__ == "__main__":
    main()
