"""What joins the two towers of `mini`, computed in closed form; `make_mini.py` calls it.

1. Each ImageNet class gets a vector in the text space: the mean of what its first name, its synonyms and its
   definition say. Pictures are averages of these vectors (ConSE), which serves photographs.
2. A ridge regression from image features to the vectors of emoji names adds what the classes miss, drawings above all.
   Emoji of two vendors train it; `make_sample.py`'s clip art and all photographs are unseen.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_index.encoders.mini import power_normalize
from clip_index.preprocess import Preprocess

EMOJI = {
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
SKIPPED = ("Flags", "Component")
"""Emoji whose names say nothing of what they look like."""
RIDGE = 1e-3
"""The penalty, as a share of the number of pictures."""
WEIGHT = 2.5
"""Of the regression beside the class vectors. The three were chosen on stamps and clip art outside the sample."""

Embed = Callable[[list[str]], Tensor]
Look = Callable[[np.ndarray], Tensor]


def fetch_emoji(folder: Path) -> None:
    """Download and unpack the emoji packages with npm. Raises SystemExit where one is not what it was."""
    for package, sha256 in EMOJI.items():
        command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
        name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            raise SystemExit(f"{name} is not the file that the model was made from")
        vendor = package.split("@")[0].rsplit("-", 1)[1]
        with tarfile.open(folder / name) as archive:
            wanted = ("package/emoji.json", f"package/img/{vendor}/64/")
            archive.extractall(folder, [member for member in archive if member.name.startswith(wanted)])


def emoji(folder: Path) -> list[tuple[Path, tuple[str, str]]]:
    """(picture, its two names) of every unpacked emoji."""
    found = []
    for vendor in sorted((folder / "package" / "img").iterdir()):
        for entry in json.loads((folder / "package" / "emoji.json").read_text()):
            path = vendor / "64" / entry["image"]
            if entry["category"] not in SKIPPED and path.exists():
                found.append((path, (entry["name"].lower(), entry["short_name"].replace("_", " ").replace("-", " "))))
    return found


def class_vectors(info: Path, embed: Embed) -> Tensor:
    """Unit vectors [1000, 384] of the ImageNet classes, from the lists of synsets, lemmas and definitions."""
    lemmas, definitions = (
        dict(line.split("\t") for line in (info / f"imagenet_synset_to_{part}.txt").read_text().splitlines())
        for part in ("lemma", "definition")
    )
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    names = [lemmas[synset].split(", ") for synset in synsets]
    first = embed([synonyms[0] for synonyms in names])
    defined = embed([f"{name[0]}: {definitions[synset]}" for name, synset in zip(names, synsets, strict=True)])
    pictured = torch.stack([embed([f"a photo of a {synonym}" for synonym in synonyms]).mean(0) for synonyms in names])
    return F.normalize(first + defined + F.normalize(pictured))


def fit_ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(weight [out, in], bias [out]) of y - mean(y) from x, least squares with a penalty of `penalty` a row of x.

    The mean of y is left out: it is what all pictures share, and would only blur their differences.
    """
    x, y = x.double(), y.double()
    centred = x - x.mean(0)
    gram = centred.T @ centred + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0))).T
    return weight.float(), (-weight @ x.mean(0)).float()


def fit_join(info: Path, pictures: Path, embed: Embed, look: Look) -> dict[str, Tensor]:
    """The tensors of `join.safetensors` except the classifier; `embed` and `look` are the towers."""
    rows = emoji(pictures)
    read = Preprocess(size=224, resize_mode="squash")
    features = torch.cat(
        [look(np.stack([read(path.read_bytes())[0] for path, _ in rows[i : i + 32]])) for i in range(0, len(rows), 32)]
    )
    meanings = F.normalize(sum(embed([names[which] for _, names in rows]) for which in (0, 1)))
    weight, bias = fit_ridge(power_normalize(features), meanings, RIDGE)
    return {"classes": class_vectors(info, embed), "head.weight": WEIGHT * weight, "head.bias": WEIGHT * bias}
