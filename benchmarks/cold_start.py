"""How long a person waits: `clip-index --help` and a query, each in a new process, beside `import torch` alone.

    python benchmarks/cold_start.py [--runs 7]

Embeds and indexes the sample first. Prints the median, least and largest wall seconds of each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

SAMPLE = Path(str(files("clip_index"))) / "data" / "sample"
TARGETS = {"--help": 0.3, "query by words": 2.0}


def seconds(command: list[str]) -> float:
    """Wall seconds of one process."""
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    clip_index = [sys.executable, "-m", "clip_index"]
    with tempfile.TemporaryDirectory() as folder:
        embeddings, index = f"{folder}/embeddings", f"{folder}/index"
        seconds([*clip_index, "embed", str(SAMPLE), embeddings])
        seconds([*clip_index, "build-index", embeddings, index])
        picture = next(path for path in sorted(SAMPLE.rglob("*")) if path.suffix in (".png", ".jpg"))
        commands = {
            "--help": [*clip_index, "--help"],
            "query by words": [*clip_index, "query", "a dog", "--index", index],
            "query by picture": [*clip_index, "query", "--image", str(picture), "--index", index],
            "import torch": [sys.executable, "-c", "import torch"],
        }
        print(f"{'':18}{'median':>8}{'least':>8}{'most':>8}{'target':>8}")
        for name, command in commands.items():
            measured = [seconds(command) for _ in range(runs + 1)][1:]
            figures = [statistics.median(measured), min(measured), max(measured)]
            target = f"{TARGETS[name]:8.1f}" if name in TARGETS else ""
            print(f"{name:18}" + "".join(f"{value:8.2f}" for value in figures) + target)


if __name__ == "__main__":
    main()
