"""The model that ships with the package: `mini`, two published towers joined in MiniLM's space.

1. A caption's vector is MiniLM's own (all-MiniLM-L6-v2, 384 numbers).
2. A picture's vector has two parts. EfficientNet-Lite0 says which ImageNet classes it sees, and the likeliest classes'
   vectors are averaged with their probabilities as weights (ConSE: Norouzi et al., "Zero-Shot Learning by Convex
   Combination of Semantic Embeddings", 2014). A linear head adds what the classes do not say; it was fitted on emoji.

The weights lie in `clip_index/data/mini`, one file a tower and `join.safetensors` for the second step.

What narrow numbers cost, mean cosine to the published weights in float32: text 0.9998 (int8 weights, in fp32 and bf16),
pictures 0.99999 (fp16 weights) and 0.9999 (in bf16); recall moves by less than 0.01. Text-to-image recall, one query a
caption, on pictures that nothing was fitted on, and in brackets without the head and with pictures cropped:

    403 photographs of things (Tux Paint stamps)   R@1 0.25 (0.22)   R@10 0.52 (0.43)
    312 pictures of the sample, mostly drawings    R@1 0.34 (0.24)   R@10 0.72 (0.54)
    1,599 emoji of a vendor not trained on         R@1 0.11 (0.03)   R@10 0.35 (0.07)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from clip_index.encoders.mini_towers import ImageTower, SlicedLinear, TextTower, Weights
from clip_index.encoders.runtime import DTYPES, resolve_device, resolve_precision
from clip_index.preprocess import Preprocess
from clip_index.types import normalize

ASSET = Path(__file__).parent.parent / "data" / "mini"


class Join:
    """Pooled image features [n, 1280] to vectors in the text space [n, 384], in float32."""

    def __init__(self, weights: Weights, *, top_k: int, temperature: float, device: torch.device):
        like = torch.empty(0, device=device)
        self.classifier = SlicedLinear(weights["classifier.weight"], weights["classifier.bias"], like=like)
        self.head = SlicedLinear(weights["head.weight"], weights["head.bias"], like=like)
        self.classes = weights["classes"].to(like)
        self.top_k, self.temperature = top_k, temperature

    def __call__(self, features: Tensor) -> Tensor:
        logits, classes = self.classifier(features).topk(self.top_k)
        named = ((logits / self.temperature).softmax(-1)[..., None] * self.classes[classes]).sum(1)
        return F.normalize(named) + self.head(power_normalize(features))


def power_normalize(features: Tensor) -> Tensor:
    """Unit rows of the square roots: no single feature, of those that are never negative, outweighs the others."""
    return F.normalize(features.sqrt())


class Mini:
    """An `Encoder`; a tower that was not loaded raises AttributeError when used."""

    name = "mini"

    def __init__(self, folder: Path, *, device: torch.device, precision: str, towers: tuple[str, ...]):
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.fingerprint: str = config["fingerprint"]
        self.dim: int = config["dim"]
        self.precision = precision
        self.preprocess = Preprocess(**config["preprocess"])
        where = {"device": device, "dtype": DTYPES[precision]}
        if "image" in towers:
            self._image = ImageTower(load_file(folder / "image.safetensors"), **where)
            self._join = Join(load_file(folder / "join.safetensors"), **config["join"], device=device)
        if "text" in towers:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._text = TextTower(load_file(folder / "text.safetensors"), heads=config["text_heads"], **where)

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, 224, 224, 3] to float32 [n, 384], unit rows."""
        with torch.inference_mode():
            return normalize(self._join(self._image(images)).cpu().numpy())

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """n texts, cut at 256 tokens, to float32 [n, 384], unit rows."""
        # one at a time: a batch would start the tokenizer's own threads beside torch's
        ids = [self._tokenizer.encode(text).ids for text in texts]
        with torch.inference_mode():
            return normalize(self._text(ids).cpu().numpy())


def load(name: str, *, device: str, precision: str, towers: tuple[str, ...]) -> Mini:
    """The encoder `mini`, or the towers of it that are asked for."""
    where = resolve_device(device)
    return Mini(ASSET, device=where, precision=resolve_precision(precision, where), towers=towers)
