"""Peak memory of `clip-index embed` against the size of its input: `python benchmarks/scale.py memory`.

The input is tars with captions whose pictures have comment segments that make them as large as wanted, which decoders
skip and the pipeline does not: every byte is read, held and handed over. The smaller tars are hard links to one; the
last is a single tar as large as half of the input. Embedded are an eighth of it, a half in small tars, a half in one
tar, and all; with 1 and 2 worker processes; once of

- pictures of 10 MB, by the command as it is, with `mini`;
- pictures of 100 to 300 KB, a hundred thousand of them, by the same command with an encoder that takes no time, as
  this file defines it (`python benchmarks/memory.py embed ...`): with `mini` it would be hours.

What is counted are pages of the command and all its children together that are not pages of files.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from clip_index import embed_job
from clip_index.preprocess import Preprocess
from clip_index.types import normalize

_SEGMENT = 65_000
_WATCHED_EVERY_S = 0.1
_DEVICES = ("cpu", "cpu*2")


class Means:
    """An encoder that takes no time: the mean colour of each sixteenth, the lengths of texts."""

    name, fingerprint, precision, dim = "means", "means-1", "fp32", 48
    preprocess = Preprocess()

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, 224, 224, 3] to float32 [n, 48]."""
        return normalize(images.reshape(-1, 4, 56, 4, 56, 3).mean(axis=(2, 4)).reshape(-1, 48) + 1)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """n texts to float32 [n, 48]."""
        return normalize(np.array([[len(text) + 1.0] * 48 for text in texts]))


def jpeg(pixels: np.ndarray, length: int) -> bytes:
    """A JPEG of at least so many bytes, most of them comments."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    comment = b"\xff\xfe" + (_SEGMENT + 2).to_bytes(2, "big") + bytes(_SEGMENT)
    return data[:2] + comment * max(0, -(-(length - len(data)) // len(comment))) + data[2:]


def make_tar(path: Path, size: int, lengths: tuple[int, int], seed: int) -> int:
    """A tar of about `size` bytes of captioned pictures of lengths in a range; the number of pairs."""
    rng = random.Random(seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pictures = [jpeg(pixels, rng.randint(*lengths)) for _ in range(16)]
    pairs = 0
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        while file.tell() < size:
            for suffix, data in (("jpg", rng.choice(pictures)), ("txt", b"a picture of noise, number %d" % pairs)):
                member = tarfile.TarInfo(f"{pairs:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            pairs += 1
    return pairs


def make_inputs(folder: Path, size: int, lengths: tuple[int, int]) -> dict[str, tuple[Path, int]]:
    """{what it is: (folder of tars, pairs)} of `size` bytes in all."""
    pairs = make_tar(folder / "small", size // 32, lengths, 0)
    whole = make_tar(folder / "large", size // 2, lengths, 1)
    inputs = {
        "1/8, in 4 tars": (4, 0),  # two workers with two tasks each, which is all that run at once
        "1/2, in 16 tars": (16, 0),
        "1/2, in 1 tar": (0, 1),
        "all, in 17 tars": (16, 1),
    }
    for number, (name, (links, large)) in enumerate(inputs.items()):
        place = folder / f"in{number}"
        place.mkdir()
        for link in range(links):
            os.link(folder / "small", place / f"{link:05d}.tar")
        if large:
            os.link(folder / "large", place / "99999.tar")
        inputs[name] = place, links * pairs + large * whole
    return inputs


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for process in found:
        for listing in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, listing.read_text().split())
            except OSError:
                continue  # a thread that has ended
    return found


def own_bytes(pid: int) -> int:
    """Bytes of a process that are not pages of files."""
    try:
        _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU that a process and all below it that still run have taken."""
    ticks = 0
    for process in family(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def watched(command: list[str]) -> tuple[dict, int]:
    """(what the command says, the most memory that it and its children held at once)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peaks, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(_WATCHED_EVERY_S):
            peaks.append(max(peaks.pop(), sum(map(own_bytes, family(process.pid)))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    told, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return json.loads(told), peaks[0]


def memory(folder: Path, gigabytes: float) -> None:
    """Print a line a run."""
    kinds = {
        "10 MB, mini": ((10_000_000, 10_000_000), "-m clip_index"),
        "0.2 MB, no model": ((100_000, 300_000), __file__),
    }
    for kind, (lengths, program) in kinds.items():
        place = folder / program.split()[-1].rpartition("/")[2]
        place.mkdir()
        inputs = make_inputs(place, int(gigabytes * 1e9), lengths)
        for devices in _DEVICES:
            for number, (name, (source, pairs)) in enumerate(inputs.items()):
                output = place / f"out-{number}-{devices}"
                started = time.perf_counter()
                command = [sys.executable, *program.split(), "embed", str(source), str(output), "--devices", devices]
                told, peak = watched([*command, "--json"])
                assert told["rows"] == pairs, told
                seconds = time.perf_counter() - started
                size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
                print(
                    f"memory   pictures of {kind:16} {devices:5} {size:5.1f} GB, {name}: {pairs:7,} pairs, "
                    f"{peak / 1e6:5.0f} MB, {seconds:4.0f} s",
                    flush=True,
                )
        for path in place.glob("**/*"):  # room for the next
            if path.is_file():
                path.unlink()


if __name__ in ("__main__", "__mp_main__"):
    # workers are spawned, and import this file as their main module
    embed_job.worker_encoder = lambda *_: Means()

if __name__ == "__main__":
    from clip_index.cli import main

    sys.exit(main(sys.argv[1:]))
