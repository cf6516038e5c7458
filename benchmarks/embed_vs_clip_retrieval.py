"""The main job beside its peer: `clip-index embed` and `clip-retrieval inference`, one after the other.

    python benchmarks/embed_vs_clip_retrieval.py [--pairs 512] [--peer FOLDER]

Both get the same ViT-B/32 with random weights and the same four tars of 1024x768 JPEGs with short captions, and run
with their defaults, each in a process of its own. The peer gets its own environment, made in a temporary folder, or
kept in the folder that --peer names. Prints pairs/s from process start to end, CPU seconds, the memory of the largest
process, the ratio, and the cosine between both outputs, row by row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from embed import make_tar

PEER = [
    "clip-retrieval==2.45.0",
    "clip-anytorch==2.6.0",
    "all_clip==1.3.0",
    "open_clip_torch==2.32.0",
    "sentence-transformers==2.7.0",
    "transformers==4.57.6",
    "webdataset==0.2.111",
    "numpy==1.26.4",
    "torch==2.13.0",
    "torchvision==0.28.0",
    # clip-anytorch imports pkg_resources, which left setuptools in 82
    "setuptools>=77,<81",
]
# torchvision's wheel is linked against CUDA: beside a CPU build of torch its operators do not load, and registering
# their fake versions fails. The peer does not need them.
SITE = """
import torch
register_fake = torch.library.register_fake
def skip_torchvision(name, *args, **kwargs):
    if str(name).startswith("torchvision::"):
        return lambda function: function
    return register_fake(name, *args, **kwargs)
torch.library.register_fake = skip_torchvision
import torchvision
torch.library.register_fake = register_fake
"""
TARS = 4
TARGETS = {"pairs/s": 5.0, "cosine": 0.999}


def make_peer(folder: Path) -> Path:
    """The program of the peer, installed into a folder unless it is there."""
    program = folder / "bin" / "clip-retrieval"
    if not program.exists():
        print(f"installing {PEER[0]} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PEER], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "sitecustomize.py").write_text(SITE)
    return program


def make_weights(path: Path) -> None:
    """A state dict of ViT-B/32 that both load."""
    import torch

    from clip_index.clip.config import ARCHITECTURES
    from clip_index.clip.model import CLIP

    torch.manual_seed(0)
    torch.save(dict(CLIP(ARCHITECTURES["ViT-B-32"]).reset_parameters().state_dict()), path)


def make_tars(folder: Path, pairs: int) -> None:
    """The tar of `benchmarks/embed.py`, dealt out to `TARS` tars."""
    make_tar(folder / "all.tar", pairs)
    with contextlib.ExitStack() as opened:
        whole = opened.enter_context(tarfile.open(folder / "all.tar"))
        parts = [opened.enter_context(tarfile.open(folder / f"{n:05d}.tar", "w")) for n in range(TARS)]
        for member in whole:
            parts[int(member.name.partition(".")[0]) * TARS // pairs].addfile(member, whole.extractfile(member))
    (folder / "all.tar").unlink()


def measure(command: list[str | Path], pairs: int, folder: Path) -> dict[str, float]:
    """One run of a command, from process start to end."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "WANDB_MODE": "disabled"}
    with open(folder / "log", "w+") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if status:
            log.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{log.read()[-2000:]}")
    return {
        "pairs/s": pairs / seconds,
        "seconds": seconds,
        "CPU seconds": usage.ru_utime + usage.ru_stime,
        "peak MB": usage.ru_maxrss / 1024,
    }


def read_rows(folder: Path, kind: str, key: str) -> dict[str, np.ndarray]:
    """The vectors of an output folder by the names of their samples."""
    rows = {}
    for path in sorted((folder / f"{kind}_emb").glob("*.npy")):
        table = folder / "metadata" / path.name.replace(f"{kind}_emb", "metadata").replace(".npy", ".parquet")
        names = pq.read_table(table, columns=[key])[key].to_pylist()
        rows |= dict(zip(names, np.load(path).astype(np.float32), strict=True))
    return rows


def compare(ours: Path, theirs: Path, kind: str, pairs: int) -> tuple[float, float, float]:
    """(mean, least cosine between both outputs, mean cosine between one picture or caption and the next)."""
    a, b = read_rows(ours, kind, "key"), read_rows(theirs, kind, "image_path")
    names = sorted(b)
    if len(names) != pairs or sorted(name.rpartition("/")[2] for name in a) != names:
        raise SystemExit(f"the outputs hold other samples: {len(a)} and {len(b)} of {pairs}")
    by_name = {name.rpartition("/")[2]: vector for name, vector in a.items()}
    x, y = (np.stack([side[name] for name in names]) for side in (by_name, b))
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    cosines = (x * y).sum(axis=1)
    return float(cosines.mean()), float(cosines.min()), float((x[1:] * y[:-1]).sum(axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--peer", type=Path, help="where the peer's environment is, or is to be kept")
    arguments = parser.parse_args()
    pairs = arguments.pairs
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = make_peer((arguments.peer or folder / "peer").absolute())
        weights = folder / "vit-b-32.pt"
        make_weights(weights)
        make_tars(folder, pairs)
        tars = f"{folder}/{{00000..{TARS - 1:05d}}}.tar"
        ours = [sys.executable, "-m", "clip_index", "embed", tars, folder / "ours"]
        theirs = [program, "inference", "--input_dataset", tars, "--output_folder", folder / "theirs"]
        runs = {
            "clip-index": measure([*ours, "--model", f"ViT-B-32-gelu/{weights}"], pairs, folder),
            "clip-retrieval": measure(
                [*theirs, "--input_format", "webdataset", "--clip_model", f"open_clip:ViT-B-32/{weights}"],
                pairs,
                folder,
            ),
        }
        cosines = {kind: compare(folder / "ours", folder / "theirs", kind, pairs) for kind in ("img", "text")}
        precision = json.loads((folder / "ours" / "manifest.json").read_text())["precision"]
    names = list(runs["clip-index"])
    print(f"{'':16}" + "".join(f"{name:>14}" for name in names))
    for run, figures in runs.items():
        print(f"{run:16}" + "".join(f"{figures[name]:14.1f}" for name in names))
    print(f"{'ratio':16}" + "".join(f"{runs['clip-index'][n] / runs['clip-retrieval'][n]:14.2f}" for n in names))
    print(f"{'target':16}" + "".join(f"{TARGETS.get(name, ''):>14}" for name in names))
    print(f"\ncosine, {precision} to the peer's{'mean':>17}{'least':>14}{'target':>14}   to the next sample's")
    for kind, (mean, least, other) in cosines.items():
        print(f"{kind:32}{mean:14.5f}{least:14.5f}{TARGETS['cosine']:14}{other:23.3f}")


if __name__ == "__main__":
    main()
