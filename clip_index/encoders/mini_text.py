"""`mini` for a few texts, in numpy: importing torch takes longer than all the rest of a query.

1. `load` decides: a process that has torch loaded, or asks for more than the text tower, gets the model of `mini.py`.
2. `NumpyTextTower` computes what `mini_towers.TextTower` computes in float32; a test holds the two together.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

from clip_index.preprocess import Preprocess
from clip_index.types import Encoder, normalize

ASSET = Path(__file__).parent.parent / "data" / "mini"
_FEW = 16
"""More texts than this at a time are worth torch."""

Weights = dict[str, np.ndarray]


def load(name: str, *, device: str, precision: str, towers: tuple[str, ...]) -> Encoder:
    """The encoder `mini`, or the towers of it that are asked for."""
    if towers == ("text",) and device in ("auto", "cpu") and precision == "auto" and "torch" not in sys.modules:
        return MiniText(ASSET)
    from clip_index.encoders import mini

    return mini.load(name, device=device, precision=precision, towers=towers)


class MiniText:
    """An `Encoder` of texts alone, in float32 on the CPU."""

    name = "mini"
    precision = "fp32"

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        config = json.loads((folder / "config.json").read_text())
        self.fingerprint: str = config["fingerprint"]
        self.dim: int = config["dim"]
        self.preprocess = Preprocess(**config["preprocess"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tower = NumpyTextTower(folder / "text.safetensors", heads=config["text_heads"])
        self._many: Encoder | None = None

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """The image tower was not asked for."""
        raise AttributeError("only the text tower was loaded")

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """n texts, cut at 256 tokens, to float32 [n, 384], unit rows."""
        if len(texts) > _FEW:
            from clip_index.encoders import mini

            self._many = self._many or mini.load("mini", device="cpu", precision="fp32", towers=("text",))
            return self._many.encode_text(texts)
        return normalize(self._tower([self._tokenizer.encode(text).ids for text in texts]))


class NumpyTextTower:
    """Lists of token ids to float32 [n, width], the mean over the tokens of each text."""

    def __init__(self, file: Path, *, heads: int):
        from safetensors.numpy import load_file

        self.weights, self.heads = load_file(file), heads
        self.layers = 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("layers."))
        self._dense: Weights = {}

    def __call__(self, ids: list[list[int]]) -> np.ndarray:
        return np.stack([self._text(np.array(tokens)) for tokens in ids])

    def _text(self, tokens: np.ndarray) -> np.ndarray:
        weights = self.weights
        words = weights["words.weight"][tokens] * weights["words.weight.scale"][tokens].astype(np.float32)
        x = words + weights["positions"][: len(tokens)].astype(np.float32) + weights["token_type"].astype(np.float32)
        x = self._norm(x, "norm")
        for number in range(self.layers):
            x = self._layer(x, f"layers.{number}")
        return x.mean(axis=0)

    def _layer(self, x: np.ndarray, name: str) -> np.ndarray:
        length, width = x.shape
        q, k, v = self._linear(x, f"{name}.qkv").reshape(length, 3, self.heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(width // self.heads)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (scores / scores.sum(axis=-1, keepdims=True)) @ v
        attended = attended.transpose(1, 0, 2).reshape(length, width)
        x = self._norm(x + self._linear(attended, f"{name}.out"), f"{name}.attention_norm")
        return self._norm(x + self._linear(_gelu(self._linear(x, f"{name}.up")), f"{name}.down"), f"{name}.output_norm")

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        if name not in self._dense:
            weight, scales = self.weights[f"{name}.weight"], self.weights[f"{name}.weight.scale"].astype(np.float32)
            rows, columns = weight.shape
            grouped = weight.reshape(rows, scales.shape[1], columns // scales.shape[1])
            self._dense[name] = (grouped * scales[..., None]).reshape(rows, columns)
        return x @ self._dense[name].T + self.weights[f"{name}.bias"].astype(np.float32)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12)
        return x * self.weights[f"{name}.weight"].astype(np.float32) + self.weights[f"{name}.bias"].astype(np.float32)


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
