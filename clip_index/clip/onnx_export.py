"""A model as a folder of ONNX files: one for each tower, and beside them what is needed to use them.

image.onnx             images uint8 [n, size, size, 3] -> embeddings float32 [n, dim], not normalised
text.onnx              tokens int64 [n, length] -> embeddings float32 [n, dim], not normalised
tokenizer.json         texts to tokens, for the library tokenizers
clip_index_onnx.json   what decides the numbers; written last
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clip_index import storage
from clip_index.clip.folding import byte_tower, fold, lower_precision
from clip_index.clip.model import CLIP, ModifiedResNet
from clip_index.clip.quantize import quantize, smooth
from clip_index.clip.tokenizer_json import tokenizer_json
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError

CONFIG_FILE = "clip_index_onnx.json"
PRECISIONS = ("fp32", "fp16", "int8")
VERSION = 1
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_FILE_LIMIT = 1_900_000_000
"""Protobuf ends at 2 GB: from here on the weights lie in a second file."""


class _TextTower(nn.Module):
    def __init__(self, model: CLIP):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def export_towers(
    model: CLIP,
    preprocess: Preprocess,
    folder: str,
    precision: str,
    *,
    name: str,
    images: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
) -> dict[str, tuple[int, int]]:
    """Write a model, which it takes over, into a folder; for int8, (matrices in int8, matrices in all) of each tower.

    `images` (uint8 [n, size, size, 3]) and `tokens` (int64 [n, length]) are batches that int8 is calibrated on. Raises
    UsageError for a precision that the model cannot have, ClipIndexError where a library is missing.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}: choose {', '.join(PRECISIONS)}")
    if precision == "int8" and isinstance(model.visual, ModifiedResNet):
        raise UsageError("int8 is for transformers: export a ResNet in fp32 or fp16")
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(library) is None:
            raise ClipIndexError(f"export needs the library {library}: pip install 'clip-index[onnx]'")
    whole = model.config.text.mixer
    told = {
        "version": VERSION,
        "model": name,
        "precision": precision,
        "dim": model.config.embed_dim,
        "preprocess": preprocess.describe(),
        "context_length": model.context_length,
        "whole_texts": whole,
    }
    fold(model.eval().requires_grad_(False))
    visual, model.visual = model.visual, nn.Identity()
    counts = {}
    for modality, tower, feed, batches, axes in (
        ("image", byte_tower(visual, preprocess), "images", images, (0,)),
        ("text", _TextTower(model), "tokens", tokens, (0,) if whole else (0, 1)),
    ):
        path = os.path.join(folder, f"{modality}.onnx")
        if precision == "int8":
            counts[modality] = _write_int8(tower, feed, batches, axes, path)
        else:
            _write(lower_precision(tower, _DTYPES[precision]), feed, batches[0], axes, path)
    storage.write_bytes(storage.join(folder, "tokenizer.json"), tokenizer_json(model.context_length, whole).encode())
    told["fingerprint"] = _hash_files(folder)
    storage.write_bytes(storage.join(folder, CONFIG_FILE), json.dumps(told, indent=2).encode())
    return counts


def _write(tower: nn.Module, feed: str, batch: np.ndarray, axes: Sequence[int], path: str) -> None:
    """Trace a tower into a file; the axes may have any length."""
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    # The exporter tells of its progress, and of deprecations within torch.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower,
            # an axis of length 1 would be taken for a constant
            (torch.from_numpy(np.concatenate([batch, batch])),),
            input_names=[feed],
            output_names=["embeddings"],
            dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),),
            verbose=False,
        )
    quiet.setLevel(level)
    size = sum(value.numel() * value.element_size() for value in tower.state_dict().values())
    program.save(path, external_data=size > _FILE_LIMIT)


def _write_int8(
    tower: nn.Module, feed: str, batches: Sequence[np.ndarray], axes: Sequence[int], path: str
) -> tuple[int, int]:
    import onnx

    with torch.inference_mode():
        smooth(tower, lambda: [tower(torch.from_numpy(batch)) for batch in batches])
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        exact = os.path.join(folder, os.path.basename(path))
        _write(tower, feed, batches[0], axes, exact)
        graph, done, matrices = quantize(exact, batches)
    beside = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > _FILE_LIMIT
    onnx.save_model(graph, path, save_as_external_data=beside, location=f"{os.path.basename(path)}.data")
    return done, matrices


def _hash_files(folder: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:32]
