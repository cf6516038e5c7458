"""ViT-B/32 and ViT-L/14 on one CUDA device: the image tower alone, and `clip-index embed` from tars.

    python benchmarks/gpu.py [--images 16384]

The tower runs as it is and compiled, on bytes that are on the device already, and through the encoder, with the copies
there and back; its rate is set beside what the device multiplies in bfloat16. The command is run on tars of 256-pixel
JPEGs and of 1024x768 ones, with captions, twice each: the rate is the second run's, once running. Without a CUDA device
it says so and ends.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from embed import picture
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from clip_index.clip.config import ARCHITECTURES
from clip_index.clip.model import CLIP
from clip_index.embed_job import cores
from clip_index.encoders.clip import ClipEncoder
from clip_index.encoders.compiled import Compiled
from clip_index.preprocess import Preprocess

TARGETS = {"ViT-B-32": 20_000, "ViT-L-14": 3_000}
"""img/s from tars of 256-pixel JPEGs, on one H200 with 16 cores; of the tower alone, half of the peak."""
BATCH = 1024
TARS = 8


def rate(run: Callable[[], object], amount: float, seconds: float = 3.0) -> float:
    """The amount that a run does, a second, over some seconds of runs."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    runs, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        run()
        torch.cuda.synchronize()
        runs += 1
    return amount * runs / (time.perf_counter() - started)


def matmul_peak(size: int = 8192) -> float:
    """Operations a second of a bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return rate(lambda: a @ b, 2.0 * size**3)


@torch.inference_mode()
def tower_rates(name: str) -> tuple[dict[str, float], float]:
    """(img/s of the image tower as it is, compiled, and compiled with all copies, operations a picture)."""
    model = CLIP(ARCHITECTURES[name]).reset_parameters().eval()
    size, patches = model.visual.input_resolution, model.config.vision.grid**2
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, size, size))
    device = torch.device("cuda")
    told = {"name": name, "fingerprint": "", "precision": "bf16", "towers": ("image",)}
    encoder = ClipEncoder(model, Preprocess(size=size), device=device, **told)
    compiled = encoder._image = Compiled(encoder._image.tower, patches, worth=0)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    there = torch.from_numpy(images).to(device)
    rates = {
        "eager": rate(lambda: compiled.tower(there), BATCH),
        "compiled": rate(lambda: compiled(there), BATCH),
        "copied": rate(lambda: encoder.encode_image(images), BATCH),
    }
    return rates, counter.get_total_flops()


def make_tars(folder: Path, images: int, small: bool) -> str:
    """Tars of pairs, 64 different pictures in turn; the pattern that names them."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(64)]
    if small:
        pictures = [shrink(data) for data in pictures]
    folder.mkdir()
    for n in range(TARS):
        with tarfile.open(folder / f"{n:05d}.tar", "w") as tar:
            for i in range(n * images // TARS, (n + 1) * images // TARS):
                for suffix, data in (("jpg", pictures[i % 64]), ("txt", b"a photo of a red car")):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{00000..{TARS - 1:05d}}}.tar"


def shrink(data: bytes) -> bytes:
    """A JPEG of 341x256."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((341, 256)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def embed_rate(tars: str, weights: Path, name: str, output: Path) -> float:
    """img/s of the command, once running; the first run fills the caches of the disk and of the compiler."""
    command = [sys.executable, "-m", "clip_index", "embed", tars, "--model", f"{name}-gelu/{weights}"]
    options = ["--devices", "cuda:0", "--modality", "image", "--json"]
    for turn in ("first", "second"):
        told = subprocess.run([*command, f"{output}-{turn}", *options], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(told)["samples_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16_384)
    images = parser.parse_args().images
    if not torch.cuda.is_available():
        print("no CUDA device here: not measured")
        return
    peak = matmul_peak()
    print(f"{torch.cuda.get_device_name()}, {cores()} cores; matmul peak bf16 {peak / 1e12:.0f} TFLOP/s")
    print(
        f"{'img/s':10}{'eager':>9}{'compiled':>10}{'of peak':>9}{'copied':>9}{'256 px':>9}{'target':>9}{'1024x768':>10}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kinds = {
            "256 px": make_tars(folder / "small", images, True),
            "1024x768": make_tars(folder / "large", images, False),
        }
        for name, target in TARGETS.items():
            towers, operations = tower_rates(name)
            torch.cuda.empty_cache()
            weights = folder / f"{name}.pt"
            torch.save(dict(CLIP(ARCHITECTURES[name]).reset_parameters().state_dict()), weights)
            rates = {kind: embed_rate(tars, weights, name, folder / f"{name} {kind}") for kind, tars in kinds.items()}
            print(
                f"{name:10}{towers['eager']:10.0f}{towers['compiled']:10.0f}"
                f"{towers['compiled'] * operations / peak:10.0%}{towers['copied']:10.0f}"
                f"{rates['256 px']:10.0f}{target:10}{rates['1024x768']:10.0f}"
            )


if __name__ == "__main__":
    main()
