"""The encoders of ViT-B/32 beside open_clip in eager mode and beside what the machine multiplies at all.

    python benchmarks/encoders.py [--rounds 5] [--items 32]

One process, the same random weights for all; every candidate runs once a round, and the best round counts. open_clip
has all threads of torch for one batch, as it runs by itself; ours has a thread a core, a batch each, as `clip-index
embed` runs it. open_clip's time has no preprocessing and no tokens in it; ours begins with bytes and with texts. int8
is `--precision int8`, and beside it what `clip-index export` writes, through onnxruntime, and through OpenVINO where
that is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import peers

from clip_index.clip.int8 import can_int8
from clip_index.embed_job import cores
from clip_index.encoders import load_encoder
from clip_index.export import export
from clip_index.types import Encoder, normalize

LENGTHS = (4, 12, 30, 77)
"""Tokens of the captions, start and end among them."""
IMAGE_TARGETS = {"bf16": "90% of peak", "int8": "1.5 x bf16, cosine 0.99"}
TEXT_TARGET = 8
Candidates = dict[str, Callable[[], object]]


def peak(dtype: torch.dtype, size: int = 2048) -> Callable[[], float]:
    """A matrix product; its result is the number of operations."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)

    def multiply() -> float:
        torch.mm(a, b, out=out)
        return 2.0 * size**3

    return multiply


def best_seconds(candidates: Candidates, rounds: int) -> dict[str, float]:
    """The least time of each, with all of them in turn in every round, after one that does not count."""
    least = dict.fromkeys(candidates, float("inf"))
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if turn:
                least[name] = min(least[name], time.perf_counter() - started)
    return least


def dealt(pool: ThreadPoolExecutor, encode: Callable, inputs: np.ndarray | list[str]) -> Callable[[], np.ndarray]:
    """Encode inputs with a batch for each thread of the pool."""
    size = -(-len(inputs) // cores())
    batches = [inputs[n : n + size] for n in range(0, len(inputs), size)]
    return lambda: np.concatenate(list(pool.map(encode, batches)))


def export_int8(checkpoint: str, folder: str) -> dict[str, Encoder]:
    """The exported model, through every runtime that is installed."""
    with contextlib.redirect_stderr(io.StringIO()):
        export(checkpoint, folder, precision="int8")
    runtimes = {"onnx": "onnxruntime", "openvino": "openvino"}
    installed = [prefix for prefix, library in runtimes.items() if importlib.util.find_spec(library)]
    return {f"int8 {prefix}": load_encoder(f"{prefix}:{folder}", device="cpu", threads=1) for prefix in installed}


def load(model: torch.nn.Module) -> dict[str, Encoder]:
    """Ours, by precision, with the weights of a model of open_clip."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/weights.pt")
        checkpoint = f"ViT-B-32-gelu/{folder}/weights.pt"
        encoders = {
            precision: load_encoder(checkpoint, device="cpu", precision=precision, threads=1)
            for precision in ("fp32", "bf16", *(["int8"] if can_int8() else []))
        }
        return encoders | export_int8(checkpoint, f"{folder}/int8")


def report_peaks(rounds: int) -> dict[str, float]:
    """Print and return the operations a second of a matrix product, by precision."""
    products = {"fp32": peak(torch.float32), "bf16": peak(torch.bfloat16)}
    seconds = best_seconds(products, 4 * rounds)
    peaks = {name: products[name]() / seconds[name] for name in products}
    print(
        f"{cores()} cores; matmul peak " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items())
    )
    return peaks


def report_images(theirs: Candidates, ours: Candidates, peaks: dict[str, float], operations: int, rounds: int) -> None:
    """Print img/s, the fraction of the peak of 16 bits for 8 too, and cosines to open_clip in float32."""
    exact = normalize(theirs["open_clip fp32"]())
    items = len(exact)
    rates = {name: items / seconds for name, seconds in best_seconds(theirs | ours, rounds).items()}
    print(f"\nimage tower, {operations / 1e9:.1f} GFLOP a picture")
    print(f"{'':18}{'img/s':>9}{'of peak':>9}{'to open_clip fp32':>19}{'to bf16':>9}{'cosine':>9}  target")
    for name, run in (theirs | ours).items():
        base = peaks["fp32" if "fp32" in name else "bf16"]
        mean = float((normalize(run()) * exact).sum(axis=1).mean())
        print(
            f"{name:18}{rates[name]:9.1f}{rates[name] * operations / base:9.0%}"
            f"{rates[name] / rates['open_clip fp32']:19.2f}{rates[name] / rates['bf16']:9.2f}{mean:9.5f}"
            f"  {IMAGE_TARGETS.get(name.split()[0], '')}"
        )


def report_texts(theirs: dict[int, Candidates], ours: dict[int, Candidates], items: int, rounds: int) -> None:
    """Print texts/s by length and the ratio of our bfloat16 to open_clip in both precisions."""
    names = [*next(iter(theirs.values())), *next(iter(ours.values()))]
    print("\ntext tower, texts/s")
    print(f"{'tokens':8}" + "".join(f"{name:>16}" for name in names) + f"{'bf16 to fp32':>14}{'to bf16':>9}  target")
    for length in LENGTHS:
        seconds = best_seconds(theirs[length] | ours[length], rounds)
        ratios = [seconds[f"open_clip {precision}"] / seconds["bf16"] for precision in ("fp32", "bf16")]
        target = f"{TEXT_TARGET:g} x open_clip" if length <= 12 else ""
        print(
            f"{length:<8}"
            + "".join(f"{items / seconds[name]:16.1f}" for name in names)
            + f"{ratios[0]:14.1f}{ratios[1]:9.1f}  {target}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=32, help="pictures, and texts, a round")
    arguments = parser.parse_args()
    rounds, items = arguments.rounds, arguments.items
    torch.manual_seed(0)
    library = peers.open_clip()
    model, half = (library.create_model("ViT-B-32").eval().requires_grad_(False) for _ in range(2))
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    encoders = load(model)
    preprocess = encoders["fp32"].preprocess
    mean, std = (torch.tensor(values) for values in (preprocess.mean, preprocess.std))
    pixels = np.random.default_rng(0).integers(0, 256, (items, 224, 224, 3), dtype=np.uint8)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    eager = {"open_clip fp32": (model, images), "open_clip bf16": (half, images.bfloat16())}
    with torch.inference_mode(), ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(time.sleep, [0.1] * cores()):
            pass  # all of its threads have begun, each with one thread of torch
        torch.set_num_threads(cores())
        peaks = report_peaks(rounds)
        torch.backends.mha.set_fastpath_enabled(False)  # its operations are not counted
        with FlopCounterMode(display=False) as counter:
            model.encode_image(images[:1])
        torch.backends.mha.set_fastpath_enabled(True)
        report_images(
            {name: lambda m=m, x=x: m.encode_image(x).float().numpy() for name, (m, x) in eager.items()},
            {name: dealt(pool, encoder.encode_image, pixels) for name, encoder in encoders.items()},
            peaks,
            counter.get_total_flops(),
            rounds,
        )
        captions = {length: [" ".join(["dog"] * (length - 2))] * items for length in LENGTHS}
        tokens = {length: library.get_tokenizer("ViT-B-32")(texts) for length, texts in captions.items()}
        report_texts(
            {n: {name: lambda m=m, n=n: m.encode_text(tokens[n]) for name, (m, _) in eager.items()} for n in LENGTHS},
            {n: {name: dealt(pool, e.encode_text, captions[n]) for name, e in encoders.items()} for n in LENGTHS},
            items,
            rounds,
        )


if __name__ == "__main__":
    main()
