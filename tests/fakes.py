"""A small deterministic encoder that needs no weights, and the folders that tests embed with it.

As a script, `python tests/fakes.py SOURCE OUTPUT [SECONDS]` embeds with it, pausing at each batch: a process to kill.
"""

from __future__ import annotations

import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import clip_index.embed as embed
from clip_index import embed_job
from clip_index.preprocess import Preprocess
from clip_index.types import normalize


class FakeEncoder:
    """Pictures become the means of their 4x4 cells, texts a bag of hashed words."""

    def __init__(self, fingerprint: str = "fake-1", precision: str = "fp32", size: int = 32, pause: float = 0.0):
        self.name, self.fingerprint, self.precision, self.dim = "fake", fingerprint, precision, 48
        self.preprocess = Preprocess(size=size)
        self.pause = pause

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        time.sleep(self.pause)
        n, size = len(images), images.shape[1]
        cells = images.reshape(n, 4, size // 4, 4, size // 4, 3).astype(np.float32).mean(axis=(2, 4))
        return normalize(cells.reshape(n, 48) - 100.0)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), 48), np.float32)
        for row, text in enumerate(texts):
            for word in ["", *text.split()]:
                vectors[row, zlib.crc32(word.encode()) % 48] += 1
        return normalize(vectors)


def use(monkeypatch, **options) -> None:
    """Have `embed` load the fake whatever the name."""
    monkeypatch.setattr(embed_job, "worker_encoder", lambda *_: FakeEncoder(**options))


def make_pictures(folder: Path, n: int, *, captions: bool = True, suffix: str = "png") -> Path:
    """A folder of n small pictures, each with another colour and size."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for i in range(n):
        pixels = rng.integers(0, 256, (20 + i % 7, 30 + i % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.{suffix}")
        if captions:
            (folder / f"{i:04d}.txt").write_text(f"picture number {i}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    embed_job.worker_encoder = lambda *_: FakeEncoder(pause=pause)
    embed.embed(sys.argv[1], sys.argv[2], batch_size=4, rows_per_shard=8)
